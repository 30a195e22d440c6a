"""The verdict on a contest, in a sentence: how much smaller its plans are than uniform models of the same loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from impq_core.compare.contest import Contest, Contestant
from impq_core.compare.uniform import EqualLoss, UniformLine
from impq_core.window_losses import Difference


@dataclass(frozen=True)
class Verdict:
    """The verdict on the best plan of each budget.

    Args:
        outcome: ``loses`` if a reference is significantly better than one of the plans; else ``ties`` if one is not
            significantly worse than one of them; else ``wins``; empty if there are no references.
        sentence: the sentence.
    """

    outcome: str
    sentence: str


def equal_loss(run: Contestant) -> EqualLoss | None:
    """The size of a uniform model with the loss of a run's plan; None if there is none to compare with."""
    line = UniformLine.of(run.evaluation)
    return line.equal_loss(run.plan) if line else None


def give_verdict(contest: Contest) -> Verdict:
    """Judge the best plan of each budget by the line between uniform models, and name every other reference that is
    not beaten."""
    best = [runs[0] for runs in contest.budgets.values()]
    outcomes = [run.outcome for run in best]
    outcome = next((kind for kind in ("loses", "ties", "wins") if kind in outcomes), "")
    chosen = len(contest.contestants) > len(best)
    [*parts] = _one(best[0], chosen) if len(best) == 1 else _several(best, chosen)
    return Verdict(outcome, "; ".join(parts) + ".")


def _one(run: Contestant, chosen: bool) -> Iterable[str]:
    subject = f"At {_bits(run)} the {'best plan' if chosen else 'plan'}"
    gap = run.gaps.get("line")
    if gap is None:
        difference = run.plan.minus(run.unquantized)
        yield (f"{subject} is compared with no uniform models; its loss is {_nats(difference)} above the unquantized "
               "model's")
    elif "line" in run.losses:
        yield f"{subject} loses to uniform models of its size, by {_nats(gap)}{_as_good(run)}"
    elif "line" in run.ties:
        yield f"{subject} ties with uniform models of its size (difference {_nats(gap, signed=True)})"
    else:
        yield f"{subject} is {_claim(run)}"
    yield from _unbeaten([run])
    yield from _mixes(run)


def _several(best: Sequence[Contestant], chosen: bool) -> Iterable[str]:
    subject = f"the {'best ' * chosen}plans"
    compared = [run for run in best if "line" in run.gaps]
    losing = [run for run in compared if "line" in run.losses]
    tied = [run for run in compared if "line" in run.ties]
    winning = [run for run in compared if run not in losing and run not in tied]
    if not compared:
        yield f"At none of {len(best)} budgets are {subject} compared with uniform models"
    if winning:
        sized = {run: found for run in winning if (found := equal_loss(run))}
        most = max(sized, key=lambda run: sized[run].saved)
        shares = sorted({_percent(found.saved) for found in sized.values()}, key=lambda share: float(share[:-2]))
        smaller = shares[0] if len(shares) == 1 else f"{shares[0]} to {shares[-1]}"
        yield (f"{_at(winning, len(best))} {subject} are {smaller} smaller than uniform models of the same loss: "
               f"at {_bits(most)} {_claim(most)}")
    if tied:
        verb = "they tie" if winning else f"{subject} tie"
        yield f"{_at(tied, len(best), not winning)} {verb} with uniform models of their size"
    if losing:
        low, *_, high = sorted([run.gaps["line"].mean for run in losing] * 2)
        by = f"{low:.3f}" if f"{low:.3f}" == f"{high:.3f}" else f"{low:.3f} to {high:.3f}"
        verb = "they lose" if winning or tied else f"{subject} lose"
        yield (f"{_at(losing, len(best), not (winning or tied))} {verb} to uniform models of their size, by {by} nats "
               "per token")
    yield from _unbeaten(best)


def _claim(run: Contestant) -> str:
    """What a plan that is better than the line at its size is as good as."""
    equal = equal_loss(run)
    assert equal is not None
    line = UniformLine.of(run.evaluation)
    assert line is not None
    if equal.bound:
        largest = line.models[-1]
        return f"better than {largest.name}, the largest uniform model, and {_percent(equal.saved)} smaller"
    near = [row for row in line.models if (row.nbytes or 0) > equal.plan_bytes and not run.plan.minus(row).significant]
    if near:  # a model that was measured is worth more than a point of the line
        row = min(near, key=lambda row: abs((row.nbytes or 0) - equal.nbytes))
        return (f"as good as {row.name} and {_percent(1 - equal.plan_bytes / (row.nbytes or 1))} smaller (difference "
                f"{_nats(run.plan.minus(row), signed=True)})")
    error = "" if math.isnan(equal.saved_stderr) else f" ± {100 * equal.saved_stderr:.1f}"
    return f"as good as a uniform model would be at {equal.bits:.2f} bits, {100 * equal.saved:.1f}{error} % smaller"


def _as_good(run: Contestant) -> str:
    equal = equal_loss(run)
    if equal is None or equal.bound == "above":
        return ""
    least = "at least " * (equal.bound == "below")
    return f"; a uniform model as good is {least}{_percent(1 - equal.nbytes / equal.plan_bytes)} smaller"


def _unbeaten(runs: Sequence[Contestant]) -> Iterable[str]:
    """The references beside the line that a plan loses to or ties with."""
    for verb, gaps in (("loses to", {run: run.losses for run in runs}), ("ties with", {run: run.ties for run in runs})):
        for kind, name in (("first/last", "first and last layers wide"), ("random", "the best random plan")):
            found = [run for run in runs if kind in gaps[run]]
            if found:
                where = "" if len(runs) == 1 else f" at {_list([_bits(run) for run in found])}"
                by = f" by {_nats(gaps[found[0]][kind])}" if len(found) == 1 and verb == "loses to" else ""
                yield f"{'it' if len(found) == 1 else 'they'} {verb if len(found) == 1 else _plural(verb)} {name}" \
                      f"{where}{by}"


def _mixes(run: Contestant) -> Iterable[str]:
    """The largest mix of other software that is larger than the plan and not better."""
    size = run.plan.nbytes or 0
    rows = [row for row in run.evaluation.rows if row.kind == "mix" and (row.nbytes or 0) > size
            and math.isfinite(row.nll)]
    worse = [row for row in rows if run.plan.minus(row).mean <= 0 or not run.plan.minus(row).significant]
    if worse:
        row = max(worse, key=lambda row: row.nbytes or 0)
        verb = "is better than" if run.plan.minus(row).significant else "is as good as"
        yield f"it {verb} {row.name}, and {_percent(1 - size / (row.nbytes or 1))} smaller"


def _at(runs: Sequence[Contestant], total: int, first: bool = True) -> str:
    at = "At" if first else "at"
    if len(runs) == total:
        return f"{at} both budgets" if total == 2 else f"{at} all {total} budgets"
    return f"{at} {len(runs)} of {total} budgets" if len(runs) > 2 else f"{at} {_list([_bits(run) for run in runs])}"


def _list(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def _plural(verb: str) -> str:
    return verb.replace("loses", "lose").replace("ties", "tie")


def _bits(run: Contestant) -> str:
    return f"{run.bits_nominal:.2f}".rstrip("0").rstrip(".") + " bits"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _nats(gap: Difference, signed: bool = False) -> str:
    error = "" if math.isnan(gap.stderr) else f" ± {gap.stderr:.3f}"
    return f"{gap.mean:+.3f}{error}" if signed else f"{abs(gap.mean):.3f}{error} nats per token"


