"""The chapters keep their contract, the pages say what the code does, the book renders without a warning."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup

from tracealign_lib.documents import Document
from tracealign_lib.index import TraceIndex
from tracealign_lib.profiles import PROFILES, ModelSettings, get_profile
from tracealign_lib.world import World, WorldSettings

pytestmark = pytest.mark.book

ROOT = Path(__file__).resolve().parent.parent
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
ENTRIES = [TOC["root"], *(chapter["file"] for part in TOC["parts"] for chapter in part["chapters"])]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = sorted((ROOT / "book").glob("*.md"))
MACHINE_PATH = re.compile(
    r"(?<![\w.~-])/(?:home|root|Users|tmp|work|mnt|opt)/[\w.]|site-packages|file://|[A-Z]:\\\\?Users"
)
PARAMETERS = ('profile: str = "laptop"', "seed: int = 0", 'device: str = "auto"')


def load(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in load(path).cells if cell.cell_type == "code"]


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def stored(function: object) -> object:
    """Run a check on every chapter that is stored in the repository."""
    return pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)(function)


# --- the table of contents -----------------------------------------------------------------------


@pytest.mark.parametrize("entry", ENTRIES)
def test_each_entry_of_the_contents_exists(entry: str) -> None:
    assert any((ROOT / f"{entry}{suffix}").is_file() for suffix in (".md", ".ipynb"))


def test_each_page_and_chapter_is_in_the_contents() -> None:
    written = {path.relative_to(ROOT).with_suffix("").as_posix() for path in (*NOTEBOOKS, *PAGES)}
    assert written <= set(ENTRIES)
    assert len(ENTRIES) == len(set(ENTRIES))


# --- stored chapters -----------------------------------------------------------------------------


@stored
def test_chapter_was_executed_from_top_to_bottom_without_an_error(path: Path) -> None:
    cells = [cell for cell in code_cells(path) if cell.source.strip()]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs
    assert not [
        output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"
    ]


@stored
def test_chapter_has_one_typed_parameters_cell_and_no_injected_one(path: Path) -> None:
    parameters = [cell for cell in code_cells(path) if "parameters" in tags(cell)]
    assert len(parameters) == 1
    assert not [cell for cell in code_cells(path) if "injected-parameters" in tags(cell)]
    lines = [line.split("#")[0].strip() for line in parameters[0].source.splitlines()]
    assert set(PARAMETERS) <= set(lines)
    for line in filter(None, lines):
        assert re.match(r"\w+: [\w\[\], ]+ = ", line), f"not typed: {line}"


@stored
def test_chapter_names_a_kernel_that_every_reader_has(path: Path) -> None:
    metadata = load(path).metadata
    assert metadata.kernelspec.name == "python3"
    assert "papermill" not in metadata


@stored
def test_code_cells_are_short(path: Path) -> None:
    lengths = [len(cell.source.splitlines()) for cell in code_cells(path) if cell.source.strip()]
    assert statistics.median(lengths) <= 8, lengths


@stored
def test_chapter_follows_the_contract(path: Path) -> None:
    text = "\n".join(cell.source for cell in load(path).cells if cell.cell_type == "markdown").lower()
    for part in ("objectives", "prerequisites", "prediction", "does not show", "{exercise}", "{solution}"):
        assert part in text, f"no {part}"


@stored
def test_every_figure_has_alt_text(path: Path) -> None:
    missing = [cell.source for cell in code_cells(path) if not _figures_have_alt_text(cell)]
    assert not missing


@stored
def test_chapter_holds_no_path_of_a_machine(path: Path) -> None:
    notebook = load(path)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            for mime in list(output.get("data", {})):
                if mime.startswith("image/") and mime != "image/svg+xml":
                    base64.b64decode(output["data"].pop(mime))
    text = re.sub(r"base64,[A-Za-z0-9+/=\\n]+", "", json.dumps(notebook, ensure_ascii=False))
    assert not MACHINE_PATH.findall(text)


def _figures_have_alt_text(cell: nbformat.NotebookNode) -> bool:
    """Alt text reaches the page through HTML, or through the cell's metadata (`mystnb.image.alt`)."""
    described = bool(cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "").strip())
    for output in cell.outputs:
        data = output.get("data", {})
        if "text/html" in data:
            soup = BeautifulSoup(data["text/html"], "html.parser")
            if not all(_described(figure) for figure in soup.find_all(["img", "svg"])):
                return False
        elif any(mime.startswith("image/") for mime in data) and not described:
            return False
    return True


def _described(figure: object) -> bool:
    alt = figure.get("alt") or figure.get("aria-label")  # type: ignore[attr-defined]
    return bool((alt or "").strip()) or figure.get("aria-hidden") == "true"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("metadata", "data", "fine"),
    [
        ({}, {"image/png": "AAAA"}, False),
        ({"mystnb": {"image": {"alt": "a rising line"}}}, {"image/png": "AAAA"}, True),
        ({}, {"image/png": "AAAA", "text/html": '<img src="x" alt="a rising line">'}, True),
        ({}, {"text/html": '<img src="x" alt=" ">'}, False),
        ({}, {"text/html": '<svg role="img"></svg>'}, False),
        ({}, {"text/plain": "3"}, True),
    ],
)
def test_the_check_of_alt_text(metadata: dict[str, object], data: dict[str, str], fine: bool) -> None:
    cell = nbformat.v4.new_code_cell("plot()", metadata=metadata)
    cell.outputs = [nbformat.v4.new_output("display_data", data)]
    assert _figures_have_alt_text(cell) is fine


@pytest.mark.parametrize(
    "text", ["/home/ann/x", "see /tmp/y.txt", "lib/python3.11/site-packages/torch", "file:///x"]
)
def test_the_check_of_machine_paths(text: str) -> None:
    assert MACHINE_PATH.search(text)
    assert not MACHINE_PATH.search(
        "data/results/ch02.json, https://example.org/home, path/to/a/model, and/or"
    )


# --- what the pages say --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", [*PAGES, ROOT / "README.md", ROOT / "CHANGELOG.md"], ids=lambda path: path.name
)
def test_links_of_a_page_lead_somewhere_and_hold_no_machine_path(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not urlsplit(link).scheme and not link.startswith("#"):
            assert (path.parent / link.split("#")[0]).exists(), link
    assert not MACHINE_PATH.findall(text)


def test_the_error_texts_in_how_to_run_are_those_of_the_code() -> None:
    page = (ROOT / "book" / "how-to-run.md").read_text(encoding="utf-8")
    table = page.split("| what you see |")[1]
    quoted = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    assert len(quoted) >= 10
    files = [*(ROOT / "tracealign_lib").glob("*.py"), ROOT / "Makefile"]
    code = " ".join(path.read_text(encoding="utf-8") for path in files)
    for message in quoted:
        pattern = re.escape(message).replace("…", r"\{[^}]+\}")
        assert re.search(pattern, code), message


def test_how_to_run_names_the_profiles_and_the_parameters() -> None:
    page = (ROOT / "book" / "how-to-run.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \| [^|]+ \| [^|]+ \|$", page, re.MULTILINE)[: len(PROFILES)] == list(
        PROFILES
    )
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| `([^`]+)` \|", page, re.MULTILINE)
    assert [f"{name}: {kind} = {default}" for name, kind, default in rows] == list(PARAMETERS)


@pytest.mark.parametrize("page", ["README.md", "book/how-to-run.md"])
def test_the_text_to_trace_occurs_in_the_readers_world(page: str) -> None:
    example = re.search(r'tracealign trace "([^"]+)"', (ROOT / page).read_text(encoding="utf-8"))
    assert example is not None
    world = World.generate(get_profile("laptop").world_settings(0))
    copies = [document for document in world.documents if example.group(1) in document.text]
    assert {document.meta["kind"] for document in copies} >= {"recipe"}


def test_the_data_card_lists_the_kinds_and_collections_of_the_world() -> None:
    page = (ROOT / "book" / "data-card.md").read_text(encoding="utf-8")
    table = page.split("| kind | collection |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", table, re.MULTILINE)
    told = {kind: set(re.findall(r"`(\w+)`", collections)) for kind, collections in rows}
    made: dict[str, set[str]] = {}
    for document in World.generate(WorldSettings()).documents:
        made.setdefault(document.meta["kind"], set()).add(document.meta["collection"])
    assert told == made
    for field in ("domain", "items", "copy", "file"):
        assert f"`{field}`" in page
        assert field in World.generate(WorldSettings()).documents[0].meta


def test_notation_uses_names_that_exist(tmp_path: Path) -> None:
    page = (ROOT / "book" / "notation.md").read_text(encoding="utf-8")
    tokens = [[0, 1, 2, 1], [1, 2]]
    index = TraceIndex.build_tokens(tokens, tmp_path / "index", vocab_size=3)
    names = set(re.findall(r"`[^`]*?index\.(\w+)", page))
    assert {"n_tokens", "count", "surprisal"} <= names
    for name in names:
        assert hasattr(index, name), name
    span = index.spans([1, 2])[0]
    for name in set(re.findall(r"span\.(\w+)", page)):
        assert hasattr(span, name), name
    assert "dpo_beta" in ModelSettings.__slots__
    # The smoothing that the page states: (c(t) + 1) / (N + V).
    assert index.surprisal[1] == pytest.approx(-math.log((3 + 1) / (6 + 3)))


def test_the_example_of_a_corpus_is_a_document() -> None:
    page = (ROOT / "book" / "how-to-run.md").read_text(encoding="utf-8")
    line = page.split("```json\n")[1].split("\n```")[0]
    assert Document(**json.loads(line)).to_json()


def test_what_readers_reported_is_marked_as_such() -> None:
    for path in PAGES:
        blocks = re.findall(r":class: (paper-\w+)\n(.*?)\n:::", path.read_text(encoding="utf-8"), re.DOTALL)
        for kind, body in blocks:
            assert "{cite}`tracealign`" in body
            assert ("As reported by readers of the full text" in body) == (kind == "paper-reported")


# --- the rendered book ---------------------------------------------------------------------------


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("jupyter-book")
    command = [str(program), "build", ".", "-W", "-n", "--keep-going"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The book with its stored outputs, built where a reader's other files lie about too."""
    folder = tmp_path_factory.mktemp("reader") / "book"
    left_out = shutil.ignore_patterns(".venv", ".git", "_build", "shared", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=left_out)
    for stray in (".venv/lib/notes.md", ".pytest_cache/README.md", "tests/notes.md", "data/card.md"):
        (folder / stray).parent.mkdir(parents=True, exist_ok=True)
        (folder / stray).write_text("# A page of somebody else\n")
    run = build(folder)
    log = run.stdout + run.stderr
    assert run.returncode == 0, log[-6000:]
    assert "WARNING" not in log
    return folder / "_build" / "html"


def rendered(html: Path) -> Iterator[tuple[Path, BeautifulSoup]]:
    for entry in ENTRIES:
        path = html / f"{entry}.html"
        yield path, BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def test_each_entry_has_a_page_and_strangers_have_none(html: Path) -> None:
    assert (html / "index.html").is_file()
    pages = {path.relative_to(html).with_suffix("").as_posix() for path in html.rglob("*.html")}
    pages = {page for page in pages if not page.startswith("_static")}
    assert pages - {"index", "search", "genindex", "py-modindex", "prf-prf"} == set(ENTRIES)


def test_links_between_pages_resolve(html: Path) -> None:
    pages = dict(rendered(html))
    anchors = {path: {tag["id"] for tag in soup.find_all(id=True)} for path, soup in pages.items()}
    broken = []
    for path, soup in pages.items():
        for tag in soup.find_all(href=True) + soup.find_all(src=True):
            link = urlsplit(tag.get("href") or tag.get("src"))
            if link.scheme or link.netloc:
                continue
            target = (path.parent / unquote(link.path)).resolve() if link.path else path
            if not target.exists() or (
                link.fragment and link.fragment not in anchors.get(target, {link.fragment})
            ):
                broken.append((path.name, tag.get("href") or tag.get("src")))
    assert not broken


def test_pages_need_no_network(html: Path) -> None:
    for path, soup in rendered(html):
        loaded = [tag["src"] for tag in soup.find_all(src=True)]
        loaded += [
            tag["href"] for tag in soup.find_all("link", href=True) if "stylesheet" in tag.get("rel", [])
        ]
        assert not {address for address in loaded if urlsplit(address).netloc}, path.name
        if soup.find(class_="math"):
            [formulas] = {address.split("?")[0] for address in loaded if "mathjax" in address}
            assert (path.parent / formulas).is_file()


def test_rendered_figures_have_alt_text_and_pages_no_machine_path(html: Path) -> None:
    for path, soup in rendered(html):
        article = soup.find("article")
        assert article is not None
        for image in article.find_all("img"):
            alt = image.get("alt", "").strip()
            assert alt, f"{path.name}: {image}"
            assert not alt.startswith(("_images", "../_images")), f"{path.name}: {alt}"
        text = article.get_text()
        assert not MACHINE_PATH.findall(text.replace("/big/disk", "")), path.name


def test_the_injected_cell_is_hidden_and_the_stylesheet_is_there(html: Path) -> None:
    for path, soup in rendered(html):
        assert not soup.select(".tag_injected-parameters"), path.name
        assert soup.select('link[href*="_static/book.css"]'), path.name


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ("Nothing is wrong.", None),
        ("[nowhere](nowhere.md)", "nowhere.md"),
        ("{term}`no such term`", "term not in glossary"),
        ("{cite}`nobody1900`", "could not find bibtex key"),
        ("{eq}`no-equation`", "equation not found"),
    ],
)
def test_a_defect_fails_the_build(text: str, warning: str | None, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "book" / "_static", tmp_path / "book" / "_static")
    shutil.copy(ROOT / "book" / "references.bib", tmp_path / "book")
    shutil.copy(ROOT / "_config.yml", tmp_path)
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: book/page\n")
    (tmp_path / "book" / "page.md").write_text(f"# Page\n\n{text}\n")
    run = build(tmp_path)
    log = run.stdout + run.stderr
    assert (run.returncode != 0) == (warning is not None), log
    assert ("WARNING" in log) == (warning is not None), log
    assert (warning or "") in log
