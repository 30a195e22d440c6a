"""A loss that a plan is to stay within: ``nll+0.1``, ``kl=0.2``; and the search for the smallest such plan."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal

from impq_core.errors import UsageError, nearest
from impq_core.results import Row
from impq_core.statistics import confidence_below
from impq_core.window_losses import Difference

STEPS = 7
"""Default number of bisections: the border is then known to 1/128 of the way from the smallest to the largest plan."""

MOST_STEPS = 30
"""A larger number of bisections ends below a byte for any model."""

_FORM = re.compile(r"\s*(?:(nll)\s*\+|(kl)\s*=)\s*(\d+(?:\.\d*)?|\.\d+)\s*", re.IGNORECASE | re.ASCII)
_WRITE = "write nll+0.1 (at most 0.1 nats per token above the unquantized model) or kl=0.2"


@dataclass(frozen=True)
class Target:
    """The largest loss that a plan may have on held-out text.

    Args:
        measure: ``nll``, the NLL minus that of the unquantized model on the same windows; or ``kl``, the KL divergence
            from the unquantized model.
        limit: nats per token.
    """

    measure: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read a target; raises UsageError if the text is none."""
        match = _FORM.fullmatch(text)
        if not match:
            word = "".join(re.findall("^[a-z]+", text.strip().lower()))
            raise UsageError(f"target '{text}' is not understood"
                             f"{nearest(word, ['nll', 'kl']) if word not in ('nll', 'kl', '') else ''}: {_WRITE}")
        if not 0 < float(match[3]) < math.inf:
            raise UsageError(f"target '{text}': the loss has to be above zero; {_WRITE}")
        return cls((match[1] or match[2]).lower(), float(match[3]))

    def __str__(self) -> str:
        """The target as ``parse`` reads it."""
        limit = f"{Decimal(repr(self.limit)).normalize():f}"
        return f"nll+{limit}" if self.measure == "nll" else f"kl={limit}"

    def loss(self, row: Row, unquantized: Row) -> Difference:
        """The loss of a measured allocation, nats per token, with its standard error over windows."""
        return measured_loss(self.measure, row, unquantized)

    def met_by(self, loss: Difference) -> bool:
        """Whether a measured loss is within the target."""
        return loss.mean <= self.limit

    def confidence(self, loss: Difference, windows: int) -> float:
        """Probability that the mean loss on all text like the held-out one is within the target, given that on these
        windows (``confidence_below``)."""
        return confidence_below(self.limit, loss.mean, loss.stderr, windows)


def measured_loss(measure: str, row: Row, unquantized: Row) -> Difference:
    """The loss of a measured allocation above the unquantized model, by ``nll`` or ``kl``, nats per token."""
    assert row.score is not None
    return row.minus(unquantized) if measure == "nll" else row.score.divergence


def check_steps(steps: int) -> None:
    """Raises UsageError if a number of bisections is out of range."""
    if not 0 <= steps <= MOST_STEPS:
        raise UsageError(f"--steps is 0 to {MOST_STEPS} bisections, not {steps}")


@dataclass(frozen=True)
class Tried:
    """A plan that was measured.

    Args:
        budget: its budget, bytes.
        nbytes: its own size, bytes.
        loss: its loss, in the unit of the target.
    """

    budget: int
    nbytes: int
    loss: float


@dataclass(frozen=True)
class Border:
    """Where measured plans begin to be within a limit.

    Args:
        within: the smallest plan within the limit; None if there is none.
        outside: of the plans with a smaller budget, which all miss the limit, that with the largest budget; None if
            there is none.
        larger_outside: larger plans than ``within`` that miss the limit, the smallest first: with any, the measured
            losses do not decrease with size.
    """

    within: Tried | None
    outside: Tried | None
    larger_outside: tuple[Tried, ...] = ()


def border_of(limit: float, tried: Iterable[Tried]) -> Border:
    """The border of measured plans; a loss that is NaN misses every limit."""
    every = sorted(tried, key=lambda one: (one.nbytes, one.budget))
    within = next((one for one in every if one.loss <= limit), None)
    missing = [one for one in every if not one.loss <= limit]
    if within is None:
        return Border(None, max(missing, key=lambda one: one.budget, default=None))
    below = [one for one in missing if one.budget < within.budget]
    return Border(within, max(below, key=lambda one: one.budget, default=None),
                  tuple(one for one in missing if one.nbytes > within.nbytes))


def next_budget(limit: float, tried: Iterable[Tried], low: int, high: int, steps: int = STEPS) -> int | None:
    """The budget of the next plan to measure in search of the smallest plan within a limit.

    The widest plan comes first, then the narrowest; then the budgets between the smallest plan within the limit and the
    next smaller budget that misses it are halved, until they are no further apart than ``(high - low) / 2**steps``. The
    answer depends on what was measured alone, so a search that was interrupted continues as if it had not been. It
    takes at most ``steps + 2`` measurements, whatever the losses are.

    Args:
        limit: largest loss.
        tried: the plans that were measured, of this search or not.
        low: bytes of the smallest plan.
        high: bytes of the largest plan.
        steps: number of bisections.

    Returns:
        Bytes; None if the search has ended.
    """
    every = list(tried)
    border = border_of(limit, every)
    if border.within is None:
        return None if any(one.budget >= high for one in every) else high
    if border.outside is None:
        return None if border.within.budget <= low or border.within.nbytes <= low else low
    # Budgets from the plan's own size to its budget would give the same plan.
    gap = border.within.nbytes - border.outside.budget
    return None if gap <= 1 + (high - low) / 2**steps else border.outside.budget + gap // 2

