"""The parts of a run, built by name from a configuration before anything heavy is imported."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from impq_core.budget import Budget
from impq_core.config import METER, WORKERS, RunConfig
from impq_core.costs import Cost, limited
from impq_core.errors import ImpqError, InvalidArrays, UsageError, nearest
from impq_core.feasible_costs import feasible
from impq_core.interfaces import (
    EVERY_BACKEND,
    Allocator,
    Backend,
    Crew,
    Drift,
    Estimator,
    Exporter,
    Game,
    Meter,
    Probe,
    Refiner,
    Surrogate,
)
from impq_core.plugins import ROLES, Plugins, build_options, option_names
from impq_core.space import Choice, IntArray, SearchSpace, in_bits
from impq_core.types import Measurements, Plan, SensitivityEstimate
from impq_core.units import parse_amount

ESTIMATE_WITH = "estimate_with"
"""The slot of a second backend: its variants are measured, those of ``backend`` are deployed."""

BASES: Mapping[str, type] = {"estimator": Estimator, "surrogate": Surrogate,
                             "allocator": Allocator, "backend": Backend, "refiner": Refiner, "exporter": Exporter,
                             "meter": Meter, "crew": Crew}
"""The base class of each role."""


@dataclass(frozen=True)
class Parts:
    """The parts of a run.

    Args:
        estimator, surrogate, allocator, backend: of the run.
        estimate_with: the backend whose variants are measured; None if it is ``backend``.
        refiner: None if the plan is not refined.
        menu: the choices of ``backend``, by their bits.
        game_menu: those of the same names of the backend that quantizes for the game.
        budget: None if the configuration has none.
        granularity: ``block``, ``group``, ``expert`` or ``linear``.
        meters: by name.
    """

    estimator: Estimator
    surrogate: Surrogate
    allocator: Allocator
    backend: Backend
    estimate_with: Backend | None
    refiner: Refiner | None
    menu: tuple[Choice, ...]
    game_menu: tuple[Choice, ...]
    budget: Budget | None
    granularity: str
    meters: Mapping[str, Meter]

    @classmethod
    def build(cls, config: RunConfig, plugins: Plugins) -> Parts:
        """Build every part.

        Raises:
            UsageError: a name, option, width or budget is wrong.
            ImpqError: a library is missing.
        """
        config = with_meters(config, plugins)
        slots = slots_of(config)
        for slot in config.options:
            if slot not in slots:
                raise UsageError(f"options are given for '{slot}', which this run does not have{nearest(slot, slots)}")
        every = {slot: build_part(config, plugins, slot) for slot in slots}
        meters = {slot.removeprefix(METER): part for slot, part in every.items() if slot.startswith(METER)}
        built = {ESTIMATE_WITH: None, "refiner": None,
                 **{slot: part for slot, part in every.items() if not slot.startswith(METER)}}
        menu, game_menu = _menus(config, built["backend"], built["estimate_with"])
        _check_meters(config, plugins, meters, menu, built)
        budget = Budget.parse(config.budget) if config.budget else None
        if config.whole and not config.plan and budget is None:
            raise UsageError("--whole takes a --budget for the file, such as 60MB or 40%")
        if config.whole and budget:
            budget.check_whole()
        exact = type(built["backend"]).stand_in is Backend.stand_in or all(choice.is_width for choice in menu)
        # A pin, or what is stored for a shape, may lie outside the menu; a file has more than the menu's widths.
        if budget and exact and not config.pins and not config.whole:
            budget.check_menu([choice.bits for choice in menu])
        granularity = config.granularity
        if granularity == "auto":
            granularity = built["estimator"].default_granularity
        parts = cls(**built, menu=menu, game_menu=game_menu, budget=budget, granularity=granularity, meters=meters)
        if config.fallback == "yes" and not config.plan and not parts.needs_calibration:
            raise UsageError("--fallback tests the plan on calibration text, and neither estimator "
                             f"'{config.estimator}' nor backend '{config.backend}' reads any: take another of them, "
                             "or leave out --fallback")
        return parts

    def options(self) -> dict[str, dict[str, Any]]:
        """Every option of every part, defaults included, by slot."""
        parts = {**{slot: getattr(self, slot) for slot in (*ROLES, ESTIMATE_WITH, "refiner")},
                 **{METER + name: part for name, part in self.meters.items()}}
        every = {slot: asdict(part.options) for slot, part in parts.items() if part}
        return {slot: options for slot, options in every.items() if options}

    def wanted(self, space: SearchSpace) -> Budget:
        """The budget, or the middle of a space if the configuration has none."""
        return self.budget or Budget.nominal(sum(space.ends) / 2)

    @property
    def needs_calibration(self) -> bool:
        """Whether a part of the run reads the calibration text."""
        backends = [self.backend, *([self.estimate_with] if self.estimate_with else [])]
        return any(backend.needs for backend in backends) or self.refiner is not None or self.estimator.reads_text

    def plan(self, estimate: SensitivityEstimate, budget_bytes: int, costs: Sequence[Cost] = ()) -> Plan:
        """The allocator's plan within a budget and the limits of costs.

        Raises:
            ImpqError: there is none, or the allocator's plan exceeds a limit.
        """
        limits = limited(costs)
        plan = (self.allocator.allocate(estimate, budget_bytes, limits) if limits
                else self.allocator.allocate(estimate, budget_bytes))
        try:
            return replace(plan, costs=tuple(costs))
        except InvalidArrays as error:
            kind = type(self.allocator)
            raise ImpqError(f"{kind.__module__}.{kind.__qualname__}: {error}: this is a bug of that plugin") from error

    def measure(self, game: Game | None, probe: Probe, rng: np.random.Generator,
                costs: Sequence[Cost] = ()) -> SensitivityEstimate | Measurements:
        """The estimator's estimate, with feasible costs, or its measurements if a surrogate is to fit them.

        The game's budget is one of the played space: if the deployed backend has other sizes, it is at the same share
        of the way from the smallest plan to the largest.
        """
        result = self.estimator.measure(game, probe, rng, self._drift(game.budget_bytes if game else None, costs))
        if result.space.fingerprint != probe.space.fingerprint:
            raise ImpqError(f"{type(self.estimator).__module__}.{type(self.estimator).__qualname__} returned "
                            f"{type(result).__name__} of another search space than the one it was given: this is a bug "
                            "of that plugin")
        return result if isinstance(result, Measurements) else _feasible(result)

    def estimate(self, game: Game | None, probe: Probe, rng: np.random.Generator,
                 costs: Sequence[Cost] = ()) -> tuple[SensitivityEstimate, Measurements | None]:
        """The estimate, and the measurements that the surrogate fitted (None if the estimator made the estimate)."""
        result = self.measure(game, probe, rng, costs)
        return (result, None) if isinstance(result, SensitivityEstimate) else (self.fit(result), result)

    def fit(self, measurements: Measurements) -> SensitivityEstimate:
        """The surrogate's estimate, with feasible costs; raises ImpqError if the measurements are too few."""
        return _feasible(self.surrogate.fit(measurements))

    def _drift(self, budget_bytes: int | None, costs: Sequence[Cost]) -> Drift:
        before: list[IntArray] = []

        def drift(measurements: Measurements) -> float:
            if budget_bytes is None:
                return np.inf
            try:
                estimate = self.fit(measurements)
            except ImpqError:  # too few permutations for this surrogate
                return np.inf
            pick = self.plan(estimate, budget_bytes, costs).pick
            regret = float(np.diff(estimate.predict(np.stack([pick, *before[-1:]])))[0]) if before else np.inf
            before.append(pick)
            return regret

        return drift


def _feasible(estimate: SensitivityEstimate) -> SensitivityEstimate:
    """The estimate with feasible costs; warns if nearly all of them had the wrong sign."""
    if (gains := int((estimate.linear[:, -1] < 0).sum())) > 0.9 * len(estimate.space):
        warnings.warn(f"by the estimate, {gains} of {len(estimate.space)} layers have a lower loss at their narrowest "
                      "width than at their widest: is a sign wrong?", RuntimeWarning, stacklevel=3)
    return feasible(estimate)


def slots_of(config: RunConfig) -> dict[str, str]:
    """The slots of a run, and the role of the part in each."""
    slots = {role: role for role in ROLES}
    if config.estimate_with:
        slots[ESTIMATE_WITH] = "backend"
    if config.refine:
        slots["refiner"] = "refiner"
    return slots | {METER + name: "meter" for name in config.meters}


def name_in(config: RunConfig, slot: str) -> str:
    """Name of the part in a slot."""
    return slot.removeprefix(METER) if slot.startswith(METER) else str(getattr(config, slot))


def with_meters(config: RunConfig, plugins: Plugins) -> RunConfig:
    """The configuration with a meter for every limit.

    Raises:
        UsageError: no installed meter has the cost of a limit, or several have it and none of them is chosen.
    """
    if not config.limits:
        return config
    kinds = {name: plugins.load("meter", name, Meter) for name in config.meters}
    chosen = {str(kind.cost) for kind in kinds.values() if isinstance(getattr(kind, "cost", None), str)}
    open_ended = any(not isinstance(getattr(kind, "cost", None), str) for kind in kinds.values())
    added = []
    for name, text in config.limits.items():
        if name in chosen or open_ended:  # a meter whose cost depends on its options is checked when it is built
            continue
        known = {}
        for meter in plugins.names("meter"):
            if not plugins.find("meter", meter).missing():
                known[meter] = getattr(plugins.load("meter", meter, Meter), "cost", None)
        found = [meter for meter, cost in known.items() if cost == name]
        if len(found) != 1:
            costs = sorted({cost for cost in known.values() if isinstance(cost, str)})
            raise UsageError(f"--limit {name}={text}: " + (
                f"the meters {' and '.join(found)} have the cost '{name}': choose one with --meter" if found else
                f"no installed meter has the cost '{name}'{nearest(name, costs)}; --meter table takes any from a file"))
        added.append(found[0])
    return replace(config, meters=(*config.meters, *dict.fromkeys(added)))


def _check_meters(config: RunConfig, plugins: Plugins, meters: Mapping[str, Meter], menu: Sequence[Choice],
                  built: Mapping[str, Any]) -> None:
    """Raises UsageError if meters and limits do not fit each other, the menu or the parts that make plans."""
    costs: dict[str, str] = {}
    for name, meter in meters.items():
        meter.check(menu)
        if meter.cost in costs:
            raise UsageError(f"the meters {costs[meter.cost]} and {name} both have the cost '{meter.cost}': leave out "
                             "one of them")
        costs[meter.cost] = name
    for cost, text in config.limits.items():
        if cost not in costs:
            raise UsageError(f"--limit {cost}={text}: no meter of this run has the cost '{cost}'{nearest(cost, costs)}")
        parse_amount(text, meters[costs[cost]].unit, f"--limit {cost}")
    for role in ("allocator", "refiner"):
        if config.limits and built[role] is not None and not built[role].takes_limits:
            able = [name for name in plugins.names(role) if not plugins.find(role, name).missing()
                    and plugins.load(role, name, BASES[role]).takes_limits]
            raise UsageError(f"{role} '{getattr(config, role)}' keeps no limits: leave out --limit, or take one of "
                             f"{', '.join(able)}")


def assign_options(config: RunConfig, plugins: Plugins, pairs: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The configuration's options, by slot, with ``-o name=value`` pairs over them.

    ``slot.name`` gives the slot; a name alone must be an option of exactly one of the chosen parts.

    Raises:
        UsageError: no part has the option, or several have it.
    """
    slots = slots_of(with_meters(config, plugins))
    classes = {slot: plugins.load(role, name_in(config, slot), BASES[role]) for slot, role in slots.items()}
    result = {role: dict(options) for role, options in config.options.items()}
    for key, value in pairs.items():
        role, dot, name = key.rpartition(".")
        owners = [role] if dot else [r for r, part in classes.items() if name in option_names(part)]
        if dot and role not in slots:
            raise UsageError(f"option {key}: this run has no '{role}'{nearest(role, slots)}")
        if not owners:
            every = {n for part in classes.values() for n in option_names(part)}
            raise UsageError(f"none of the chosen parts has an option '{name}'{nearest(name, every)}")
        if len(owners) > 1:
            raise UsageError(f"several parts have an option '{name}': write "
                             + " or ".join(f"{owner}.{name}" for owner in owners))
        result.setdefault(owners[0], {})[name] = value
    return result


def build_part(config: RunConfig, plugins: Plugins, slot: str) -> Any:
    """The part of a slot with its options; raises UsageError if its name or an option is wrong."""
    name, role = name_in(config, slot), slots_of(config)[slot]
    part = plugins.load(role, name, BASES[role])
    return part(build_options(part, role, name, config.options.get(slot, {})))


def _menus(config: RunConfig, backend: Backend,
           estimate_with: Backend | None) -> tuple[tuple[Choice, ...], tuple[Choice, ...]]:
    """The choices of the menu of each of the two backends."""
    other, other_name = estimate_with or backend, config.estimate_with or config.backend
    wanted = config.bits or _unasked(config, backend, other)
    both = ((backend, config.backend), (other, other_name))
    where = f"plan {config.plan}" if config.plan and not config.bits else "--bits"
    menus = [tuple(named_choice(part, part_name, name, where) for name in wanted) for part, part_name in both]
    for pattern, name in config.pins.items():
        for part, part_name in both:
            named_choice(part, part_name, name, f"--pin {pattern}={name}")
    if len(set(menus[0])) < len(wanted):
        raise UsageError(f"--bits {','.join(wanted)} names a width twice")
    if len(wanted) < 2 and not config.plan:
        if not config.bits and other is not backend:
            raise UsageError(f"--estimate-with {other_name}: backends '{config.backend}' and '{other_name}' have fewer "
                             f"than two of the default widths of '{config.backend}' in common: give --bits with widths "
                             "that both have, or leave out --estimate-with")
        raise UsageError("--bits needs at least two widths to choose between")
    order = sorted(range(len(wanted)), key=lambda number: -menus[0][number].bits)
    return tuple(menus[0][number] for number in order), tuple(menus[1][number] for number in order)


def _unasked(config: RunConfig, backend: Backend, other: Backend) -> tuple[str, ...]:
    """The menu without ``--bits``: the backend's default menu as far as both backends have it; the choices of a given
    plan if it has others, those of pins aside."""
    default = tuple(name for name in backend.default_bits if other.choice(name))
    if not config.plan:
        return default
    known = [choice for name in (*default, *config.pins.values()) if (choice := backend.choice(name))]
    names = {}
    for given in Plan.read_layers(Path(config.plan)).values():
        if given:
            spelled = (given.name, f"{given.bits:g}@{given.group_size}")
            found = (choice for name in spelled if (choice := backend.choice(name)) and given.replaces(choice))
            names[given] = next(found, given)
    return default if set(names.values()) <= set(known) else tuple(choice.name for choice in names.values())


def named_choice(backend: Backend, backend_name: str, name: str, where: str = "--bits") -> Choice:
    """A backend's choice of a name; raises UsageError if there is none."""
    if choice := backend.choice(name):
        return choice
    raise UsageError(f"{where}: backend '{backend_name}' has no {in_bits(name)}"
                     + nearest(name, [choice.name for choice in backend.choices()]))


def load_exporter(name: str, backend: str, options: Mapping[str, Any], plugins: Plugins) -> Exporter:
    """The exporter of that name.

    Raises:
        ImpqError: the name is unknown, or the format cannot hold the variants of this backend with these options.
    """
    kind = plugins.load("exporter", name, Exporter)
    exporter: Exporter = kind(build_options(kind, "exporter", name, {}))
    if exporter.backends and exporter.backends != EVERY_BACKEND and backend not in exporter.backends:
        raise ImpqError(f"format '{name}' holds variants of {', '.join(sorted(exporter.backends))}, not of {backend}")
    exporter.check(options)
    return exporter


def load_crew(config: RunConfig, plugins: Plugins) -> Crew | None:
    """The crew of a configuration's workers, not yet at work; None if it has none.

    Raises:
        ImpqError: no crew has the name of the address's scheme, none is installed, or its library is missing.
    """
    if not config.shared:
        return None
    match = WORKERS.fullmatch(config.workers)
    name = (match and match[1]) or next(iter(plugins.names("crew")), "")
    if not name:
        raise ImpqError(f"--workers {config.workers}: no installed plugin has a crew of workers")
    kind = plugins.load("crew", name, Crew)
    crew: Crew = kind(build_options(kind, "crew", name, {}))
    return crew


def require_ends(exporter: Exporter, name: str, layer: str) -> None:
    """Raises ImpqError if a format cannot hold a quantized embedding or head.

    Args:
        exporter: of the format.
        name: of the format.
        layer: name of the embedding or head.
    """
    if not exporter.holds_ends:
        raise ImpqError(f"format '{name}' holds no quantized embedding and head, such as {layer} of this plan: leave "
                        "out --quantize-embeddings and the pins that name them, or choose another format")
