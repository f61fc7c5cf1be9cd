"""The order-k add-alpha model: exact counts, exact probabilities, exact sampling.

On this model the theorems of `bound` can be computed instead of estimated: the probability of every
span, the expected number of windows in a sampled text, and samples from the very same distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike, NDArray

from tracealign_lib.errors import ParameterError, VocabularyError
from tracealign_lib.queries import check_ids, check_integer

MAX_STATES = 5_000_000

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]


class NGramModel:
    """p(w | h) = (c(h, w) + alpha) / (c(h) + alpha V), where h are the `order` tokens before w.

    A document is read as if `order` start marks stood before it; no gram crosses two documents. A
    context shorter than `order` is taken to stand at the start of a document.

    Parameters
    ----------
    documents:
        Token ids, one sequence per document; with none, the model is uniform.
    vocab_size, order, alpha:
        V >= 2, k >= 0, and the pseudo-count alpha > 0 of every token.
    across_documents:
        Count over the documents as one stream, as packed training does. It breaks the
        assumption of T1 (`bound`) that a planted copy adds only its own grams.

    Raises
    ------
    ParameterError
        A setting is out of range, or the grams do not fit into 63 bits.
    VocabularyError
        A token lies outside the vocabulary.
    """

    def __init__(
        self,
        documents: Sequence[ArrayLike],
        *,
        vocab_size: int,
        order: int,
        alpha: float,
        across_documents: bool = False,
    ) -> None:
        self.vocab_size = check_integer(vocab_size, "vocab_size", at_least=2)
        self.order = check_integer(order, "order", at_least=0)
        self.alpha = check_positive(alpha, "alpha, the pseudo-count,")
        self._base = self.vocab_size + 1  # the last digit is the start mark
        if (self.order + 1) * math.log2(self._base) >= 63:
            raise ParameterError(
                "Grams of this order do not fit into 63 bits.",
                given=f"order={self.order}, vocab_size={self.vocab_size}",
                expected=f"order of at most {int(63 / math.log2(self._base)) - 1} for this vocabulary",
                mend="lower the order",
            )
        texts = [check_ids(ids, self.vocab_size, "document") for ids in documents]
        texts = [np.concatenate(texts)] if across_documents and texts else texts
        marks: Ids = np.full(self.order, self.vocab_size, dtype=np.int64)
        stream = np.concatenate([part for ids in texts for part in (marks, ids)] or [marks])
        keys = self._keys(stream) if len(stream) > self.order else np.empty(0, dtype=np.int64)
        keys = keys[keys % self._base != self.vocab_size]  # a start mark is never predicted
        self._grams, self._gram_counts = np.unique(keys, return_counts=True)
        self._contexts, self._context_counts = np.unique(keys // self._base, return_counts=True)
        self._cumulative = np.concatenate([[0], np.cumsum(self._gram_counts)])

    def gram_counts(self, span: ArrayLike, context: ArrayLike = ()) -> Ids:
        """c(h_j, t_j): how often each gram of the span was counted.  # (l,)"""
        rows = check_rows(check_ids(span, self.vocab_size, "span")[None], self.vocab_size)
        return _look_up(self._grams, self._gram_counts, self._span_keys(rows, context)[0])

    def token_log_probs(
        self, spans: ArrayLike, context: ArrayLike = (), *, temperature: float = 1.0
    ) -> Floats:
        """log p(t_j | context, t_1 .. t_(j-1)) in nats for every span.  # (n, l) -> (n, l)

        A `temperature` other than 1 renormalises p^(1 / temperature) over the vocabulary.
        """
        temperature = check_positive(temperature, "temperature")
        rows = check_rows(spans, self.vocab_size)
        keys = self._span_keys(rows, context)  # (n, l)
        if temperature == 1.0:
            return self._log_probs(keys)
        everything = np.arange(self.vocab_size) + (keys - rows)[..., None]  # (n, l, V)
        logits = self._log_probs(everything) / temperature
        chosen = np.take_along_axis(logits, rows[..., None], axis=-1)[..., 0]
        return np.asarray(chosen - np.logaddexp.reduce(logits, axis=-1), dtype=np.float64)

    def span_log_prob(self, span: ArrayLike, context: ArrayLike = (), *, temperature: float = 1.0) -> float:
        """log P(span | context) in nats, exactly; `ParameterError` for an empty span."""
        ids = check_ids(span, self.vocab_size, "span")
        return float(self.token_log_probs(ids[None], context, temperature=temperature).sum())

    def sample(self, n: int, steps: int, context: ArrayLike = (), *, seed: int = 0) -> Ids:
        """`n` independent continuations of `steps` tokens.  # (n, steps)

        Each token is drawn from the counts with probability c(h) / (c(h) + alpha V), else uniformly.
        """
        n, steps = check_integer(n, "n", at_least=1), check_integer(steps, "steps", at_least=1)
        rng = np.random.default_rng(seed)
        drawn = np.empty((n, steps), dtype=np.int64)
        keep = self._base ** max(self.order - 1, 0)
        start = int(_digits(self._context(context)[None], self._base)[0])
        state = np.full(n, start, dtype=np.int64)
        for step in range(steps):
            counts = _look_up(self._contexts, self._context_counts, state)  # (n,)
            ticket = rng.random(n) * (counts + self.alpha * self.vocab_size)
            first = self._cumulative[np.searchsorted(self._grams, state * self._base)]
            place = np.searchsorted(self._cumulative, first + np.floor(ticket), side="right") - 1
            tokens = rng.integers(self.vocab_size, size=n)
            counted = ticket < counts
            tokens[counted] = self._grams[place[counted]] % self._base
            drawn[:, step] = tokens
            state = (state % keep) * self._base + tokens if self.order else state
        return drawn

    def expected_windows(self, spans: ArrayLike, steps: int, context: ArrayLike = ()) -> Floats:
        """Expected number of times each span occurs in `steps` sampled tokens, exactly.  # (R,)

        With l >= k, P(span at i) = P(the k tokens from i on are t_1 .. t_k) P(t_(k+1) .. t_l | those);
        the first factor is carried forward over all contexts. `bound.union_bound`
        sums the result for T0.

        Raises
        ------
        ParameterError
            The spans are shorter than the order or longer than `steps`, or the contexts too many.
        """
        rows = check_rows(spans, self.vocab_size)
        length, steps = rows.shape[1], check_integer(steps, "steps", at_least=1)
        states = self._base**self.order
        if not self.order <= length <= steps or states > MAX_STATES:
            raise ParameterError(
                "Expected windows cannot be computed exactly.",
                given=f"spans of {length} tokens, {steps} steps, order {self.order}, {states} contexts",
                expected=f"order <= length <= steps, and at most {MAX_STATES} contexts",
                mend="lower the order, or count windows in samples",
            )
        counts = _look_up(self._contexts, self._context_counts, np.arange(states))
        weight: Floats = np.asarray(
            1.0 / (counts + self.alpha * self.vocab_size), dtype=np.float64
        )  # (states,)
        present: Floats = np.zeros(states, dtype=np.float64)
        present[_digits(self._context(context)[None], self._base)] = 1.0
        total: Floats = np.zeros(states)
        for step in range(steps - length + self.order + 1):
            if step >= self.order:
                total += present
            present = self._advance(present, weight)
        heads = total[_digits(rows[:, : self.order], self._base)]  # (R,)
        tails: Floats = np.zeros(len(rows))
        if length > self.order:
            tails = self._log_probs(self._keys(rows)).sum(axis=1)
        return np.asarray(heads * np.exp(tails), dtype=np.float64)

    def _advance(self, present: Floats, weight: Floats) -> Floats:
        """Distribution over contexts after one more token."""
        if self.order == 0:
            return present
        scaled = present * weight
        counted = scaled[self._grams // self._base] * self._gram_counts
        after = np.bincount(self._grams % len(present), weights=counted, minlength=len(present))
        smoothed = self.alpha * scaled.reshape(self._base, -1).sum(axis=0)  # (states / base,)
        after.reshape(-1, self._base)[:, : self.vocab_size] += smoothed[:, None]
        return np.asarray(after, dtype=np.float64)

    def _log_probs(self, keys: Ids) -> Floats:
        grams = _look_up(self._grams, self._gram_counts, keys)
        contexts = _look_up(self._contexts, self._context_counts, keys // self._base)
        return np.asarray(
            np.log(grams + self.alpha) - np.log(contexts + self.alpha * self.vocab_size), dtype=np.float64
        )

    def _context(self, context: ArrayLike) -> Ids:
        """The last `order` tokens, start marks where there are fewer.  # (order,)"""
        ids = check_ids(context, self.vocab_size, "context")
        marks: Ids = np.full(self.order, self.vocab_size, dtype=np.int64)
        return np.concatenate([marks, ids])[len(ids) :]

    def _span_keys(self, rows: Ids, context: ArrayLike) -> Ids:
        before = np.broadcast_to(self._context(context), (len(rows), self.order))
        return self._keys(np.concatenate([before, rows], axis=1))

    def _keys(self, stream: Ids) -> Ids:
        """Every window of `order` + 1 tokens as one integer.  # (..., T) -> (..., T - order)"""
        return _digits(sliding_window_view(stream, self.order + 1, axis=-1), self._base)


def _digits(windows: NDArray[Any], base: int) -> Ids:
    """Each row read as a number in `base`, its last entry the units.  # (..., d) -> (...)"""
    powers = base ** np.arange(windows.shape[-1] - 1, -1, -1, dtype=np.int64)
    return np.asarray(windows @ powers, dtype=np.int64)


def _look_up(keys: Ids, counts: Ids, wanted: Ids) -> Ids:
    """The count of each wanted key, 0 where it is not among the sorted keys."""
    if not len(keys):
        return np.zeros(wanted.shape, dtype=np.int64)
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, counts[places], 0)


# --- checks of input, also those of a bound ------------------------------------------------------


def check_positive(value: float, name: str) -> float:
    """`value` as a float; `ParameterError` with its `name` unless it is finite and above 0."""
    if not (isinstance(value, int | float | np.floating) and 0 < value < math.inf):
        raise ParameterError(
            f"{name} is not positive.", given=repr(value), expected="a finite number above 0", mend="raise it"
        )
    return float(value)


def check_rows(ids: ArrayLike, vocab_size: int) -> Ids:
    """Token ids as (n, T) int64, n and T at least 1; `ParameterError` or, out of range, `VocabularyError`."""
    array = np.asarray(ids)
    if array.ndim != 2 or array.dtype.kind not in "iu" or not array.size:
        raise ParameterError(
            "Spans are not a table of token ids.",
            given=f"shape {array.shape}, dtype {array.dtype}",
            expected="integers of shape (n, T), n and T at least 1",
            mend="pass spans of one length together",
        )
    return _in_vocabulary(array, vocab_size, "table of spans")


def _in_vocabulary(array: NDArray[Any], vocab_size: int, what: str) -> Ids:
    if array.size and (array.min() < 0 or array.max() >= vocab_size):
        raise VocabularyError(
            f"The {what} has an id outside the vocabulary.",
            given=f"ids from {array.min()} to {array.max()}",
            expected=f"ids from 0 to {vocab_size - 1}",
            mend="encode with the tokenizer of this model",
        )
    return array.astype(np.int64)
