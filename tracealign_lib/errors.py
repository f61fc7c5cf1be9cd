"""Errors that say what was given, what was expected, and how to mend it.

Input is checked once, where it enters the library. Every such error is a `TraceAlignError`, so a
caller (the command line, a notebook, a script) can catch one class and print a message that helps.
"""

from __future__ import annotations


class TraceAlignError(Exception):
    """Base of every error that the library raises on purpose.

    Parameters
    ----------
    problem:
        One sentence: what went wrong.
    given, expected, mend:
        What the caller passed, what would have been accepted, and what to do next.
    """

    def __init__(
        self,
        problem: str,
        *,
        given: object = None,
        expected: str | None = None,
        mend: str | None = None,
    ) -> None:
        self.problem = problem
        self.given = given
        self.expected = expected
        self.mend = mend
        lines = [problem]
        if given is not None:
            lines.append(f"  given:    {given}")
        if expected is not None:
            lines.append(f"  expected: {expected}")
        if mend is not None:
            lines.append(f"  to mend:  {mend}")
        super().__init__("\n".join(lines))


class ParameterError(TraceAlignError, ValueError):
    """A parameter or profile is unknown, of the wrong type, or out of range."""


class CorpusError(TraceAlignError, ValueError):
    """A corpus cannot be read: missing, empty, not UTF-8, malformed, or with duplicate ids."""


class VocabularyError(TraceAlignError, ValueError):
    """Token ids lie outside the vocabulary, or two tokenizers differ."""


class IndexFormatError(TraceAlignError):
    """A folder is not an index of this version, or it is damaged."""


class BusyError(TraceAlignError):
    """Another process is writing what was asked for."""


class StorageError(TraceAlignError, OSError):
    """What was built cannot be written: the disk is full, must not be written to, or fails."""


class CacheError(TraceAlignError):
    """A cached stage is damaged, foreign, or cannot be written."""


class ModelError(TraceAlignError):
    """A model or tokenizer cannot be loaded or used."""


class ResultsError(TraceAlignError, ValueError):
    """A results file is missing, of another version, or holds less than it says."""
