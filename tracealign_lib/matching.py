"""The repair: matching that survives what an attacker does to the words.

Exact matching of tokens misses a span that is written in capitals, with look-alike letters, with a word
changed, or over several turns (MemFree, arXiv 2210.17546, calls the first kind style transfer; near-copies
are "fuzzy" duplicates in arXiv 2405.15523). There are four ways to see such a span again:

* *read* texts so that the change disappears before they are matched: as tokens of a normalised text, or as
  its bare letters (`Reading`);
* *match* loosely: count what one document covers in pieces, with any gaps and in any order (`CoverShield`),
  or align with edits (`AlignShield`);
* compare *meanings* instead of words: embeddings (`SemanticFilter`);
* check a *conversation* as one text (`Joined`).

All of them are `CompletionFilter`s, so they are calibrated, measured and put before a model as TraceShield
is. None decodes anything: a reader who is told the code is another kind of attacker, and needs its own key.
"""

from __future__ import annotations

import math
import sys
import unicodedata
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tracealign_lib.compiled import compiled
from tracealign_lib.documents import Document, check_documents
from tracealign_lib.errors import ModelError, ParameterError
from tracealign_lib.index import Ids, TraceIndex
from tracealign_lib.rivals import TextFilter, Threshold
from tracealign_lib.shield import CompletionFilter, encode

if TYPE_CHECKING:  # only one embedder needs a model
    from tracealign_lib.lm import LanguageModel

TURN = "\x1e"
"""Stands between the turns of a conversation: the record separator, which no turn may hold."""
CANDIDATES = 20
"""Documents that are aligned with a text, at most."""

# What a capital or small letter is confused with, once compatibility forms and accents are gone: Unicode
# Technical Standard 39, confusables.txt. Where it names two letters, the one that looks more alike.
_LOOKALIKES = {
    "a": "ɑαаᎪᗅ⍺ꓮ𐊠𖽀",
    "b": "ƅβвьᏏᏴᑲᖯᗷꓐꞵ𐊂𐊡𐌁",
    "c": "сᏟᴄⲥꓚ𐊢𐌂𐐽𐔜𑣩𑣲🝌",
    "d": "ԁᎠᏧᑯᗞᗪꓒꓓ",
    "e": "εеҽᎬ℮⋿ⴹꓰꬲ𐊆𑣆𑣎",
    "f": "ϝքᖴẝꓝꞙꬵ𐊇𐊥𐔥𑣂𝈓",
    "g": "ƍɡԍցᏀᏳᶃꓖ",
    "h": "ηнһհᎻᏂᕼⲏꓧ𐋏",
    "i": "ıɩɪιіᎥ⍳ꙇ𑣃",
    "j": "ʝϳјᎫᒍꓙ",
    "k": "κкᏦᛕⲕꓗ𐔘",
    "l": "ǀӏ۱Ꮮᒪᛁ∣⏽│ⲓⳑⵏꓡꓲ𐊊𐌉𐌠𐑃𐔦𑣒𖼖𖼨𝈪",
    "m": "μϻмᎷᗰᛖⲙꓟ𐊰𐌑",
    "n": "ոռⲛꓠ𐔓",
    "o": "οσоօ۵०০੦૦ଠ୦௦ం౦ಂ೦ംഠ൦ං๐໐ဝ၀ჿዐᴏᴑⲟⵔ〇ꓳꬽ𐊒𐊫𐐬𐓪𐔖𑓐𑣈𑣕𑣗𑣠",
    "p": "ρрᏢᑭ⍴ⲣꓑ𐊕",
    "q": "ԛգզⵕ",
    "r": "ʀгᎡᎱᏒᖇᴦⲅꓣꭇꭈ𐓜𖼵𝈖",
    "s": "ƽѕտᏕᏚꓢꜱ𐊖𐑈𑣁𖼺",
    "t": "τтᎢ⊤⟙ⲧꓔ𐊗𐊱𐌕𑣜𖼊🝨",
    "u": "ʋυսሀᑌᴜ∪⋃ꓴꞟꭎꭒ𐓶𑣘𖽂",
    "v": "νѵ۷Ꮩᐯᴠ∨⋁ⴸꓦꛟ𐔝𑜆𑣀𖼈𝈍",
    "w": "ɯѡԝաᎳᏔᴡꓪ𑜊𑜎𑜏𑣦𑣯",
    "x": "×χхᕁᕽ᙭᙮ᚷ╳⤫⤬⨯ⲭⵝꓫꭓ𐊐𐊴𐌗𐌢𐔧𑣬",
    "y": "ɣʏγуүყᎩᎽᶌỿⲩꓬꭚ𐊲𑣄𖽃",
    "z": "ζᏃᴢꓜ𐋵𑣉𑣥",
}
_FOLD = str.maketrans({mark: letter for letter, marks in _LOOKALIKES.items() for mark in marks})
_FOLD_DIGITS = str.maketrans("01", "ol")  # the same standard, within ASCII
_KEPT_MARKS = frozenset("LN")  # first letters of the Unicode categories of letters and numbers


# --- readings ------------------------------------------------------------------------------------


def normalise(text: str) -> str:
    """`text` in one style: compatibility forms, case, accents, look-alikes and invisible marks folded.

    Unicode NFKC, case folding, removal of combining marks and of format and control characters, look-alikes
    of a to z (Unicode Technical Standard 39), and single spaces. Applied twice, it changes nothing more.
    """
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).casefold())
    kept = (c if unicodedata.category(c) != "Cc" else " " for c in plain if _is_seen(c))
    folded = "".join(kept).translate(_FOLD)
    return " ".join(unicodedata.normalize("NFKC", folded).casefold().split())


def _is_seen(character: str) -> bool:
    return unicodedata.category(character) not in ("Mn", "Me", "Cf", "Cs")


def letters(text: str) -> Ids:
    """The letters and digits of a normalised text, without anything between them, as code points (n,).

    0 and 1 are read as o and l, which they are confused with.
    """
    folded = normalise(text).translate(_FOLD_DIGITS)
    kept = [ord(c) for c in folded if unicodedata.category(c)[0] in _KEPT_MARKS]
    return np.array(kept, dtype=np.int64)


def normalised_index(documents: Iterable[Document], tokenizer: Any, path: str | Path) -> TraceIndex:
    """`TraceIndex.build` of the normalised texts of `documents`."""
    return TraceIndex.build([Document(d.id, normalise(d.text), d.meta) for d in documents], tokenizer, path)


def letter_index(documents: Iterable[Document], path: str | Path) -> TraceIndex:
    """`TraceIndex.build_tokens` of the letters of `documents`; its ids are code points."""
    checked = check_documents(documents)
    names, read = [d.id for d in checked], [letters(d.text) for d in checked]
    return TraceIndex.build_tokens(read, path, vocab_size=sys.maxunicode + 1, document_ids=names)


@dataclass(frozen=True)
class Reading:
    """How texts are read before they are matched.

    Attributes
    ----------
    index:
        Of the protected documents, read in the same way.
    encode:
        Ids of a text, shape (n,).
    unit:
        What an id stands for: "tokens" or "letters".
    """

    index: TraceIndex
    encode: Callable[[str], Ids]
    unit: str

    @classmethod
    def of_tokens(cls, index: TraceIndex) -> Reading:
        """Texts as they are, in tokens."""
        return cls(index, lambda text: encode(index, text)[0], "tokens")

    @classmethod
    def of_normalised(cls, index: TraceIndex) -> Reading:
        """Texts normalised, in tokens; `index` is a `normalised_index`."""
        return cls(index, lambda text: index.encode(normalise(text)), "tokens")

    @classmethod
    def of_letters(cls, index: TraceIndex) -> Reading:
        """Texts as bare letters; `index` is a `letter_index`."""
        return cls(index, letters, "letters")


# --- matching ------------------------------------------------------------------------------------


class SpanShield(TextFilter):
    """The longest run that a text shares with one document; minus infinity without one of `min_length`.

    In tokens, this is TraceShield with `bci.SpanLength`.

    Parameters
    ----------
    reading:
        What is protected, and how it is read.
    min_length:
        Shortest run that counts, in the reading's unit.
    """

    def __init__(self, reading: Reading, min_length: int = 8, threshold: Threshold = 0.0) -> None:
        super().__init__(threshold)
        self.reading, self.min_length = reading, _check_count(min_length, "min_length")
        self.measured = f"longest shared run in {reading.unit}"

    def _score(self, text: str) -> float:
        spans = self.reading.index.spans(self.reading.encode(text), min_length=self.min_length)
        return max((float(end - start) for start, end, _ in spans), default=-math.inf)


class CoverShield(TextFilter):
    """How much of a text one document covers with runs of at least `run`: gaps of any length, any order.

    Parameters
    ----------
    reading:
        What is protected, and how it is read.
    run:
        Shortest run that counts, in the reading's unit. A text that is cut into pieces of this length and
        shuffled, with anything between the pieces, scores as the whole does.
    """

    def __init__(self, reading: Reading, run: int, threshold: Threshold = 0.0) -> None:
        super().__init__(threshold)
        self.reading, self.run = reading, _check_count(run, "run")
        self.measured = f"most {reading.unit} covered by one document"

    def _score(self, text: str) -> float:
        found = self.reading.index.sources(self.reading.encode(text), min_length=self.run, limit=None)
        return max((float(sum(end - start for start, end in s.covered)) for s in found), default=0.0)


class AlignShield(TextFilter):
    """The best local alignment of a text with a document: what they share, less what has to be edited.

    A match counts 1, a substitution and a left-out or inserted symbol -`penalty` each (Smith-Waterman).
    Only documents that share a run of `seed` with the text are aligned: the `CANDIDATES` that cover most of
    its surprisal.

    Parameters
    ----------
    reading:
        What is protected, and how it is read.
    seed:
        Shared run that makes a document a candidate, in the reading's unit.
    penalty:
        Of an edit; above 0.

    References
    ----------
    Smith and Waterman, "Identification of common molecular subsequences", J. Mol. Biol. 147 (1981).
    """

    def __init__(
        self, reading: Reading, seed: int = 3, penalty: float = 0.5, threshold: Threshold = 0.0
    ) -> None:
        super().__init__(threshold)
        if not (isinstance(penalty, int | float) and math.isfinite(penalty) and penalty > 0):
            raise ParameterError(
                "The penalty is out of range.",
                given=repr(penalty),
                expected="a finite number above 0",
                mend="for example penalty=0.5",
            )
        self.reading, self.seed, self.penalty = reading, _check_count(seed, "seed"), float(penalty)
        self.measured = f"best alignment in {reading.unit}"

    def _score(self, text: str) -> float:
        index, ids = self.reading.index, self.reading.encode(text)
        found = index.sources(ids, min_length=self.seed, limit=CANDIDATES)
        documents = (index.document_tokens(source.document_id) for source in found)
        return max((float(align(ids, document, self.penalty)) for document in documents), default=0.0)


@compiled
def align(left: Ids, right: Ids, penalty: float) -> float:
    """The score of the best local alignment of two sequences (n,) and (m,); 0 if they share nothing."""
    best = 0.0
    above = np.zeros(len(right) + 1)
    for i in range(len(left)):
        diagonal = 0.0
        for j in range(1, len(right) + 1):
            met = diagonal + (1.0 if left[i] == right[j - 1] else -penalty)
            diagonal = above[j]
            above[j] = max(0.0, met, above[j] - penalty, above[j - 1] - penalty)
            best = max(best, above[j])
    return best


# --- meanings ------------------------------------------------------------------------------------

Embedder = Callable[[Sequence[str]], NDArray[np.floating[Any]]]
"""Texts to vectors (texts, dimension)."""


class SemanticFilter(TextFilter):
    """How much nearer a text is to the nearest protected document than to the nearest other one.

    Vectors are centred by the mean of all documents, and compared by cosine; the score is the difference of
    the two largest, or the first alone where no other documents are given. Texts are normalised first.

    Parameters
    ----------
    embed:
        See `hidden_states` and `sentence_embeddings`.
    protected, others:
        Documents to compare with; `others` may be empty.

    Raises
    ------
    CorpusError
        Nothing is protected.
    """

    measured = "difference of cosines"

    def __init__(
        self,
        embed: Embedder,
        protected: Iterable[Document],
        others: Iterable[Document] = (),
        threshold: Threshold = 0.0,
    ) -> None:
        super().__init__(threshold)
        kept, rest = check_documents(protected, origin="protected"), list(others)
        self.embed = embed
        vectors = np.asarray(embed([normalise(d.text) for d in (*kept, *rest)]), dtype=np.float64)
        self._centre = vectors.mean(axis=0)  # (d,)
        directions = self._directions(vectors)
        self._protected, self._others = directions[: len(kept)], directions[len(kept) :]

    def _directions(self, vectors: NDArray[Any]) -> NDArray[np.float64]:
        centred = np.asarray(vectors, dtype=np.float64) - self._centre
        return np.asarray(centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12))

    def _score(self, text: str) -> float:
        [vector] = self._directions(self.embed([normalise(text)]))
        nearest = float((self._protected @ vector).max())
        other = float((self._others @ vector).max()) if len(self._others) else 0.0
        return nearest - other


def hidden_states(model: LanguageModel, *, layer: int = -1, batch_size: int = 64) -> Embedder:
    """Mean hidden states of a causal language model: sentence vectors without another model.

    Parameters
    ----------
    layer:
        0 is the embedding of the tokens, -1 the last layer.

    Returns
    -------
    Embedder
        (texts, hidden size); a text without tokens is a zero vector.
    """
    import torch

    @torch.inference_mode()
    def embed(texts: Sequence[str]) -> NDArray[Any]:
        rows = []
        for start in range(0, len(texts), batch_size):
            batch = model.tokenizer(
                list(texts[start : start + batch_size]), return_tensors="pt", padding=True,
                padding_side="right", truncation=True, add_special_tokens=False,
                max_length=model.model.config.max_position_embeddings,
            ).to(model.device)  # fmt: skip
            mask = batch["attention_mask"][..., None]  # (B, T, 1)
            if not mask.shape[1]:
                rows.append(np.zeros((len(mask), model.model.config.hidden_size)))
                continue
            states = model.model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                output_hidden_states=True,
            ).hidden_states[layer]  # (B, T, d)
            mean = (states * mask).sum(1) / mask.sum(1).clamp(min=1)  # (B, d)
            rows.append(mean.float().cpu().numpy())
        return np.concatenate(rows)

    return embed


def sentence_embeddings(source: str | Path, *, device: str = "auto") -> Embedder:
    """Vectors of a sentence-transformers model, from a folder or by hub id (extra `semantic`).

    Raises
    ------
    ModelError
        sentence-transformers is not installed, or there is no such model.
    """
    from tracealign_lib.lm import resolve_device

    try:
        from sentence_transformers import SentenceTransformer  # type: ignore[import-not-found]
    except ImportError as error:
        raise ModelError(
            "Sentence embeddings need a package that is not installed.",
            given="no module sentence_transformers",
            expected="the extra `semantic`",
            mend="in the book's folder: pip install -e '.[semantic]'; or use matching.hidden_states(model)",
        ) from error
    try:
        model = SentenceTransformer(str(source), device=resolve_device(device))
    except Exception as error:  # the library raises whatever its parts do
        raise ModelError(
            "The sentence-transformers model cannot be loaded.",
            given=f"{source}: {str(error).strip().splitlines()[0] if str(error).strip() else error!r}",
            expected="a folder that SentenceTransformer.save wrote, or a hub id and a connection",
            mend="check the path, or download the model once and pass its folder",
        ) from error
    return lambda texts: np.asarray(model.encode(list(texts), show_progress_bar=False))


# --- conversations -------------------------------------------------------------------------------


class _OfTurns(TextFilter):
    """A filter of conversations that asks another filter; see `TURN`."""

    def __init__(self, inner: CompletionFilter[Any], threshold: Threshold | None = None) -> None:
        super().__init__((inner.group_thresholds or inner.threshold) if threshold is None else threshold)
        self.inner, self.measured = inner, "score of the conversation"

    def _score(self, text: str) -> float:
        return max(float(self.inner.check(part).score) for part in self._parts(text))

    @abstractmethod
    def _parts(self, text: str) -> list[str]:
        """What is asked about, of a conversation."""


class PerTurn(_OfTurns):
    """Each turn on its own; a conversation scores as its highest turn does.

    Parameters
    ----------
    inner:
        Any filter; its thresholds are taken over unless others are given.
    """

    def _parts(self, text: str) -> list[str]:
        return text.split(TURN)


class Joined(_OfTurns):
    """A conversation as one text: what the model has said in all turns so far, joined by spaces.

    Parameters
    ----------
    inner:
        Any filter; its thresholds are taken over unless others are given.
    """

    def _parts(self, text: str) -> list[str]:
        return [" ".join(text.split(TURN))]


def _check_count(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ParameterError(
            f"{name} is not a positive whole number.",
            given=repr(value),
            expected="an int of at least 1",
            mend=f"for example {name}=8",
        )
    return int(value)
