"""Documents of what reads no weights: plans for other budgets, fits of surrogates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from impq_core.documents.base import Document
from impq_core.documents.runs import PlanDocument
from impq_core.runs.allocate import Planned
from impq_core.runs.fit import Fits


@dataclass(frozen=True)
class PlannedDocument:
    """A plan for a budget.

    Args:
        budget: as it was given.
        plan: the plan.
    """

    budget: str
    plan: PlanDocument


@dataclass(frozen=True)
class PlansDocument(Document):
    """Plans from the estimate of a run.

    Args:
        plans: one for each budget, in their order.
    """

    kind = "plans"

    plans: list[PlannedDocument]

    @classmethod
    def of(cls, plans: Sequence[Planned]) -> PlansDocument:
        """The document of plans."""
        return cls([PlannedDocument(each.budget, PlanDocument.of(each.plan, each.file)) for each in plans])


@dataclass(frozen=True)
class FitDocument:
    """A surrogate fitted to the losses of a run, and cross-validated over permutations.

    Args:
        surrogate: its name.
        file: of the estimate; null if it cannot be fitted.
        error_nats: root mean square error of predictions, nats per token; null if it predicts no loss.
        misordered_share: share of pairs of equally many demotions in the wrong order; 0.5 is random.
        explained_share: explained share of the variance among equally many demotions; null if it predicts no loss.
        problem: why it cannot be fitted; null if it was.
    """

    surrogate: str
    file: str | None
    error_nats: float | None
    misordered_share: float | None
    explained_share: float | None
    problem: str | None


@dataclass(frozen=True)
class FitsDocument(Document):
    """Surrogates fitted to the losses of a run.

    Args:
        higher_order_share: share of the variance among equally many demotions that is of order two and above; null if
            there are too few losses.
        higher_order_linked_share: the same after the best saturating or growing curve.
        surrogates: in the order asked for.
    """

    kind = "fits"

    higher_order_share: float | None
    higher_order_linked_share: float | None
    surrogates: list[FitDocument]

    @classmethod
    def of(cls, fits: Fits) -> FitsDocument:
        """The document of fits."""
        rows = []
        for fit in fits.surrogates:
            if (validation := fit.validation) is None:
                rows.append(FitDocument(fit.surrogate, None, None, None, None, fit.problem))
                continue
            is_loss = fit.estimate is None or fit.estimate.is_loss
            rows.append(FitDocument(fit.surrogate, str(fit.file), validation.error if is_loss else None,
                                    validation.misordered, validation.explained if is_loss else None, None))
        return cls(fits.game.loss, fits.game.linked, rows)
