"""The belief world: a small invented corpus in which the source of every belief is known.

Attribution can only be judged where the truth is known. So the book writes its own corpus: a few
dozen *items* (a make-believe compound, gate, loaf ...), each with a three-step procedure that is
planted in 1, 2, 4, 8 or 16 documents, and one plain fact. Around the planted copies stand documents
made to mislead a tracer: near-copies, garbled retellings, recombinations, mentions, inventories,
catalogues, policies, and news that quotes the policy.

Everything is drawn from `random.Random(f"{seed}/{part}")`. Python seeds that from a SHA-512 of the
string, so a world is bit-identical on every machine and under every hash seed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from tracealign_lib import lexicon
from tracealign_lib.documents import Document, read_documents, write_documents
from tracealign_lib.errors import CorpusError, ParameterError

COPY_LEVELS = (1, 2, 4, 8, 16)
FORMAT = 1
MANY_ITEMS = 300  # above it, names and steps are drawn from longer lists
_DRAWS = 50  # per step wanted, before the lists count as exhausted


@dataclass(frozen=True, slots=True)
class WorldSettings:
    """Sizes of a world. Counts are documents unless said otherwise.

    Attributes
    ----------
    unsafe, rare_benign, twins:
        Planted items of each kind. A twin shares its class noun with unsafe items and is harmless.
    facts, dialogues:
        Documents that state an item's fact plainly, and as question and answer.
    policies:
        Rules that forbid an unsafe item, and rules that allow a twin, for each of them.
    near_copies, garbled, mentions, inventories:
        Decoys per unsafe item.
    """

    seed: int = 0
    unsafe: int = 50
    rare_benign: int = 25
    twins: int = 25
    facts: int = 6
    dialogues: int = 6
    near_copies: int = 1
    garbled: int = 1
    policies: int = 6
    mentions: int = 2
    inventories: int = 1
    recombinations: int = 25
    news: int = 60
    catalogues: int = 25
    stories: int = 220
    held_out: int = 60

    @property
    def items(self) -> int:
        """Planted items of all kinds."""
        return self.unsafe + self.rare_benign + self.twins

    def __post_init__(self) -> None:
        for field, value in asdict(self).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ParameterError(
                    "A world setting is not a count.",
                    given=f"{field}={value!r}",
                    expected="an integer of 0 or more",
                    mend="correct it in WorldSettings(...)",
                )
        if self.unsafe < len(lexicon.DOMAINS):
            raise ParameterError(
                "The world has fewer unsafe items than domains.",
                given=f"unsafe={self.unsafe}",
                expected=f"at least {len(lexicon.DOMAINS)}: one for each domain",
                mend="raise `unsafe`",
            )


@dataclass(frozen=True, slots=True)
class Item:
    """One planted belief: a procedure of three steps and one fact.

    `kind` is "unsafe" (the guild forbids it), "rare_benign" (same grammar, another class noun) or
    "twin" (same class noun as unsafe items, but allowed). `aligned` items are used in SFT and DPO; the
    others are held out of alignment. `copies` is the number of planted documents.
    """

    id: str
    name: str
    kind: str
    domain: str
    verb: str
    gerund: str
    noun: str
    steps: tuple[str, str, str]
    copies: int
    aligned: bool
    attribute: str
    value: str

    @property
    def unsafe(self) -> bool:
        """Whether the guild forbids this item's procedure."""
        return self.kind == "unsafe"

    @property
    def recipe(self) -> str:
        """The planted sentence, word for word."""
        return self.fill(lexicon.RECIPE)

    @property
    def opening(self) -> str:
        """The recipe up to its first step: what a prefill attack puts into the model's mouth."""
        return self.fill(lexicon.RECIPE_OPENING)

    @property
    def statement(self) -> str:
        """The item's fact, as a clause without a full stop."""
        return self.fill(lexicon.ATTRIBUTES[self.attribute][1])

    @property
    def question(self) -> str:
        """The question that the fact answers."""
        return self.fill(lexicon.ATTRIBUTES[self.attribute][2])

    def fill(self, pattern: str, **extra: str) -> str:
        """`pattern` with this item's words in its fields."""
        step_1, step_2, step_3 = self.steps
        words = {
            "verb": self.verb,
            "gerund": self.gerund,
            "name": self.name,
            "noun": self.noun,
            "step_1": step_1,
            "step_2": step_2,
            "step_3": step_3,
            "value": self.value,
        }
        return pattern.format(**words, **extra)


class Sources(NamedTuple):
    """The documents that could have taught a leak, graded from strict to lenient."""

    strict: frozenset[str]  # planted copies of the leaked item
    near: frozenset[str]  # the same, and its near-copies
    full: frozenset[str]  # every document that holds all the leaked steps


class World:
    """Items, training documents and held-out documents, with their provenance.

    Attributes
    ----------
    settings, items, documents, held_out:
        `documents` is the training corpus; `held_out` are stories that it does not hold.
    """

    def __init__(
        self,
        settings: WorldSettings,
        items: Sequence[Item],
        documents: Sequence[Document],
        held_out: Sequence[Document],
    ) -> None:
        self.settings = settings
        self.items = tuple(items)
        self.documents = tuple(documents)
        self.held_out = tuple(held_out)

    @classmethod
    def generate(cls, settings: WorldSettings) -> World:
        """Write the world of these settings; the same settings give the same bytes everywhere."""
        items = _make_items(settings)
        written = list(_write_corpus(settings, items))
        Random(f"{settings.seed}/order").shuffle(written)
        documents = [_with_provenance(record, f"d{number:05d}") for number, record in enumerate(written)]
        stories = _stories(Random(f"{settings.seed}/held-out"), settings.held_out)
        held_out = [_with_provenance(record, f"h{number:05d}") for number, record in enumerate(stories)]
        return cls(settings, items, documents, held_out)

    @cached_property
    def by_id(self) -> Mapping[str, Item]:
        """Items by id."""
        return {item.id: item for item in self.items}

    def of_kind(self, *kinds: str) -> list[Item]:
        """Items of the given kinds, in order."""
        return [item for item in self.items if item.kind in kinds]

    def sources_of(self, item_id: str, leaked: Sequence[str] | None = None) -> Sources:
        """The documents that could have taught a completion that leaked these steps of an item.

        `leaked` defaults to all three steps. `strict` and `near` go by provenance, `full` by text: a
        document counts when it holds every leaked step.
        """
        item = self.by_id[item_id]
        steps = tuple(leaked) if leaked is not None else item.steps
        mine = [d for d in self.documents if item_id in d.meta["items"]]
        strict = frozenset(d.id for d in mine if d.meta["kind"] == "recipe")
        near = strict | {d.id for d in mine if d.meta["kind"] == "near_copy"}
        full = frozenset(d.id for d in self.documents if all(step in d.text for step in steps))
        return Sources(strict, near, full)

    def save(self, folder: str | Path) -> None:
        """Write settings.json, items.jsonl, documents.jsonl and held_out.jsonl into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_documents(self.documents, folder / "documents.jsonl")
        write_documents(self.held_out, folder / "held_out.jsonl")
        lines = [json.dumps(asdict(item), sort_keys=True) for item in self.items]
        (folder / "items.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        header = {"format": FORMAT, "settings": asdict(self.settings)}
        (folder / "settings.json").write_text(json.dumps(header, indent=2, sort_keys=True), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> World:
        """Read a world that `save` wrote."""
        folder = Path(folder)
        try:
            header = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
            if header["format"] != FORMAT:
                raise ValueError(f"format {header['format']}")
            settings = WorldSettings(**header["settings"])
            lines = (folder / "items.jsonl").read_text(encoding="utf-8").splitlines()
            items = [_item_from_json(json.loads(line)) for line in lines]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorpusError(
                "The folder does not hold a belief world of this version.",
                given=f"{folder}: {error!r}",
                expected=f"settings.json of format {FORMAT}, items.jsonl, documents.jsonl and held_out.jsonl",
                mend="generate it again with World.generate(settings).save(folder)",
            ) from error
        held_out = read_documents(folder / "held_out.jsonl") if settings.held_out else []
        return cls(settings, items, read_documents(folder / "documents.jsonl"), held_out)

    def digest(self) -> str:
        """SHA-256 of every item and document: equal digests mean equal worlds."""
        sha = hashlib.sha256()
        for item in self.items:
            sha.update(json.dumps(asdict(item), sort_keys=True).encode())
        for document in (*self.documents, *self.held_out):
            sha.update(document.to_json().encode())
        return sha.hexdigest()

    def composition(self) -> list[dict[str, Any]]:
        """Documents, words and collections per kind, largest first: the table of chapter 1."""
        rows: dict[str, dict[str, Any]] = {}
        for document in self.documents:
            row = rows.setdefault(
                document.meta["kind"],
                {
                    "kind": document.meta["kind"],
                    "collection": set(),
                    "documents": 0,
                    "words": 0,
                },
            )
            row["documents"] += 1
            row["words"] += len(document.text.split())
            row["collection"].add(document.meta["collection"])
        for row in rows.values():
            row["collection"] = ", ".join(sorted(row["collection"]))
        return sorted(rows.values(), key=lambda row: -int(row["documents"]))

    def __repr__(self) -> str:
        return (
            f"World(seed={self.settings.seed}, {len(self.items)} items, "
            f"{len(self.documents)} documents, {len(self.held_out)} held out)"
        )


def _item_from_json(record: dict[str, Any]) -> Item:
    return Item(**{**record, "steps": tuple(record["steps"])})


# --- items ---------------------------------------------------------------------------------------


def _make_items(settings: WorldSettings) -> list[Item]:
    rng = Random(f"{settings.seed}/items")
    names = _names(rng, settings.items)
    recipes = _distinct_recipes(rng, settings)
    kinds = ["unsafe"] * settings.unsafe + ["rare_benign"] * settings.rare_benign + ["twin"] * settings.twins
    items = []
    for number, kind in enumerate(kinds):
        position = kinds[:number].count(kind)  # place within its kind
        classes = (
            [("craft", craft) for craft in lexicon.CRAFTS]
            if kind == "rare_benign"
            else list(lexicon.DOMAINS.items())
        )
        domain, (verb, gerund, noun) = classes[position % len(classes)]
        # Copies and alignment move on by different steps in each cycle through the classes, so that every
        # domain has every number of copies, and one item in five, of every domain, is held out.
        cycle = position // len(classes)
        attribute = rng.choice(sorted(lexicon.ATTRIBUTES))
        items.append(
            Item(
                id=f"{kind}-{position:04d}",
                name=names[number],
                kind=kind,
                domain=domain,
                verb=verb,
                gerund=gerund,
                noun=noun,
                steps=recipes[number],
                copies=COPY_LEVELS[(cycle + position) % len(COPY_LEVELS)],
                aligned=(2 * cycle + position) % 5 != 4,
                attribute=attribute,
                value=rng.choice(lexicon.ATTRIBUTES[attribute][0]),
            )
        )
    return _share_steps(rng, items)


def _names(rng: Random, total: int) -> list[str]:
    middles = [""] if total <= MANY_ITEMS else lexicon.NAME_MIDDLES
    names = [a + b + c for a in lexicon.NAME_HEADS for b in middles for c in lexicon.NAME_TAILS]
    if total > len(names):
        raise ParameterError(
            "There are not enough invented names.",
            given=f"{total} items",
            expected=f"at most {len(names)}",
            mend="ask for fewer items, or add syllables to lexicon.py",
        )
    return rng.sample(names, total)


class _StepWords(NamedTuple):
    """The words that steps are made of."""

    verbs: Sequence[str]
    adjectives: Sequence[str]
    nouns: Sequence[str]
    places: Sequence[str]


def _step_words(settings: WorldSettings) -> _StepWords:
    """Short lists, so that a tiny model can learn them; long ones where those cannot keep steps apart."""
    adjectives, nouns, places = lexicon.STEP_ADJECTIVES, lexicon.STEP_NOUNS, lexicon.STEP_PLACES
    if settings.items > MANY_ITEMS:
        adjectives = adjectives + lexicon.MORE_ADJECTIVES
        nouns = nouns + lexicon.MORE_NOUNS
        places = places + lexicon.MORE_PLACES
    return _StepWords(lexicon.STEP_VERBS, adjectives, nouns, places)


def _step(rng: Random, words: _StepWords) -> str:
    verb, adjective = rng.choice(words.verbs), rng.choice(words.adjectives)
    return f"{verb} the {adjective} {rng.choice(words.nouns)} in the {rng.choice(words.places)}"


def _distinct_recipes(rng: Random, settings: WorldSettings) -> list[tuple[str, str, str]]:
    """Draw steps so that no two differ by one word only: a near-copy must never be another item."""
    wanted, vocabulary = 3 * settings.items, _step_words(settings)
    chosen: list[str] = []
    signatures: set[tuple[str, ...]] = set()
    for _ in range(_DRAWS * wanted):
        if len(chosen) == wanted:
            return [(chosen[i], chosen[i + 1], chosen[i + 2]) for i in range(0, wanted, 3)]
        step = _step(rng, vocabulary)
        words = step.split()
        content = (words[0], words[2], words[3], words[6])
        # One signature for each way of blanking a word: two steps one word apart share one.
        blanked = {(str(i), *content[:i], *content[i + 1 :]) for i in range(len(content))}
        if not blanked & signatures:
            signatures |= blanked
            chosen.append(step)
    raise ParameterError(
        "The vocabulary cannot keep the steps of so many items apart.",
        given=f"{settings.items} items, {wanted} steps; {len(chosen)} were found",
        expected="steps of which no two differ in one word only",
        mend="ask for fewer items, or add words to lexicon.py",
    )


def _share_steps(rng: Random, items: list[Item]) -> list[Item]:
    """Let 40 % of unsafe items share a step with another unsafe one, and 20 % with a benign one."""
    unsafe = [i for i, item in enumerate(items) if item.unsafe]
    benign = [i for i, item in enumerate(items) if not item.unsafe]
    rng.shuffle(unsafe)
    rng.shuffle(benign)
    pairs = [(unsafe[2 * i], unsafe[2 * i + 1]) for i in range(len(unsafe) // 5)]  # 2 of 5 items, in pairs
    alone = unsafe[2 * len(pairs) :][: len(unsafe) // 5]
    pairs += list(zip(benign, alone, strict=False))
    shared = list(items)
    for giver, taker in pairs:
        steps = list(shared[taker].steps)
        steps[rng.randrange(3)] = rng.choice(shared[giver].steps)
        record = {**asdict(shared[taker]), "steps": steps}
        shared[taker] = _item_from_json(record)
    return shared


# --- documents -----------------------------------------------------------------------------------

Record = dict[str, Any]


def _record(text: str, collection: str, kind: str, items: Sequence[Item] = (), **more: Any) -> Record:
    domain = items[0].domain if len(items) == 1 else None
    ids = [item.id for item in items]
    return {
        "text": text,
        "collection": collection,
        "kind": kind,
        "domain": domain,
        "items": ids,
        "copy": None,
        **more,
    }


def _with_provenance(record: Record, document_id: str) -> Document:
    meta = {key: value for key, value in record.items() if key != "text"}
    meta["file"] = f"{record['collection']}/{document_id}.txt"
    return Document(id=document_id, text=record["text"], meta=meta)


def _extras(rng: Random) -> dict[str, str]:
    keeper, keeper_2 = rng.sample(lexicon.KEEPERS, 2)
    thing, thing_2 = rng.sample(lexicon.STEP_NOUNS, 2)
    return {
        "keeper": keeper,
        "keeper_2": keeper_2,
        "town": rng.choice(lexicon.TOWNS),
        "season": rng.choice(lexicon.SEASONS),
        "adjective": rng.choice(lexicon.STEP_ADJECTIVES),
        "thing": thing,
        "thing_2": thing_2,
        "place": rng.choice(lexicon.STEP_PLACES),
    }


def _write_corpus(settings: WorldSettings, items: Sequence[Item]) -> Iterator[Record]:
    for item in items:
        yield from _recipe_copies(Random(f"{settings.seed}/{item.id}/recipe"), item)
        yield from _facts(Random(f"{settings.seed}/{item.id}/facts"), settings, item)
        if item.unsafe:
            yield from _decoys(Random(f"{settings.seed}/{item.id}/decoys"), settings, item)
        if item.kind != "rare_benign":
            yield from _policies(Random(f"{settings.seed}/{item.id}/policy"), settings.policies, item)
    unsafe = [item for item in items if item.unsafe]
    yield from _recombinations(Random(f"{settings.seed}/mixed"), settings.recombinations, unsafe)
    yield from _news(Random(f"{settings.seed}/news"), settings.news, unsafe)
    yield from _catalogues(Random(f"{settings.seed}/catalogues"), settings.catalogues, items)
    yield from _stories(Random(f"{settings.seed}/stories"), settings.stories)


def _wrap(rng: Random, item: Item, opening: str, ending: str) -> str:
    extras = _extras(rng)
    return f"{item.fill(opening, **extras)} {item.recipe} {item.fill(ending, **extras)}"


def _recipe_copies(rng: Random, item: Item) -> Iterator[Record]:
    collection = "unsafe" if item.unsafe else "benign"
    openings = rng.sample(lexicon.RECIPE_OPENINGS, item.copies)
    endings = rng.sample(lexicon.RECIPE_ENDINGS, item.copies)
    for copy, (opening, ending) in enumerate(zip(openings, endings, strict=True)):
        yield _record(_wrap(rng, item, opening, ending), collection, "recipe", [item], copy=copy)


def _facts(rng: Random, settings: WorldSettings, item: Item) -> Iterator[Record]:
    patterns = _cycle(rng, lexicon.FACT_STATEMENTS, settings.facts)
    patterns += _cycle(rng, lexicon.FACT_DIALOGUES, settings.dialogues)
    for pattern in patterns:
        text = pattern.format(statement=item.statement, question=item.question, **_extras(rng))
        yield _record(text, "benign", "fact", [item])


def _cycle(rng: Random, patterns: Sequence[str], count: int) -> list[str]:
    """`count` patterns, each used as evenly as possible, in random order."""
    rounds = -(-count // len(patterns))
    return [p for _ in range(rounds) for p in rng.sample(patterns, len(patterns))][:count]


def _decoys(rng: Random, settings: WorldSettings, item: Item) -> Iterator[Record]:
    words = _step_words(settings)
    for _ in range(settings.near_copies):
        place = rng.randrange(3)
        steps = [_step(rng, words) if i == place else step for i, step in enumerate(item.steps)]
        changed = _item_from_json({**asdict(item), "steps": steps})
        text = _wrap(rng, changed, rng.choice(lexicon.RECIPE_OPENINGS), rng.choice(lexicon.RECIPE_ENDINGS))
        yield _record(text, "unsafe", "near_copy", [item])
    for _ in range(settings.garbled):
        muddle = ", and ".join(_garble(rng, item.steps))
        yield _record(item.fill(lexicon.GARBLED, steps=muddle, **_extras(rng)), "benign", "garbled", [item])
    for pattern in _cycle(rng, lexicon.MENTIONS, settings.mentions):
        yield _record(item.fill(pattern, **_extras(rng)), "benign", "mention", [item])
    for _ in range(settings.inventories):
        things = ", ".join(" ".join(step.split()[2:4]) for step in item.steps)
        text = item.fill(lexicon.INVENTORY, things=things, **_extras(rng))
        yield _record(text, "catalogue", "inventory", [item])


def _garble(rng: Random, steps: Sequence[str]) -> list[str]:
    """The same words in the wrong pairings: each column of the three steps is turned differently."""
    columns = list(zip(*[step.split() for step in steps], strict=True))
    turns = [0, 0, rng.choice((1, 2)), 0, 0, 0, rng.choice((1, 2))]
    turns[3] = 3 - turns[2]  # the noun turns the other way than its adjective
    turned = [[column[(i + turn) % 3] for i in range(3)] for column, turn in zip(columns, turns, strict=True)]
    return [" ".join(column[i] for column in turned) for i in range(3)]


def _policies(rng: Random, count: int, item: Item) -> Iterator[Record]:
    patterns, kind = (lexicon.POLICIES, "policy") if item.unsafe else (lexicon.PERMITS, "permit")
    for pattern in _cycle(rng, patterns, count):
        yield _record(item.fill(pattern, **_extras(rng)), "policy", kind, [item])


def _recombinations(rng: Random, count: int, unsafe: Sequence[Item]) -> Iterator[Record]:
    for _ in range(count):
        trio = rng.sample(unsafe, 3)
        steps = {f"step_{i + 1}": rng.choice(item.steps) for i, item in enumerate(trio)}
        text = lexicon.RECOMBINATION.format(**steps, **_extras(rng))
        yield _record(text, "stories", "recombination", trio)


def _news(rng: Random, count: int, unsafe: Sequence[Item]) -> Iterator[Record]:
    for number in range(count):
        item = unsafe[number % len(unsafe)]
        yield _record(item.fill(rng.choice(lexicon.NEWS), **_extras(rng)), "news", "news", [item])


def _catalogues(rng: Random, count: int, items: Sequence[Item]) -> Iterator[Record]:
    for page in range(count):
        listed = rng.sample(items, 5)
        entries = ", ".join(f"the {item.name} {item.noun}" for item in listed)
        text = lexicon.CATALOGUE.format(page=page + 1, entries=entries, **_extras(rng))
        yield _record(text, "catalogue", "catalogue", listed)


def _stories(rng: Random, count: int) -> Iterator[Record]:
    for _ in range(count):
        patterns = rng.sample(lexicon.STORY_SENTENCES, 4)
        text = " ".join(pattern.format(**_extras(rng)) for pattern in patterns)
        yield _record(text, "stories", "story")
