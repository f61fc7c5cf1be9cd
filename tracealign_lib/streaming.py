"""A shield that decides while the text is still being written, and lets nothing risky out.

Reading from left to right, only one thing has to be kept: the *run*, the longest suffix of what was read
that the index holds. A later maximal span can start no earlier than the run does, so everything before
the run is judged for good and may be shown; the run itself is withheld until it ends. A run that cannot
be continued is a maximal span, and is scored as `TraceShield.check` scores it. Where a score can only grow
with the span, the answer is often known sooner: once the run is above the threshold, so is the span.

With windows instead of maximal spans, a window is scored when its last token arrives, and only the
tokens that a window to come could hold are withheld.

Whatever the pieces in which a text arrives, a stream stops if and only if `check` refuses the whole. That
holds for every scorer that reads nothing after the span it scores; those of `bci` do not.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import StoppingCriteria

from tracealign_lib.bci import (
    LongestMatchBCI,
    MaxTokenRisk,
    Membership,
    RawBCI,
    SpanLength,
    candidate_spans,
)
from tracealign_lib.errors import ParameterError
from tracealign_lib.index import Ids, Span
from tracealign_lib.shield import TraceShield, Verdict, encode

GROWING: tuple[type, ...] = (LongestMatchBCI, MaxTokenRisk, Membership, RawBCI, SpanLength)
"""Scorers whose score never falls when a span is extended: sums of surprisals, lengths, maxima."""


class TokenStream:
    """Checks token ids as they arrive. Made by `TraceShield.stream`.

    Attributes
    ----------
    stopped:
        Whether a span above the threshold was met. From then on nothing is read or released.

    Examples
    --------
    >>> stream = shield.stream()
    >>> for token in tokens:
    ...     show(stream.feed([token]))
    >>> show(stream.end())
    """

    def __init__(self, shield: TraceShield, *, group: Hashable = None) -> None:
        self.shield, self.group = shield, group
        self.stopped = False
        self._threshold = shield.threshold_of(group)
        self._growing = isinstance(shield.scorer, GROWING)
        self._ids: list[int] = []
        self._run = 0  # where the longest indexed suffix starts
        self._safe = 0  # tokens that no span to come can hold, all judged
        self._released = 0
        self._ended = False

    def feed(self, ids: Sequence[int] | Ids) -> Ids:
        """Read more tokens; returns those that are now safe to show, shape (k,).

        Raises
        ------
        VocabularyError
            They are not ids of the index's vocabulary.
        ParameterError
            The stream has ended, or the scorer returned something that is not finite.
        """
        _check_open(self._ended)
        self.shield.index.count(ids)  # the index checks ids at its own edge
        for token in np.asarray(ids, dtype=np.int64).tolist():
            if not self.stopped:
                self._read(token)
        return self._release()

    def end(self) -> Ids:
        """Close the text; returns what was still withheld, or nothing if the text is refused."""
        _check_open(self._ended)
        self._ended = True
        if not self.stopped:
            self._close_run(len(self._ids))
        if not self.stopped:
            self._safe = len(self._ids)
        return self._release()

    @property
    def withheld(self) -> Ids:
        """The tokens that were read and not released, shape (k,)."""
        return np.array(self._ids[self._released :], dtype=np.int64)

    @property
    def n_released(self) -> int:
        """How many tokens were released."""
        return self._released

    def verdict(self) -> Verdict:
        """`TraceShield.check` of what was read so far."""
        return self.shield.check(self._ids, group=self.group)

    def _read(self, token: int) -> None:
        count, window = self.shield.index.count, self.shield.window
        self._ids.append(token)
        n = len(self._ids)
        if not count(self._ids[self._run :]):
            self._close_run(n - 1)
            # a suffix of an indexed suffix is indexed too, so the new start can be bisected
            starts = range(self._run + 1, n)
            self._run += 1 + bisect_left(starts, True, key=lambda start: count(self._ids[start:]) > 0)
        reach = max(self.shield.min_length, window or 1)
        reached = n - self._run >= reach
        if reached and window is not None:
            self._judge(n - reach, n)  # earlier windows of the run were judged when they were its last
        elif reached and self._growing:
            self._judge(self._run, n)
        if not self.stopped:
            judged = n - window + 1 if reached and window is not None else self._run
            self._safe = max(self._safe, judged)

    def _close_run(self, end: int) -> None:
        """The run [start, end) is a maximal span; its windows, if they are asked for, are judged already."""
        if self.shield.window is None:
            self._judge(self._run, end)

    def _judge(self, start: int, end: int) -> None:
        """Score tokens [start, end), which the index holds as one span."""
        shield = self.shield
        found = candidate_spans(
            shield.index,
            self._ids[start:end],
            min_length=shield.min_length,
            max_count=shield.max_count,
            window=shield.window,
        )
        spans = [Span(start + span.start, start + span.end, span.count) for span in found]
        scores = shield.score_spans(np.array(self._ids[:end], dtype=np.int64), spans)
        self.stopped |= bool((scores > self._threshold).any())

    def _release(self) -> Ids:
        released = self._ids[self._released : self._safe]
        self._released = self._safe
        return np.array(released, dtype=np.int64)


class TextStream:
    """Checks text as it arrives, in pieces of any size. Made by `TraceShield.stream_text`.

    A word is read once the white space after it has come, because only then are its tokens known. That
    holds for tokenizers that split a text into words before anything else, as nearly all do. Where one
    joins words, the text is read anew when its tokens change: a text that `check` refuses is still
    stopped, but another may be stopped too, for a match that later tokens would have undone.

    Attributes
    ----------
    stopped:
        Whether a span above the threshold was met. From then on nothing is read or released.
    """

    def __init__(self, shield: TraceShield, *, group: Hashable = None) -> None:
        self.shield, self.group = shield, group
        self._tokens = TokenStream(shield, group=group)
        self._read: list[int] = []
        self._text = ""
        self._settled = 0  # characters whose tokens can change no more
        self._released = 0
        self._ended = False

    @property
    def stopped(self) -> bool:
        """Whether a span above the threshold was met."""
        return self._tokens.stopped

    def feed(self, piece: str) -> str:
        """Read more text; returns what is now safe to show.

        Raises
        ------
        ModelError
            The index holds no tokenizer.
        ParameterError
            The piece is not a string, the stream has ended, or the scorer returned something that is not
            finite.
        """
        _check_open(self._ended)
        if not isinstance(piece, str):
            raise ParameterError(
                "The piece is not text.",
                given=type(piece).__name__,
                expected="str",
                mend="use shield.stream() for token ids",
            )
        if self.stopped:
            return ""
        self._text += piece
        settled = _settled(self._text)
        if settled <= self._settled:
            return ""
        self._settled = settled
        ids, offsets = encode(self.shield.index, self._text)
        self._read_tokens(ids[: int((offsets[:, 1] <= settled).sum())])
        safe = self._tokens.n_released
        # a character that falls into two tokens is shown with the second
        edges = [*offsets[safe - 1 : safe, 1].tolist(), *offsets[safe : safe + 1, 0].tolist()]
        return self._release(min(edges) if safe else 0)

    def end(self) -> str:
        """Close the text; returns what was still withheld, or nothing if the text is refused."""
        _check_open(self._ended)
        self._ended = True
        if not self.stopped:
            self._read_tokens(encode(self.shield.index, self._text)[0])
            self._tokens.end()
        return "" if self.stopped else self._release(len(self._text))

    @property
    def withheld(self) -> str:
        """The text that was read and not released."""
        return self._text[self._released :]

    def verdict(self) -> Verdict:
        """`TraceShield.check` of what was read so far."""
        return self.shield.check(self._text, group=self.group)

    def _read_tokens(self, ids: Ids) -> None:
        tokens = ids.tolist()
        if tokens[: len(self._read)] != self._read:
            self._tokens, self._read = TokenStream(self.shield, group=self.group), []
        self._tokens.feed(tokens[len(self._read) :])
        self._read = tokens

    def _release(self, upto: int) -> str:
        released = self._text[self._released : upto]
        self._released = max(self._released, upto)
        return released


class ShieldStop(StoppingCriteria):  # type: ignore[misc]
    """Stops each row of a transformers `generate` call as soon as its new tokens hold a risky span.

    For greedy decoding and sampling. Under beams it raises an error in the second step: a stopped beam
    counts as a finished answer there, and may be returned. `TraceShield.wrap(..., stop_early=True)` uses
    it, refuses beams before anything is generated, and puts a refusal in the place of what was stopped.

    An id that the tokenizer does not have, as models with padded embeddings can emit, matches nothing.

    Parameters
    ----------
    tokenizer:
        The model's; it must be the one of the index.
    prompt_length:
        Columns of the prompt, `input_ids.shape[1]`. Where each step adds one token it need not be told; under
        assisted decoding and prompt lookup it must, since the first step may add several.

    Attributes
    ----------
    streams:
        One for each row, in the order of the batch; after an id that matches nothing, a new one.

    Raises
    ------
    VocabularyError
        The tokenizer is not the index's.
    ParameterError
        On the second step: rows do not continue the rows before them, as in a beam search or when one
        criterion serves two calls.
    """

    def __init__(self, shield: TraceShield, tokenizer: Any, *, prompt_length: int | None = None) -> None:
        shield.index.check_tokenizer(tokenizer)
        self.shield, self.prompt_length = shield, prompt_length
        self.streams: list[TokenStream] = []
        self._seen: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Whether each row shall stop, shape (B,), after `input_ids` (B, T)."""
        if self._seen is None:
            self._seen = input_ids[:, : -1 if self.prompt_length is None else self.prompt_length]
            self.streams = [self.shield.stream() for _ in range(len(input_ids))]
        read = self._seen.shape[1]
        if self._seen.shape[0] != len(input_ids) or not torch.equal(input_ids[:, :read], self._seen):
            raise ParameterError(
                "The rows do not go on where they were.",
                given="another batch, or a beam search",
                expected="one call of generate, greedy or sampling, for one ShieldStop",
                mend="make a new ShieldStop for each call; with beams, check what comes out (shield.wrap)",
            )
        for row, tokens in enumerate(input_ids[:, read:].tolist()):
            self._feed(row, tokens)
        self._seen = input_ids
        return torch.tensor([stream.stopped for stream in self.streams], device=input_ids.device)

    def _feed(self, row: int, tokens: list[int]) -> None:
        for token in tokens:
            if self.streams[row].stopped:
                return
            if token < self.shield.index.vocab_size:
                self.streams[row].feed([token])
                continue
            self.streams[row].end()  # no span goes on across an id that the index does not know
            if not self.streams[row].stopped:
                self.streams[row] = self.shield.stream()


def _settled(text: str) -> int:
    """Characters up to the last word that white space follows."""
    if text[-1:].isspace():
        return len(text.rstrip())
    words = text.rsplit(None, 1)
    return len(words[0]) if len(words) == 2 else 0


def _check_open(ended: bool) -> None:
    if ended:
        raise ParameterError(
            "The stream has ended.",
            given="another call after end()",
            expected="one end(), after the last piece",
            mend="make a new stream for a new text",
        )
