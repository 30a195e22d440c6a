"""The document of a forecast, apart from others because it needs the modules of models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from impq_core.documents.base import Document
from impq_core.runs.forecast import Forecast, SearchForecast


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
