"""Full-model forwards that the stages of a run cost, by arithmetic from the shapes of its model."""

from __future__ import annotations

import math

from impq_core.config import RunConfig
from impq_core.evaluate import RANDOM_PLANS
from impq_core.game.model_game import PICKS
from impq_core.model.shapes import Shapes
from impq_core.runs.layout import Layout
from impq_core.space import SearchSpace
from impq_core.workload import Workload

BLOCK_STAGES = 4
"""Stages of most blocks, see ``calibration.stages``: q, k, v; o; gate, up; down."""


def work_of(layout: Layout) -> Workload | None:
    """The work of the run's estimator; None if a plan is given, or if it is unknown."""
    config = layout.config
    spare = config.calibration.windows - config.held_back - config.game_windows - config.referee_windows
    sets = 1 + max(0, spare) // config.game_windows
    return None if layout.plan else layout.parts.estimator.workload(layout.game_space, sets)


def windows_probed(config: RunConfig) -> int:
    """Number of calibration windows that gradients and activations are read on."""
    return config.probe_windows or config.calibration.windows - config.held_back - config.referee_windows


def work_forwards(work: Workload, shapes: Shapes, config: RunConfig, space: SearchSpace) -> float:
    """Full-model forwards of the game's windows that an estimator's work costs.

    Args:
        work: of the estimator.
        shapes: of the model.
        config: decides the windows and the value of the game.
        space: the layers that play.
    """
    inside = sum(layer.parameters for layer in space.layers if 0 <= layer.block < len(shapes.blocks))
    head_plays = any(layer.block >= len(shapes.blocks) or (layer.block < 0 and shapes.tied) for layer in space.layers)
    cost = shapes.cost(config.calibration.length)
    divergence = config.value == "kl"
    game = sum(count * (cost.behind(block) + cost.head) for block, count in enumerate(work.losses))
    # The unquantized model's logits are made again for each batch of picks, here taken to be full, and for each choice
    # of the head in it.
    game += divergence * math.ceil(work.losses.sum() / PICKS) * cost.head * (len(space.choices) if head_plays else 1)
    if divergence and work.sets:  # the unquantized states of each set of windows, and of the first once more
        game += (work.sets + (work.sets > 1)) * cost.behind(0)
    passes, length = work.slopes + 2 * work.traces, config.calibration.length
    probe = passes * shapes.slopes_flops(length, inside, config.value, head_plays)
    probe += work.squares * shapes.slopes_flops(length, inside * len(space.choices), "nll",
                                                head_plays * len(space.choices))
    if work.curvatures:
        squares = sum(linear.columns**2 for layer in space.layers for linear in layer.linears)
        probe += shapes.slopes_flops(length, work.curvatures * squares, "nll")
    probe += (work.states + (divergence and passes > 0)) * cost.behind(0)
    probe = probe * windows_probed(config) + work.products
    return float(game + probe / config.game_windows) / cost.total


def statistics_forwards(layout: Layout) -> float:
    """Forwards in which statistics for quantizing are collected: every block once over the calibration text, and once
    more at the widest width, on the way to the next block or to a head that is a layer."""
    config, cost = layout.config, layout.shapes.cost(layout.config.calibration.length)
    backends = {layout.game_backend, layout.parts.backend}
    passes = sum(bool(backend.needs) for backend in backends)
    windows = config.calibration.windows / config.game_windows
    last = 0 if layout.head_is_layer else cost.blocks[-1]
    return passes * windows * (2 * cost.behind(0) - last) / cost.total


def plan_forwards(layout: Layout, work: Workload | None, plans: int) -> float:
    """Forwards in which the losses of plans are measured in the game; that of the reference too, if the estimator has
    measured none."""
    if not layout.parts.needs_calibration:
        return 0.0
    config, cost = layout.config, layout.shapes.cost(layout.config.calibration.length)
    divergence = config.value == "kl"
    measured = bool(work.losses.any()) if work else not layout.plan
    losses = plans + (not measured)
    return float(losses * (cost.behind(0) + cost.head)
                 + divergence * (plans * cost.head + (not measured) * cost.behind(0))) / cost.total


def references(layout: Layout, budgets: int = 1) -> int:
    """The number of allocations beside the plan that a table has: uniform models, mixes, and for each budget those of
    first/last-high and random plans."""
    return len(layout.space.choices) + len(layout.between) + len(layout.mixes) + (1 + RANDOM_PLANS) * budgets


def in_sequence(layout: Layout) -> bool:
    """Whether a run scores plan and references as an export makes them, each block quantized behind the quantized ones
    in front of it. If the user leaves it open, it does if that costs no more forwards than the search. A backend that
    reads no activations makes the same variants either way."""
    backend, wanted = layout.parts.backend, layout.config.sequential
    if not backend.needs:
        return False
    if wanted != "auto":
        return wanted == "yes"
    work = work_of(layout)
    if work is None:
        return False
    search = work_forwards(work, layout.shapes, layout.config, layout.game_space)
    return (1 + references(layout)) * sequence_forwards(layout) <= search


def sequence_forwards(layout: Layout) -> float:
    """Forwards of the game's windows in which one plan is quantized in sequence: every block over the calibration text
    for the statistics of each stage and once more on the way to the next block; with drift, also in the unquantized
    model."""
    config, backend = layout.config, layout.parts.backend
    cost, exact = layout.shapes.cost(config.calibration.length), "drift" in backend.needs
    stages = BLOCK_STAGES if backend.stages else 1
    passes = stages + exact + 1 + backend.stages
    windows = config.calibration.windows / config.game_windows
    return float(passes * windows * cost.behind(0)) / cost.total


def fallback_forwards(layout: Layout, plans: int) -> float:
    """Forwards that the tests of plans against uniform models cost: two allocations and the unquantized model on the
    held-back windows."""
    config = layout.config
    if not config.held_back or not layout.parts.needs_calibration:
        return 0.0
    cost = layout.shapes.cost(config.calibration.length)
    done = 3 * (cost.behind(0) + cost.head) * config.held_back / (config.game_windows * cost.total)
    return float(plans * (done + (2 * sequence_forwards(layout) if in_sequence(layout) else 0.0)))


def evaluation_forwards(layout: Layout, scores: int, first: bool, sequential: bool) -> float:
    """Forwards of the game's windows that held-out scores cost: the blocks and the head of each allocation, and those
    of the unquantized model once. In sequence each other allocation is quantized first."""
    config, length = layout.config, layout.config.evaluation.length
    cost, game = layout.shapes.cost(length), layout.shapes.cost(config.calibration.length)
    done = (scores + first) * (cost.behind(0) + cost.head)
    quantized = scores * sequence_forwards(layout) if sequential else 0.0
    windows = config.evaluation.windows * len(config.evaluation.texts)
    return quantized + done * windows / (config.game_windows * game.total)
