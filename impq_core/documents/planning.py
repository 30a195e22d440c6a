"""Documents of what reads no weights: plans for other budgets, fits of surrogates, forecasts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from impq_core.documents.base import Document
from impq_core.documents.runs import PlanDocument
from impq_core.runs.allocate import Planned
from impq_core.runs.fit import Fits
from impq_core.runs.forecast import Forecast, SearchForecast


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


@dataclass(frozen=True)
class DeviceDocument:
    """Where blocks would compute.

    Args:
        name: ``cpu``, ``cuda:0`` ...
        hardware: its type and name.
        free_bytes: free on it; null if it does not say.
    """

    name: str
    hardware: str
    free_bytes: int | None


@dataclass(frozen=True)
class ForwardDocument:
    """The unit of costs: a forward of the windows of the game.

    Args:
        windows: their number.
        length: tokens in each.
        flops: floating point operations.
    """

    windows: int
    length: int
    flops: int


@dataclass(frozen=True)
class MemoryDocument:
    """Memory at its peak.

    Args:
        stage: the stage of the peak.
        peak_bytes: resident bytes then.
        free_bytes: free on this machine; null if the system does not say.
    """

    stage: str
    peak_bytes: int
    free_bytes: int | None


@dataclass(frozen=True)
class DiskDocument:
    """Bytes on disk.

    Args:
        cache_bytes: that the cache takes.
        run_bytes: that the folder of the run takes.
        export_bytes: that exports take.
        free_bytes: free on the disk of the cache (``cache_bytes``) and on that of the run (``run_bytes``).
    """

    cache_bytes: int
    run_bytes: int
    export_bytes: int
    free_bytes: Mapping[str, int]


@dataclass(frozen=True)
class ForecastDocument(Document):
    """The forecast of a run or a sweep.

    Args:
        model: its name or folder.
        architecture: its class.
        device: where blocks would compute.
        dtype: of the forwards.
        parameters: number of the model's parameters.
        blocks: number of its blocks.
        forward: the unit of costs.
        searches: one for each estimator and backend; a run has one.
        memory: at the peak of all searches.
        disk: of all searches together.
        warnings: a line for memory and for each disk, if less is free than is needed.
    """

    kind = "forecast"

    model: str
    architecture: str
    device: DeviceDocument
    dtype: str
    parameters: int
    blocks: int
    forward: ForwardDocument
    searches: list[SearchForecast]
    memory: MemoryDocument
    disk: DiskDocument
    warnings: list[str]

    @classmethod
    def of(cls, forecast: Forecast) -> ForecastDocument:
        """The document of a forecast."""
        config = forecast.config
        return cls(config.model, forecast.architecture,
                   DeviceDocument(config.device, forecast.hardware, forecast.free_device), config.dtype,
                   forecast.parameters, forecast.blocks,
                   ForwardDocument(config.game_windows, config.calibration.length, forecast.flops),
                   list(forecast.searches), MemoryDocument(*forecast.peak, forecast.free_memory),
                   DiskDocument(**forecast.disk, free_bytes=forecast.free_disk), forecast.warnings)
