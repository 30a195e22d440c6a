"""Documents of comparisons and sweeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from impq_core.compare.contest import Contest, Contestant
from impq_core.documents.base import Document


@dataclass(frozen=True)
class ReferenceDocument:
    """The best reference of a kind, beside a plan.

    Args:
        allocation: its name.
        size_bytes: its stored bytes.
        nll_nats: its held-out loss.
        plan_minus_nats, plan_minus_stderr_nats: the plan's loss minus its loss, and the standard error of that, paired
            over windows.
        better: whether it is significantly better than the plan.
    """

    allocation: str
    size_bytes: int | None
    nll_nats: float | None
    plan_minus_nats: float | None
    plan_minus_stderr_nats: float | None
    better: bool


@dataclass(frozen=True)
class ComparedDocument:
    """A run in a comparison.

    Args:
        budget: what it is compared at.
        label: its name in the table.
        folder: of the run.
        backend, estimate_with, estimator, surrogate, allocator, granularity, value, seed: its settings; ``surrogate``
            is empty if nothing was fitted, the three of the search if the plan was given.
        size_bytes: stored bytes of the quantizable weights.
        bits_nominal: nominal average width.
        forwards: cost of the search in full-model forwards.
        nll_nats, nll_stderr_nats: held-out loss and its standard error.
        kl_nats: divergence from the unquantized model.
        minus_best_nats, minus_best_stderr_nats: its loss minus that of the best plan of the budget, and the standard
            error of that, paired over windows; null for the best.
        verdict: what the table says of it against references.
        references: the best reference of each kind.
    """

    budget: str
    label: str
    folder: str
    backend: str
    estimate_with: str
    estimator: str
    surrogate: str
    allocator: str
    granularity: str
    value: str
    seed: int
    size_bytes: int | None
    bits_nominal: float
    forwards: float
    nll_nats: float | None
    nll_stderr_nats: float | None
    kl_nats: float | None
    minus_best_nats: float | None
    minus_best_stderr_nats: float | None
    verdict: str
    references: list[ReferenceDocument]

    @classmethod
    def of(cls, contest: Contest, run: Contestant) -> ComparedDocument:
        """The document of a run of a contest."""
        config, plan, losses = run.config, run.plan, run.losses
        minus = contest.behind_best(run)
        estimator, surrogate, allocator = ("", "", "") if config.plan else (
            config.estimator, config.surrogate if run.measured else "", config.allocator)
        references = [ReferenceDocument(row.name, row.nbytes, row.nll, *plan.minus(row), kind in losses)
                      for kind, row in run.rivals.items()]
        return cls(contest.budget_of(run), contest.label(run), str(run.folder), config.backend, config.estimate_with,
                   estimator, surrogate, allocator, config.granularity, config.value, config.seed, plan.nbytes,
                   run.bits_nominal, run.forwards, plan.nll, plan.stderr, plan.score.kl if plan.score else None,
                   minus.mean if minus else None, minus.stderr if minus else None, run.verdict, references)


@dataclass(frozen=True)
class ContestDocument:
    """Runs of one model that were scored on the same windows of one text.

    Args:
        model: its name or folder.
        text: description of the held-out text.
        tokens: scored tokens.
        sequential: whether plans and references were quantized in sequence.
        runs: by budget, the smallest first; in a budget, the best plan first.
    """

    model: str
    text: str
    tokens: int
    sequential: bool
    runs: list[ComparedDocument]

    @classmethod
    def of(cls, contest: Contest) -> ContestDocument:
        """The document of a contest."""
        runs = [ComparedDocument.of(contest, run) for runs in contest.budgets.values() for run in runs]
        return cls(contest.model, contest.text, contest.tokens, contest.contestants[0].evaluation.sequential, runs)


@dataclass(frozen=True)
class ComparisonDocument(Document):
    """Finished runs beside one another.

    Args:
        contests: groups of runs that can be compared.
        notes: a line for each run that is left out.
        page: the file of the page; null if none was written.
    """

    kind = "comparison"

    contests: list[ContestDocument]
    notes: list[str]
    page: str | None

    @classmethod
    def of(cls, contests: Sequence[Contest], notes: Sequence[str], page: Path | None) -> ComparisonDocument:
        """The document of contests."""
        return cls([ContestDocument.of(contest) for contest in contests], list(notes), str(page) if page else None)


@dataclass(frozen=True)
class SweepDocument(Document):
    """A sweep.

    Args:
        folder: its folder.
        failed: the error of each run that no plan could be made for, by the name of the run.
        comparison: the others.
    """

    kind = "sweep"

    folder: str
    failed: Mapping[str, str]
    comparison: ComparisonDocument
