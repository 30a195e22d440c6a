"""The forecast of a run or a sweep: layers, sizes, forwards, memory and disk, from the shapes of the model alone.

No weight and no text is read, and nothing is written. It takes seconds for a model of any size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path

from impq_core.config import RunConfig
from impq_core.costs import Metering
from impq_core.errors import ImpqError
from impq_core.machine import free_device_memory, free_disk, free_memory
from impq_core.model.demo import cache_path
from impq_core.model.device import hardware
from impq_core.model.source import ModelSource, locate_model
from impq_core.plugins import Plugins
from impq_core.runs.footprint import Bytes, disk, memory, plan_memory
from impq_core.runs.grid import Sweep
from impq_core.runs.layout import Layout, lay_out
from impq_core.runs.work import (
    evaluation_forwards,
    fallback_forwards,
    in_sequence,
    plan_forwards,
    references,
    statistics_forwards,
    work_forwards,
    work_of,
)
from impq_core.space import LayerSpec
from impq_core.trust import NO_TRUST, Trust

STAGES = ("quantize", "estimate", "plan", "refine", "fallback", "evaluate")
"""The stages that run the model, in order."""


@dataclass(frozen=True)
class Size:
    """A size of all layers together.

    Args:
        budget: as the user gave it, or ``smallest`` or ``largest``.
        bytes: stored bytes, scales and zeros included.
        bits_nominal: nominal average width.
        bits_stored: stored bits a weight.
        file_bytes: the most bytes of the file of an export; None if the budget does not bound it.
    """

    budget: str
    bytes: int
    bits_nominal: float
    bits_stored: float
    file_bytes: int | None

    @classmethod
    def of(cls, budget: str, nbytes: int, layout: Layout) -> Size:
        """A size in bytes in all units."""
        space, whole = layout.space, layout.whole
        return cls(budget, nbytes, space.nominal_bits(nbytes), space.bits_per_weight(nbytes),
                   nbytes + whole.account.fixed if whole else None)


@dataclass(frozen=True)
class Fixed:
    """A layer, or another part of the model, that does not play.

    Args:
        name: of the layer; for parts that are no layer, of the kind of their parameters.
        weights: number of weights.
        bits: name of the choice that it stays at; 16 for one that is not quantized.
        bytes: stored bytes. Those of layers count in a budget, those of other parts do not.
        reason: why it does not play.
    """

    name: str
    weights: int
    bits: str
    bytes: int
    reason: str


@dataclass(frozen=True)
class CostForecast:
    """A cost beside bytes.

    Args:
        name: such as ``latency``.
        unit: such as ``ms``.
        meter: name of the meter.
        least, most: of all plans, whatever their size.
        limit: of the user; None if there is none.
        notes: what the meter counted, and how.
    """

    name: str
    unit: str
    meter: str
    least: float
    most: float
    limit: float | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class SearchForecast:
    """The forecast of a search: one estimator on one backend, and the plans that are made from its estimate.

    Args:
        backend, estimate_with, estimator: names; ``estimate_with`` is empty for the same backend.
        granularity: of the layers.
        layers: number of layers that play.
        weights: number of their weights.
        bits: names of the choices of the menu, widest first.
        fixed: layers that do not play, and parts of the model that are no layers.
        budgets: of the plans.
        smallest, largest: sizes of the all-narrowest and of the all-widest plan.
        losses: number of losses that the estimator measures; None if that is unknown.
        forwards: full-model forwards of the game's windows by stage: ``quantize`` (statistics for the quantizer),
            ``estimate``, ``plan`` (losses of the plans in the game), ``refine`` (the limit that the user gave),
            ``fallback`` (tests of the plans against uniform models) and ``evaluate`` (held-out scores); None if
            unknown.
        streamed: whether weights of blocks stay on disk until the block works, as they do not fit into memory.
        memory: resident bytes by stage (``check`` of the files, ``load``, ``quantize``, ``quantize_deployed`` if
            another backend is measured, ``estimate``, ``refine``, ``evaluate``), and in each stage by content.
        disk: ``cache_bytes``, ``run_bytes`` and ``export_bytes``.
        costs: what meters give to plans beside bytes.
    """

    backend: str
    estimate_with: str
    estimator: str
    granularity: str
    layers: int
    weights: int
    bits: tuple[str, ...]
    fixed: tuple[Fixed, ...]
    budgets: tuple[Size, ...]
    smallest: Size
    largest: Size
    losses: float | None
    forwards: Mapping[str, float | None]
    streamed: bool
    memory: Mapping[str, Bytes]
    disk: Bytes
    costs: tuple[CostForecast, ...] = ()

    @property
    def peak(self) -> tuple[str, int]:
        """The stage with the most resident bytes, and their number."""
        totals = {stage: sum(sizes.values()) for stage, sizes in self.memory.items()}
        stage = max(totals, key=totals.__getitem__)
        return stage, totals[stage]


@dataclass(frozen=True)
class Forecast:
    """The forecast of a run (one search) or of a sweep (a search for each backend and estimator).

    Args:
        config: of the run, or of all runs of the sweep, resolved.
        architecture: class of the model.
        parameters: number of the model's parameters.
        blocks: number of its blocks.
        flops: floating point operations of a forward of the game's windows.
        searches: at least one. Work that several searches share is in the first of them.
        free_memory: bytes free on this machine; None if the system does not say.
        free_disk: bytes free on the disks of the cache and of the run's folder.
        hardware: the device's type and name.
        free_device: bytes free on the device; None if it does not say.
    """

    config: RunConfig
    architecture: str
    parameters: int
    blocks: int
    flops: int
    searches: tuple[SearchForecast, ...]
    free_memory: int | None
    free_disk: Mapping[str, int]
    hardware: str
    free_device: int | None

    @property
    def peak(self) -> tuple[str, int]:
        """The stage with the most resident bytes of all searches, and their number."""
        return max((search.peak for search in self.searches), key=lambda peak: peak[1])

    @property
    def disk(self) -> Bytes:
        """Bytes on disk of all searches together."""
        return {name: sum(search.disk[name] for search in self.searches) for name in self.searches[0].disk}

    @property
    def warnings(self) -> list[str]:
        """A line for memory, the cache's disk and the output's disk each, if less is free than needed."""
        lines = []
        stage, needed = self.peak
        free = self.free_memory if self.config.device == "cpu" else self.free_device
        if free is not None and needed > free:
            lines.append(f"about {needed / 1e9:.1f} GB of memory are needed ({stage}), {free / 1e9:.1f} GB "
                         "are free: take a machine with more, or a smaller model")
        takes = self.disk
        for name, where, size in (("cache_bytes", "the cache", takes["cache_bytes"]),
                                  ("run_bytes", f"--output {self.config.output}",
                                   takes["run_bytes"] + takes["export_bytes"])):
            if size > self.free_disk[name]:
                lines.append(f"about {size / 1e9:.2f} GB are needed on the disk of {where}, "
                             f"{self.free_disk[name] / 1e9:.2f} GB are free")
        return lines


def forecast_run(config: RunConfig, plugins: Plugins | None = None, trust: Trust = NO_TRUST,
                 exports: int = 0) -> Forecast:
    """The forecast of a run.

    Args:
        config: the configuration.
        plugins: the source of the parts; the installed plugins by default.
        trust: what the caller permits.
        exports: number of checkpoints that are written at the end.

    Raises:
        ImpqError: an error that would end the run before its model is loaded, but for texts that are too short and
            weights that are damaged; or the demo model was not fetched yet.
    """
    layout = lay_out(config, plugins or Plugins(), trust, source=_at_hand(config.model, trust))
    return _forecast([_search([layout], exports=exports)], layout)


def forecast_sweep(sweep: Sweep, plugins: Plugins | None = None, trust: Trust = NO_TRUST) -> Forecast:
    """The forecast of a sweep; raises ImpqError as ``forecast_run``."""
    plugins = plugins or Plugins()
    source = _at_hand(sweep.base.model, trust)
    searches: list[SearchForecast] = []
    backends: set[str] = set()
    layout = None
    meterings: dict[str, tuple[Metering, ...]] = {}
    for (backend, _), group in groupby(sweep.configs(plugins), key=lambda config: (config.backend, config.estimator)):
        configs = list(group)
        layout = lay_out(configs[0], plugins, trust, source=source, meterings=meterings.get(backend))
        meterings[backend] = layout.meterings
        searches.append(_search([layout.planned(config, plugins) for config in configs], backend not in backends,
                                tries=sweep.steps + 2 if sweep.target else 0))
        backends.add(backend)
    assert layout is not None
    return _forecast(searches, layout)


def _at_hand(model: str, trust: Trust) -> ModelSource:
    source = locate_model(model, trust.remote_code)
    if not source.at_hand:
        raise ImpqError("the demo model is not in the cache yet, and a dry run fetches nothing: 'impq run' fetches it "
                        "(93 MB, 540 MB in the cache), or give --model")
    return source


def _forecast(searches: Sequence[SearchForecast], layout: Layout) -> Forecast:
    config, shapes = layout.config, layout.shapes
    return Forecast(config, shapes.architecture, shapes.parameters, len(shapes.blocks),
                    config.game_windows * shapes.cost(config.calibration.length).total, tuple(searches), free_memory(),
                    {"cache_bytes": free_disk(cache_path()), "run_bytes": free_disk(Path(config.output))},
                    hardware(layout.device), free_device_memory(layout.device))


def _search(layouts: Sequence[Layout], first: bool = True, exports: int = 0, tries: int = 0) -> SearchForecast:
    """The forecast of a search.

    Args:
        layouts: of the runs that share it, which differ in surrogate, allocator and budget.
        first: whether it is the first search of its backend, which makes the variants and scores the references.
        exports: number of checkpoints that are written.
        tries: if the plan is the smallest within a target, the most plans that are scored on the way.
    """
    layout = layouts[0]
    config, space = layout.config, layout.space
    work = work_of(layout)
    budgets = {} if tries else {each.config.budget: each.budget_bytes for each in layouts}
    weights = sum(layer.parameters for layer in space.layers)
    scores = runs = tries or len(layouts)
    if first:
        scores += 1 + references(layout, max(1, len(budgets)))
    forwards = {"quantize": statistics_forwards(layout) if first else 0.0,
                "estimate": work_forwards(work, layout.shapes, config, space) if work else None,
                "plan": 0.0 if tries else plan_forwards(layout, work, runs), "refine": float(config.refine),
                "fallback": fallback_forwards(layout, runs),
                "evaluate": evaluation_forwards(layout, scores, first, in_sequence(layout))}
    if layout.plan:
        forwards["estimate"] = 0.0
    plan = plan_memory(layout)
    takes = dict(disk(layout, work, runs, scores, exports))
    if not first:
        takes["cache_bytes"] = 0
    return SearchForecast(
        config.backend, config.estimate_with, config.estimator, config.granularity, len(space),
        weights, tuple(choice.name for choice in space.choices),
        (*_pins(layout), *_other_parts(layout)),
        tuple(Size.of(budget, nbytes, layout) for budget, nbytes in budgets.items()),
        Size.of("smallest", space.low_bytes, layout), Size.of("largest", space.high_bytes, layout),
        None if work is None else float(work.losses.sum()), forwards, plan.streamed,
        memory(layout, work, plan), takes,
        tuple(CostForecast(cost.name, cost.unit, cost.meter, cost.fixed + float(cost.values.min(axis=1).sum()),
                           cost.fixed + float(cost.values.max(axis=1).sum()), cost.limit if cost.is_limited else None,
                           metering.notes) for cost, metering in zip(layout.costs, layout.meterings, strict=True)))


def _pins(layout: Layout) -> list[Fixed]:
    """The layers that do not play."""
    def reason(layer: LayerSpec) -> str:
        names = [layer.name, *(linear.name for linear in layer.linears)]
        if any(fnmatchcase(name, pattern) for pattern in layout.config.exclude for name in names):
            return "excluded"
        return f"backend {layout.config.backend} cannot store its shape"

    return [Fixed(pin.layer.name, pin.layer.parameters, pin.choice.name if pin.choice else "16", pin.nbytes,
                  "pinned" if pin.choice else reason(pin.layer)) for pin in layout.space.pinned]


def _other_parts(layout: Layout) -> list[Fixed]:
    """The parameters that are in no layer, by kind."""
    shapes = layout.shapes
    loose = sum(block.weights - block.held for block in shapes.blocks)
    ends = shapes.embeddings - sum(layer.parameters for layer in layout.ends)
    small = shapes.parameters - layout.space.parameters - ends - shapes.encoders - loose
    parts = [("embeddings and head", ends, "never quantized" if not layout.ends else "no layer"),
             ("encoders and projectors", shapes.encoders, "outside the language model"),
             ("other weights of blocks", loose, f"in no linear, such as {shapes.loose}"),
             ("norms, biases and the rest", small, "never quantized")]
    return [Fixed(name, weights, f"{8 * layout.item}", layout.item * weights, reason)
            for name, weights, reason in parts if weights]
