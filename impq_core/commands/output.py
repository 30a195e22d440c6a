"""What a command prints: text for a reader, one JSON document for a program, or its last lines alone.

A command with ``@answers`` prints for a reader, as if there were nothing else, and returns an ``Answer``::

    @click.command()
    @answers
    def weigh(run: str) -> Answer:
        weights = ...
        click.echo(f"{len(weights)} weights")
        return Answer(WeightsDocument(...), [f"{len(weights)} weights"])

The decorator adds ``--json`` and ``--quiet``. With ``--json`` all that is printed while the command works goes to
stderr, and stdout gets the document; with ``--quiet`` it goes nowhere, and stdout gets the lines of the answer. Errors
are printed by ``impq_core.cli``.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any, TextIO

import click

from impq_core.documents.base import Document, envelope
from impq_core.errors import UsageError

JSON = "--json"


@dataclass(frozen=True)
class Answer:
    """The result of a command.

    Args:
        document: what ``--json`` prints.
        lines: what ``--quiet`` prints.
        exit_code: of the process.
    """

    document: Document
    lines: Sequence[str] = ()
    exit_code: int = 0


def answers(command: Callable[..., Answer | None]) -> Callable[..., None]:
    """Give a command ``--json`` and ``--quiet``; it returns None if a command below it answers."""
    @click.option(JSON, "as_json", is_flag=True, help="Print one JSON document on stdout, and all else on stderr.")
    @click.option("--quiet", is_flag=True, help="Print the last lines of the result alone; errors as always.")
    @functools.wraps(command)
    def answering(*given: Any, as_json: bool, quiet: bool, **named: Any) -> None:
        if as_json and quiet:
            raise UsageError("--json and --quiet together: leave one out")
        with _printing(as_json, quiet):
            answer = command(*given, **named)
        if answer is None:
            return
        if as_json:
            click.echo(envelope(answer.document))
        elif quiet:
            for line in answer.lines:
                click.echo(line)
        if answer.exit_code:
            raise click.exceptions.Exit(answer.exit_code)
    return answering


@contextmanager
def _printing(as_json: bool, quiet: bool) -> Iterator[None]:
    """Print as always, on stderr (``as_json``), or nowhere (``quiet``)."""
    if as_json:
        with _diverted(sys.stderr):
            yield
    elif quiet:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, _diverted(nowhere):
            yield
    else:
        yield


@contextmanager
def _diverted(target: TextIO) -> Iterator[None]:
    """Send what is printed on stdout elsewhere, by libraries that are not Python and by child processes too."""
    sys.stdout.flush()
    kept = None
    if _descriptor(sys.stdout) == 1 and (other := _descriptor(target)) is not None:
        kept = os.dup(1)
        os.dup2(other, 1)
    try:
        with redirect_stdout(target):
            yield
    finally:
        target.flush()
        if kept is not None:
            with suppress(OSError, TypeError, AttributeError):
                ctypes.CDLL(None).fflush(None)  # what C code has printed and not yet written
            os.dup2(kept, 1)
            os.close(kept)


def _descriptor(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, AttributeError):  # a stream in memory
        return None
