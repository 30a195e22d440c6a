"""Errors that a user can correct: one line each, with an exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ImpqError(Exception):
    """An error that the user can correct. The message is one line: what happened, and what to do. Exit code 1."""

    exit_code = 1


class UsageError(ImpqError):
    """A wrong word in the command line or in the configuration file. Exit code 2."""

    exit_code = 2


class InvalidArrays(ImpqError):
    """Measurements, an estimate or a plan with arrays of a wrong shape, type or range."""


class Terminated(KeyboardInterrupt):
    """SIGTERM as an exception, so that the run is marked as KILLED."""


def one_line(error: BaseException, limit: int = 200) -> str:
    """The message of an exception on one line of at most ``limit`` characters.

    The message of an ``ImpqError`` says enough and stands alone; other messages follow the name of their class.
    """
    text = " ".join(str(error).split())
    if not (isinstance(error, ImpqError) and text):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= limit else f"{text[:limit - 3]}..."


def nearest(word: str, names: Iterable[str]) -> str:
    """A hint for an unknown word: `` (did you mean 'x'?)`` with the most similar name, else the list of names, or an
    empty text if there are no names."""
    ordered = sorted(names)
    close = difflib.get_close_matches(word, ordered, n=1, cutoff=0.6)
    if close:
        return f" (did you mean '{close[0]}'?)"
    return f" (available: {', '.join(ordered)})" if ordered else ""
