"""Which training documents taught this completion? Rankers, and how they are graded.

The world knows the answer: every planted item lists the documents that hold it. So a completion that
drifted can be handed to several rankers, each answers with documents and scores, and the answers are
graded against planted truth. Two rankers read the index: the paper's filter (documents behind maximal
matching spans that are rare in the corpus, arXiv 2508.02063) and the cover ranking (documents that
share runs of tokens with the completion, however often those runs occur). Three rivals from text
retrieval, which know nothing of exact matches, keep them honest: TF-IDF, BM25, and BM25 on word bigrams.

Every ranker reads the same completion text. A document that scores 0 is not part of an answer.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import bm25s
import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer

from tracealign_lib.documents import Document, check_documents
from tracealign_lib.errors import CorpusError, ParameterError
from tracealign_lib.progress import progress
from tracealign_lib.stats import Interval, clustered_rate

if TYPE_CHECKING:
    from tracealign_lib.index import TraceIndex

Ranking = list[tuple[str, float]]

SHARE = 0.8
METRICS = ("precision", "recall", "r_precision", "reciprocal_rank", "average_precision", "returned", "empty")

_WORD = re.compile(r"\w+")
_BATCH = 64
# Scores that are equal on paper may differ in the last bits when they were summed in another order.
_TIE = 1e-9


# --- rankers -------------------------------------------------------------------------------------


class Ranker(Protocol):
    """Ranks training documents as sources of a text.

    Derive from it to add a ranker: `rank` is all that is needed.

    Attributes
    ----------
    share:
        Which part of the ranking is the *answer*, whose precision and recall are graded: documents
        that score at least `share` of the best score. 0 for a ranker that already returns an answer
        only; a ranker that gives nearly every document some score needs a cut.
    """

    share: float = 0.0

    def rank(self, text: str) -> Ranking:
        """Document ids with their scores, best first; documents that score 0 are left out."""
        ...

    def rank_many(self, texts: Sequence[str]) -> Iterator[Ranking]:
        """One ranking per text, in order, as they are made; shows a progress bar."""
        for text in progress(texts, description="Ranking sources", unit="text"):
            yield self.rank(text)


class CoverRanker(Ranker):
    """Documents ranked by the surprisal (nats) of the completion's tokens that they cover.

    A document covers a token of the completion if some run of `min_length` consecutive tokens around
    it occurs in the document. How often the run occurs elsewhere plays no part.
    """

    def __init__(self, index: TraceIndex, min_length: int = 8, *, share: float = SHARE) -> None:
        _check_positive(min_length, "min_length")
        _check_share(share)
        self.index, self.min_length, self.share = index, min_length, share

    def rank(self, text: str) -> Ranking:
        """See `Ranker.rank`; scores in nats."""
        ids = self.index.encode(text)  # (tokens,)
        sources = self.index.sources(ids, min_length=self.min_length, limit=self.index.n_documents)
        return [(source.document_id, source.score) for source in sources if source.score > 0]


class MaximalSpanRanker(Ranker):
    """Documents that hold a maximal matching span of the completion, rare spans only.

    The spans are those of at least `min_length` tokens that occur at most `max_count` times in the
    corpus (None: however often). A document's score is the summed surprisal (nats) of the spans that it
    holds, each span once; tokens where two spans overlap count for both. With `max_count=3` this is the
    filter M(q) <= 3 that the paper reports.
    """

    def __init__(
        self, index: TraceIndex, min_length: int = 8, max_count: int | None = 3, *, share: float = 0.0
    ) -> None:
        _check_positive(min_length, "min_length")
        if max_count is not None:
            _check_positive(max_count, "max_count")
        _check_share(share)
        self.index, self.min_length, self.max_count, self.share = index, min_length, max_count, share

    def rank(self, text: str) -> Ranking:
        """See `Ranker.rank`; scores in nats."""
        return _rank_by_spans(_held_spans(self.index, text, self.min_length, self.max_count))


class TfidfRanker(Ranker):
    """Cosine similarity of TF-IDF word vectors (scikit-learn's defaults, lower-cased words)."""

    def __init__(self, documents: Iterable[Document], *, share: float = SHARE) -> None:
        _check_share(share)
        corpus = check_documents(documents)
        _words_of(corpus, ngram=1)
        self.share = share
        self._ids = [document.id for document in corpus]
        self._vectorizer = TfidfVectorizer(analyzer=_words)
        self._matrix = self._vectorizer.fit_transform([d.text for d in corpus])  # (documents, words)

    def rank(self, text: str) -> Ranking:
        """See `Ranker.rank`; scores between 0 and 1."""
        [ranking] = self.rank_many([text])
        return ranking

    def rank_many(self, texts: Sequence[str]) -> Iterator[Ranking]:
        """See `Ranker.rank_many`; one sparse product per batch of texts."""
        with progress(description="Ranking sources", total=len(texts), unit="text") as bar:
            for start in range(0, len(texts), _BATCH):
                queries = self._vectorizer.transform(texts[start : start + _BATCH])  # (batch, words)
                for scores in (queries @ self._matrix.T).toarray():  # (documents,)
                    yield _positive(self._ids, scores)
                    bar.update()


class Bm25Ranker(Ranker):
    """BM25 (bm25s, Lucene's variant, k1 = 1.5, b = 0.75) on lower-cased words or word bigrams.

    A word that the completion repeats counts each time. With `ngram=2` word order enters, so a retelling
    in the same words and another order no longer matches as well as the original.

    References
    ----------
    Robertson and Zaragoza, "The probabilistic relevance framework" (2009); Lù, arXiv 2407.03618.
    """

    def __init__(
        self, documents: Iterable[Document], ngram: Literal[1, 2] = 1, *, share: float = SHARE
    ) -> None:
        if ngram not in (1, 2):
            raise ParameterError(
                "The n-gram length is out of range.",
                given=repr(ngram),
                expected="1 (words) or 2 (word bigrams)",
                mend="choose one of the two",
            )
        _check_share(share)
        corpus = check_documents(documents)
        self.ngram, self.share = ngram, share
        self._ids = [document.id for document in corpus]
        self._bm25 = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
        self._bm25.index(_words_of(corpus, ngram=ngram), show_progress=False)

    def rank(self, text: str) -> Ranking:
        """See `Ranker.rank`; scores without a unit."""
        known = self._bm25.get_tokens_ids(_ngrams(_words(text), self.ngram))
        return _positive(self._ids, self._bm25.get_scores_from_ids(known))


# --- grading -------------------------------------------------------------------------------------


class Grade(NamedTuple):
    """How well one ranking names the true sources; R is the number of true sources.

    Attributes
    ----------
    precision:
        True sources among the answer, over the size of the answer; NaN (missing) if it is empty.
        The answer is the documents that score at least `share` of the best score.
    recall:
        True sources among the answer, over R.
    r_precision:
        True sources among the first R of the whole ranking, over R.
    reciprocal_rank:
        1 / rank of the first true source; 0 if there is none. Its mean is the MRR.
    average_precision:
        Mean over the R true sources of the precision at their rank; 0 for one that is not ranked.
    returned:
        Number of documents in the answer; 0 only for an empty ranking.
    """

    precision: float
    recall: float
    r_precision: float
    reciprocal_rank: float
    average_precision: float
    returned: int


class Case(NamedTuple):
    """One completion to attribute, with its truth.

    Attributes
    ----------
    text:
        The completion alone, without its prompt.
    item:
        Id of the planted item that the completion *leaks*, which may not be the one asked for.
    copies:
        How often the item was planted.
    truths:
        Ids of the true sources under each definition, at least one for each: "strict" (planted copies),
        "near" (those and near-copies), "full" (every document that holds all the leaked steps).
    """

    text: str
    item: str
    copies: int
    truths: Mapping[str, frozenset[str]]


def grade(
    ranking: Sequence[tuple[str, float]],
    relevant: frozenset[str],
    *,
    seed: int | Sequence[int],
    share: float = 0.0,
) -> Grade:
    """Grade one ranking against the true sources; `Grade` defines the measures.

    Documents that tie are shuffled first, by a permutation that depends on `seed` and on nothing else:
    planted copies stand next to each other in the corpus, so corpus order would flatter any method with
    many ties. An empty ranking has recall, R-precision, reciprocal rank and average precision 0, and no
    precision: nothing was claimed, so nothing claimed was wrong.

    Parameters
    ----------
    ranking:
        Pairs of document id and positive score; in any order.
    relevant:
        Ids of the true sources, at least one.
    share:
        Documents that score at least this share of the best score are the answer; 0: all.

    Raises
    ------
    ParameterError
        There is no true source, a document is ranked twice, a score is not positive and finite, or
        `share` is not between 0 and 1.

    References
    ----------
    Manning, Raghavan and Schütze, *Introduction to Information Retrieval* (2008), chapter 8.
    """
    _check_share(share)
    _check_truth(relevant)
    _check_ranking(ranking)
    return _grade(_shuffle_ties(ranking, seed), relevant, share)


def grade_many(rankers: Mapping[str, Ranker], cases: Sequence[Case], *, seed: int = 0) -> pd.DataFrame:
    """Grade every ranker on every case under every definition of truth.

    Returns
    -------
    DataFrame
        One row per method, case and truth: `method`, `case` (position in `cases`), `item`, `copies`,
        `truth`, the fields of `Grade`, and `empty` (the ranking named no document). Each ranker's own
        `share` defines its answer.
    """
    _check_cases(cases)
    rows: list[dict[str, Any]] = []
    for method, ranker in rankers.items():
        rankings = ranker.rank_many([case.text for case in cases])
        for number, (case, ranking) in enumerate(zip(cases, rankings, strict=True)):
            _check_ranking(ranking)
            rows += _rows({"method": method}, number, case, ranking, ranker.share, seed)
    return pd.DataFrame(rows)


def sweep(
    index: TraceIndex,
    cases: Sequence[Case],
    min_lengths: Sequence[int],
    max_counts: Sequence[int | None],
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """Grade `MaximalSpanRanker` over a grid of shortest length and largest count.

    Spans are computed once per text and filtered afterwards, which gives the same rankings as one
    ranker per cell: both settings only drop spans, they change none.

    Returns
    -------
    DataFrame
        As `grade_many`, with `method` "maximal spans" and the columns `min_length` and `max_count`
        (infinity where there is no filter) behind it.
    """
    _check_cases(cases)
    _check_grid(min_lengths, max_counts)
    limits = [math.inf if count is None else count for count in max_counts]
    rarest = None if math.inf in limits else int(max(limits))
    rows: list[dict[str, Any]] = []
    for number, case in enumerate(progress(cases, description="Sweeping span filters", unit="text")):
        held = _held_spans(index, case.text, min(min_lengths), rarest)
        for min_length in min_lengths:
            for limit in limits:
                kept = [span for span in held if span.length >= min_length and span.occurrences <= limit]
                cell = {"method": "maximal spans", "min_length": min_length, "max_count": float(limit)}
                rows += _rows(cell, number, case, _rank_by_spans(kept), 0.0, seed)
    return pd.DataFrame(rows)


def summarise(
    frame: pd.DataFrame,
    by: Sequence[str] = ("method", "truth"),
    *,
    clusters: Sequence[str] = ("item",),
    seed: int = 0,
) -> pd.DataFrame:
    """Means with bootstrap intervals clustered by planted item.

    Parameters
    ----------
    frame:
        From `grade_many` or `sweep`.
    by:
        Columns to keep apart.
    clusters:
        Columns whose combination is the unit that is drawn; add the column of the world's seed when
        frames of several worlds were joined, since their items share ids.

    Returns
    -------
    DataFrame
        One row per group and metric: the columns of `by`, `metric`, `estimate`, `low`, `high`, `n`
        (completions), `clusters` (planted items) and `text` (the interval as it is printed). A metric
        that is undefined for some completions (the precision of an empty answer) is averaged over the
        others, and `n` says how many they were; the metric "empty" is the share of empty answers.

    Raises
    ------
    ParameterError
        A column is missing.
    """
    _check_columns(frame, [*by, *clusters, *METRICS])
    rows: list[dict[str, Any]] = []
    for key, group in frame.groupby(list(by), sort=False, dropna=False):
        for metric in METRICS:
            defined = group[group[metric].notna()]
            labels = list(defined[list(clusters)].itertuples(index=False, name=None))
            interval = _interval(defined[metric].to_numpy(dtype=np.float64), labels, seed)
            counts = {"clusters": len(set(labels)), "text": str(interval)}
            rows.append({**dict(zip(by, key, strict=True)), "metric": metric, **interval._asdict(), **counts})
    return pd.DataFrame(rows)


# --- helpers -------------------------------------------------------------------------------------


class _HeldSpan(NamedTuple):
    """A maximal matching span: tokens, occurrences in the corpus, surprisal (nats), documents."""

    length: int
    occurrences: int
    surprisal: float
    holders: tuple[str, ...]


def _held_spans(index: TraceIndex, text: str, min_length: int, max_count: int | None) -> list[_HeldSpan]:
    ids = index.encode(text)  # (tokens,)
    held = []
    for start, end, count in index.spans(ids, min_length=min_length, max_count=max_count):
        found = index.locate(ids[start:end], limit=count)
        holders = tuple(dict.fromkeys(occurrence.document_id for occurrence in found))
        surprisal = float(index.surprisal[ids[start:end]].sum())
        held.append(_HeldSpan(end - start, count, surprisal, holders))
    return held


def _rank_by_spans(spans: Iterable[_HeldSpan]) -> Ranking:
    scores: dict[str, float] = {}
    for span in spans:
        for document_id in span.holders:
            scores[document_id] = scores.get(document_id, 0.0) + span.surprisal
    return sorted(scores.items(), key=lambda pair: -pair[1])


def _positive(ids: Sequence[str], scores: np.ndarray[Any, Any]) -> Ranking:
    order = np.argsort(-scores, kind="stable")  # (documents,)
    return [(ids[i], float(scores[i])) for i in order[scores[order] > 0]]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _ngrams(words: list[str], ngram: int) -> list[str]:
    return words if ngram == 1 else [" ".join(pair) for pair in itertools.pairwise(words)]


def _words_of(corpus: Sequence[Document], *, ngram: int) -> list[list[str]]:
    units = [_ngrams(_words(document.text), ngram) for document in corpus]
    if not any(units):
        raise CorpusError(
            "No document has a word to rank by.",
            given=f"{len(corpus)} documents",
            expected=f"at least one document of {ngram} or more words",
            mend="check that the texts were read",
        )
    return units


def _shuffle_ties(ranking: Sequence[tuple[str, float]], seed: int | Sequence[int]) -> Ranking:
    """Best first; ties in an order that depends on the seed, and not on the order they came in."""
    if not ranking:
        return []
    ordered = sorted(ranking, key=lambda pair: (-pair[1], pair[0]))
    scores = np.asarray([score for _, score in ordered])  # (documents,), falling
    groups = np.cumsum(-np.diff(scores, prepend=scores[0]) > _TIE * scores[0])
    shuffled = np.random.default_rng(seed).permutation(len(ordered))
    return [ordered[i] for i in np.lexsort((shuffled, groups))]


def _grade(ordered: Ranking, relevant: frozenset[str], share: float) -> Grade:
    if not ordered:
        return Grade(math.nan, 0.0, 0.0, 0.0, 0.0, 0)
    true = np.asarray([document_id in relevant for document_id, _ in ordered])  # (documents,)
    scores = np.asarray([score for _, score in ordered])
    answer = scores >= share * scores.max() * (1 - _TIE)
    found, returned, total = int(true[answer].sum()), int(answer.sum()), len(relevant)
    ranks = np.flatnonzero(true) + 1  # ranks of the true sources, best first
    return Grade(
        precision=found / returned,
        recall=found / total,
        r_precision=int((ranks <= total).sum()) / total,
        reciprocal_rank=1 / int(ranks[0]) if len(ranks) else 0.0,
        average_precision=float((np.arange(1, len(ranks) + 1) / ranks).sum()) / total,
        returned=returned,
    )


def _rows(
    cell: Mapping[str, Any], number: int, case: Case, ranking: Ranking, share: float, seed: int
) -> list[dict[str, Any]]:
    # The case's number enters the seed, so that ties fall differently from one completion to the next;
    # all methods and truths of a case share it, so that they are compared under the same luck.
    ordered = _shuffle_ties(ranking, (seed, number))
    known = {**cell, "case": number, "item": case.item, "copies": case.copies}
    return [
        {**known, "truth": truth, **_grade(ordered, relevant, share)._asdict(), "empty": not ordered}
        for truth, relevant in case.truths.items()
    ]


def _interval(values: np.ndarray[Any, Any], labels: list[tuple[Any, ...]], seed: int) -> Interval:
    if not len(values):
        return Interval(math.nan, math.nan, math.nan, 0)
    return clustered_rate(values, labels, seed=seed)


# --- checks --------------------------------------------------------------------------------------


def _check_positive(value: object, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ParameterError(
            f"{name} is out of range.",
            given=repr(value),
            expected="a whole number, at least 1",
            mend=f"pass another {name}",
        )


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise ParameterError(
            "share is out of range.",
            given=share,
            expected="a number from 0 (every ranked document) to 1 (only those that tie with the best)",
            mend="write 80 % as 0.8",
        )


def _check_truth(relevant: frozenset[str]) -> None:
    if not relevant:
        raise ParameterError(
            "There is no true source to find.",
            given=relevant,
            expected="at least one document id",
            mend="grade only completions whose sources are known",
        )


def _check_ranking(ranking: Sequence[tuple[str, float]]) -> None:
    scores = np.asarray([score for _, score in ranking], dtype=np.float64)
    if len({document_id for document_id, _ in ranking}) < len(ranking):
        problem = "A document is ranked twice."
    elif not (np.isfinite(scores) & (scores > 0)).all():
        problem = "A score is not positive and finite."
    else:
        return
    raise ParameterError(
        problem,
        given=f"a ranking of {len(ranking)} documents that starts {list(ranking[:3])}",
        expected="each document once, with a score above 0",
        mend="leave documents that score 0 out of the ranking",
    )


def _check_cases(cases: Sequence[Case]) -> None:
    if not cases:
        raise ParameterError(
            "There is nothing to grade.",
            given="no case",
            expected="at least one completion with its true sources",
            mend="check the filter that chose the completions",
        )
    for case in cases:
        _check_truth(min(case.truths.values(), key=len, default=frozenset()))


def _check_grid(min_lengths: Sequence[int], max_counts: Sequence[int | None]) -> None:
    if not min_lengths or not max_counts:
        raise ParameterError(
            "The grid is empty.",
            given=f"min_lengths={list(min_lengths)}, max_counts={list(max_counts)}",
            expected="at least one value for each",
            mend="pass max_counts=[None] for no filter on the count",
        )
    for length in min_lengths:
        _check_positive(length, "min_length")
    for count in max_counts:
        if count is not None:
            _check_positive(count, "max_count")


def _check_columns(frame: pd.DataFrame, columns: Sequence[str]) -> None:
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise ParameterError(
            "The frame lacks a column.",
            given=f"missing {missing}; there are {list(frame.columns)}",
            expected="a frame from grade_many or sweep",
            mend="name columns of the frame in `by` and `clusters`",
        )
