"""What goes wrong in a user's hands, said in one line each."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ImpqError(Exception):
    """Something the user can mend; the message is one line that says what and how. Exit code 1."""

    exit_code = 1


class UsageError(ImpqError):
    """A wrong word in the command line or the configuration file. Exit code 2."""

    exit_code = 2


class Malformed(ImpqError):
    """Measurements, an estimate or a plan whose arrays cannot be."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where the signal finds the program, so that runs end as KILLED."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the closest known name, or the list of names, or nothing."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f" (did you mean '{close[0]}'?)"
    return f" (there is: {', '.join(names)})" if names else ""
