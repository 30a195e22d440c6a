"""Names and weights of texts as users write them, and the order in which the windows of a mixture follow each other."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from impq_core.errors import UsageError

_NAME = r"[A-Za-z][\w-]*"
"""A name in front of ``=``; no path and no name of a dataset with a folder or a split has this form."""

_NUMBER = r"\d+(\.\d+)?|\.\d+"


@dataclass(frozen=True)
class NamedText:
    """One of the texts of an option.

    Args:
        name: of its column, its metrics and its scores.
        source: ``demo``, a file, or a name of ``datasets``.
        weight: its share of the windows of a mixture, relative to the other texts.
        given: what the user wrote around the source: the name or the weight, each with its ``=``.
    """

    name: str
    source: str
    weight: Fraction = Fraction(1)
    given: tuple[str, str] = ("", "")

    @classmethod
    def parse(cls, text: str) -> NamedText:
        """Read ``[NAME=]SOURCE[=WEIGHT]``. A file of exactly that name is a source.

        Raises:
            UsageError: there is no source, or the weight is zero.
        """
        if os.path.exists(text):
            return cls(_default_name(text), text)
        source, equals, number = text.rpartition("=")
        weight, suffix = Fraction(1), ""
        if source and re.fullmatch(_NUMBER, number):
            text, weight, suffix = source, Fraction(number), f"={number}"
        name, equals, source = text.partition("=")
        if not equals or not re.fullmatch(_NAME, name):
            name, source = "", text
        if not source:
            raise UsageError(f"a text has no source in '{text}{suffix}': write SOURCE, NAME=SOURCE or SOURCE=WEIGHT")
        if not weight:
            raise UsageError(f"the weight of text {source} is zero: leave the text out")
        return cls(name or _default_name(source), source, weight, (f"{name}=" if name else "", suffix))

    def at(self, source: str) -> str:
        """The text as the user wrote it, with another source."""
        return f"{self.given[0]}{source}{self.given[1]}"


def _default_name(source: str) -> str:
    """The stem of a file; the last part of the path of a dataset."""
    stem = re.sub(r"\.(txt|jsonl|parquet)$", "", re.split(r"[/\\]", source)[-1].partition(":")[0])
    return re.sub(r"[^\w.-]+", "-", stem).strip("-") or "text"


def parse_texts(sources: Sequence[str]) -> tuple[NamedText, ...]:
    """The texts of an option; raises UsageError if two have one source."""
    texts = tuple(map(NamedText.parse, sources))
    for number, text in enumerate(texts):
        for other in texts[:number]:
            if text.source == other.source:
                raise UsageError(f"text {text.source} is given twice")
    return texts


def require_held_out(texts: Sequence[NamedText]) -> None:
    """Raises UsageError if a held-out text has a weight, or if two have one name."""
    for number, text in enumerate(texts):
        if text.weight != 1:
            raise UsageError(f"evaluation text {text.source} has a weight: held-out texts are scored one by one, and "
                             "only calibration texts are mixed")
        for other in texts[:number]:
            if text.name.lower() == other.name.lower():
                raise UsageError(f"evaluation texts {other.source} and {text.source} are both named '{text.name}': "
                                 f"give one another name, such as other={text.source}")


def interleaved(weights: Sequence[Fraction], count: int) -> list[int]:
    """The text of each window of a mixture, so that any first windows are a mixture too.

    Among the first k windows, text i has more than ``k w_i - 1`` and less than ``k w_i + 1``, with w the shares: the
    quota method of Balinski and Young (American Mathematical Monthly 82, 1975). At each place, of the texts whose quota
    admits a window, the one whose next window is due first is taken.

    Args:
        weights: of the texts, positive.
        count: number of windows.

    Returns:
        The number of a text for each window.
    """
    total = sum(weights, Fraction(0))
    shares = [weight / total for weight in weights]
    taken, order = [0] * len(shares), list[int]()
    for place in range(1, count + 1):
        admitted = [i for i, share in enumerate(shares) if taken[i] < place * share]
        chosen = min(admitted, key=lambda i: (math.ceil((taken[i] + 1) / shares[i]), -shares[i], i))
        taken[chosen] += 1
        order.append(chosen)
    return order


def require_all(texts: Sequence[NamedText], count: int, what: str) -> None:
    """Raises UsageError if a text has none of the first ``count`` windows of a mixture; ``what`` names the windows and
    the option that sets their number."""
    order = interleaved([text.weight for text in texts], count)
    for number, text in enumerate(texts):
        if number not in order:
            raise UsageError(f"none of the {count} {what} would be of text {text.source}: give more of them, or the "
                             "text a larger weight")
