"""Memory and disk that a run takes, by arithmetic from the shapes of its model. No weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from impq_core.budget import parse_bytes
from impq_core.errors import ImpqError
from impq_core.game.model_game import PICKS
from impq_core.interfaces import Backend
from impq_core.machine import free_device_memory
from impq_core.model.backward import BATCH_TOKENS
from impq_core.model.blockwise import HEAD_ROWS, HEAD_ROWS_ELSEWHERE, ROOM
from impq_core.model.weight_files import MAPPED
from impq_core.runs.layout import Layout
from impq_core.runs.work import in_sequence, windows_probed, work_of
from impq_core.space import FUSED, Choice, LinearSpec
from impq_core.workload import Workload

LIBRARIES = 650_000_000
"""Resident bytes of Python with torch, transformers, MLflow and a backend's library: measured, 560 MB without the
last."""

ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number, by dtype of the forwards."""

GRAPH = {"float32": (18.1, 12.0), "bfloat16": (13.1, 6.0), "float16": (13.1, 6.0)}
"""Bytes that a forward with gradients keeps for each token and block, by dtype: as many times the hidden width, and as
many times the width inside the feed-forward. Measured on three shapes of Llama; float16 is taken to be as bfloat16."""

ALLOCATIONS = 12
"""Allocations that are scored on held-out text: a plan, its references, and the unquantized model."""

LOGITS = 6
"""Float32 copies of the logits of a few positions that exist at once."""

VARIANT_FILE = 600
"""Bytes that a variant's file in the cache has beside its tensors."""

VARIANT_ROW = 200
"""Bytes of a row of variants.json."""

FOLDER = 50_000
"""Bytes of the other files of a run that do not grow with its measurements."""

NUMBER = 22
"""Bytes of a float64 as text."""

Bytes = Mapping[str, int]
"""Bytes by content."""

_ENGINES = {part: fused for fused, parts in FUSED.items() for part in parts}

HOST = ("libraries", "weights_file", "variants", "signs")
"""Contents that are in host memory whatever the device."""


@dataclass(frozen=True)
class MemoryPlan:
    """How a run uses memory.

    Args:
        streamed: whether weights of blocks stay on disk until the block works.
        room: bytes of hidden states that wait for later blocks or other windows (``BlockwiseModel``).
        shortfall: what is needed and what is free, if the run does not fit into what is free now; else empty.
    """

    streamed: bool
    room: int
    shortfall: str = ""


def plan_memory(layout: Layout) -> MemoryPlan:
    """All weights resident if the run then fits into its memory; else blocks stay on disk until they work. A mapped
    file of weights is not counted: the system takes its pages back.

    Raises:
        ImpqError: the run does not fit into the ``--memory`` that the user gave.
    """
    config, device = layout.config, layout.device
    limit = parse_bytes(config.memory, "memory") if config.memory else free_device_memory(device)
    weights = ITEM[config.dtype] * layout.shapes.parameters
    room = max(ROOM, min(weights, limit or weights) // 4)
    if limit is None:
        return MemoryPlan(False, room)
    elsewhere = ("weights_file",) if device.type == "cpu" else HOST
    for streamed in (False, True):
        plan = MemoryPlan(streamed, room)
        sizes = {stage: sum(size for name, size in content.items() if name not in elsewhere)
                 for stage, content in memory(layout, work_of(layout), plan).items()}
        stage = max(sizes, key=sizes.__getitem__)
        if sizes[stage] <= limit:
            return plan
    line = (f"about {sizes[stage] / 1e9:.1f} GB of memory are needed on {device} ({stage}), with blocks on disk until "
            f"they work; {limit / 1e9:.1f} GB are {'given' if config.memory else 'free'}")
    if config.memory:
        raise ImpqError(f"{line}: give more --memory, fewer or shorter windows, or a smaller model")
    return replace(plan, shortfall=line)


def memory(layout: Layout, work: Workload | None, plan: MemoryPlan) -> dict[str, Bytes]:
    """Resident bytes at the peak of each stage, by content: on the device, but for the contents in ``HOST``.

    Counted are the libraries, the model's resident weights, a block with its unpacked and packed weights, hidden
    states, statistics, gradients and logits. Not counted are the texts and the arrays of surrogates and allocators.

    Args:
        layout: of the run.
        work: of the estimator; None if it is unknown, which is taken for gradients, the largest.
        plan: of the memory.
    """
    config, shapes = layout.config, layout.shapes
    item = ITEM[config.dtype]
    token = shapes.hidden * item  # a hidden state
    calibration = config.calibration.windows * config.calibration.length
    played = config.game_windows * config.calibration.length
    file = layout.source.file_bytes or item * shapes.parameters
    block = max(block.weights for block in shapes.blocks)
    resident = shapes.parameters - sum(block.weights for block in shapes.blocks) * plan.streamed
    base = {"libraries": LIBRARIES, "model": item * resident}
    if ends := [end.parameters for end in layout.ends]:  # other weights than their own, one in float32 at first
        base["ends"] = item * sum(ends) + (item < 4) * 4 * max(ends)
    rows = HEAD_ROWS if layout.device.type == "cpu" else HEAD_ROWS_ELSEWHERE
    loaded = {**base, "block": item * block * (2 if plan.streamed else 1) + _block_packed(layout),
              "logits": rows * shapes.vocabulary * 4 * LOGITS}
    stages: dict[str, Bytes] = {"check": {"libraries": LIBRARIES, "weights_file": min(file, MAPPED)},
                                "load": {**base, "weights_file": file * resident // shapes.parameters}}
    kept = 0  # without a cache, variants are in memory
    for number, (backend, menus) in enumerate(_made(layout)):
        kept = 0 if config.cache else _packed(layout, backend, menus)
        reads = bool(backend.needs)
        stages["quantize_deployed" if number else "quantize"] = {
            **base, "variants": kept, "block": loaded["block"],
            "hidden_states": 2 * calibration * token * reads,
            "statistics": _statistics(layout) * reads,
            "quantizer": _solver(layout, reads)}
    loaded["variants"] = kept
    known = 2 * (1 + len(shapes.blocks))  # in front of every block, of the last pick and of the one before
    picks = PICKS if work is None else min(PICKS, 2 + int(work.losses.sum()))  # the reference, the plan, and the game
    path = (known + picks + (config.value == "kl")) * played * token
    if layout.plan is None or layout.parts.needs_calibration:
        estimate = {**loaded, "hidden_states": path if layout.parts.needs_calibration else 0}
        stages["estimate"] = estimate if layout.plan else {**estimate, **_gradients(layout, work, plan)}
    if config.refine:  # two games
        stages["refine"] = {**loaded, "hidden_states": 2 * (known + PICKS + (config.value == "kl")) * played * token}
    if in_sequence(layout):
        exact = "drift" in layout.parts.backend.needs
        widest = max(sum(shared[0][0].columns for shared in block.values()) for block in _inputs(layout).values())
        stages["evaluate_sequence"] = {
            **base, "variants": kept + max(layout.space.nbytes.sum(axis=0)), "block": loaded["block"],
            "hidden_states": (2 + 2 * exact) * calibration * token + exact * calibration * widest * item,
            "statistics": (1 + exact) * _statistics(layout), "quantizer": (1 + exact) * _solver(layout, True)}
    held_out = len(config.evaluation.texts) * config.evaluation.windows * config.evaluation.length * token
    side_by_side = min(ALLOCATIONS, max(1, plan.room // held_out))
    stages["evaluate"] = {**loaded, "hidden_states": (3 + side_by_side) * held_out}
    return {stage: {name: size for name, size in sizes.items() if size} for stage, sizes in stages.items()}


def disk(layout: Layout, work: Workload | None, runs: int, scores: int, exports: int = 0) -> Bytes:
    """Bytes on disk: variants in the cache, the logs and results in the folders of runs, and exports.

    The cache is taken to hold nothing of this model yet. Not counted are MLflow's copies of results, and figures.

    Args:
        layout: of the run.
        work: of the estimator; None if it is unknown.
        runs: number of runs that share the estimate.
        scores: number of allocations that are scored on held-out text.
        exports: number of checkpoints that are written.
    """
    n, m = layout.space.nbytes.shape
    config = layout.config
    backends = _made(layout)
    count = sum(len(choices) for made in backends for choices in layout.stored(*made).values())
    packed = sum(_packed(layout, backend, menus) for backend, menus in backends)
    held_out = len(config.evaluation.texts) * config.evaluation.windows
    folder = runs * (FOLDER + VARIANT_ROW * count) + scores * held_out * NUMBER
    if work:
        folder += round(float(work.losses.sum()) * (config.game_windows * NUMBER + 3 * n))
        folder += (work.slopes + work.squares) * windows_probed(config) * n * m * NUMBER
    return {"cache_bytes": (packed + VARIANT_FILE * count) * config.cache, "run_bytes": folder,
            "export_bytes": exports * (layout.budget_bytes + (
                layout.whole.account.fixed if layout.whole else layout.rest_bytes))}


def _made(layout: Layout) -> list[tuple[Backend, Sequence[Sequence[Choice]]]]:
    """The backends that make variants, with the choices of each layer; the deployed backend is the last."""
    played: list[tuple[Backend, Sequence[Sequence[Choice]]]] = []
    if layout.measures_another_backend:
        played.append((layout.game_backend, layout.game_menus))
    return [*played, (layout.parts.backend, layout.deployed_menus)]


def _packed(layout: Layout, backend: Backend, menus: Sequence[Sequence[Choice]]) -> int:
    """Bytes of all variants of a backend."""
    return sum(backend.nbytes(linear, choice) for linear, choices in layout.stored(backend, menus).items()
               for choice in choices)


def _block_packed(layout: Layout) -> int:
    """Bytes of the variants of a block at its widest choices."""
    backend, sizes = layout.parts.backend, Counter[int]()
    stored = layout.stored(backend, layout.deployed_menus)
    for layer in layout.space.everyone:
        sizes[layer.block] += sum(backend.nbytes(linear, stored[linear][0]) for linear in layer.linears
                                  if stored[linear])
    return max(sizes.values())


def _inputs(layout: Layout) -> dict[int, dict[str, list[tuple[LinearSpec, int]]]]:
    """Linears, and the number of their choices, by block and by what they read: q, k and v read one input."""
    found: dict[int, dict[str, list[tuple[LinearSpec, int]]]] = {}
    stored = layout.stored(layout.parts.backend, layout.deployed_menus)
    for layer in layout.space.everyone:
        for linear in layer.linears:
            parent, _, leaf = linear.name.rpartition(".")
            found.setdefault(layer.block, {}).setdefault(f"{parent}.{_ENGINES.get(leaf, leaf)}", []).append(
                (linear, len(stored[linear])))
    return found


def _statistics(layout: Layout) -> int:
    """Bytes of the second moments of the inputs of a block's linears, and of two more while one is summed up."""
    blocks: Iterator[list[int]] = ([4 * shared[0][0].columns**2 for shared in block.values()]
                                   for block in _inputs(layout).values())
    return max(sum(sizes) + 2 * max(sizes) for sizes in blocks)


def _solver(layout: Layout, reads: bool) -> int:
    """Bytes of the float32 copies that quantizers make: two of the weights of linears that share their inputs, for each
    choice, and two of their Hessian; on the processor, of as many such sets of linears as there are threads."""
    side_by_side = torch.get_num_threads() if layout.device.type == "cpu" else 1

    def takes(shared: Sequence[tuple[LinearSpec, int]]) -> int:
        weights = sum(4 * linear.parameters * (1 + 2 * count) for linear, count in shared)
        return weights + 8 * shared[0][0].columns**2 * reads

    return max(sum(sorted(map(takes, block.values()))[-side_by_side:]) for block in _inputs(layout).values())


def _gradients(layout: Layout, work: Workload | None, plan: MemoryPlan) -> dict[str, int]:
    """Bytes that an estimator with gradients takes: states in front of every block, the graph of a batch in a block,
    the changes of a block's weights, and weights in float32."""
    config, shapes = layout.config, layout.shapes
    if work and not work.backwards:
        return {}
    traces = bool(work and work.traces)
    item = 4 if traces else ITEM[config.dtype]
    length = config.calibration.length
    tokens = min(max(1, BATCH_TOKENS // length), windows_probed(config)) * length
    hidden, inner = GRAPH["float32" if traces else config.dtype]
    inputs = (3 * shapes.hidden + shapes.intermediate) * item  # of linears, kept for the gradients of their weights
    kept = hidden * shapes.hidden + inner * shapes.intermediate + inputs  # of a token in a block
    states = (1 + len(shapes.blocks)) * windows_probed(config) * length * shapes.hidden * item
    block = max(block.weights for block in shapes.blocks)
    ends = [end.parameters for end in layout.ends]
    largest = max(linear.parameters for layer in layout.space.everyone if layer not in layout.ends
                  for linear in layer.linears)
    choices = len(layout.space.choices)
    ways = 1 if traces else choices
    sizes = {"graph": round(tokens * kept),
             "probe_states": min(states, max(plan.room, states // windows_probed(config))) + 2 * tokens * item,
             "changes": max(item * block * ways + 4 * largest * (1 + choices),
                            (item * ways + 3 * 4) * max(ends, default=0))}
    if ends:  # what the embedding returns at each choice, while states in front of every block are kept
        sizes["probe_states"] += 4 * ways * sizes["probe_states"] // (item * (1 + len(shapes.blocks)))
    if config.value == "kl":
        sizes["unquantized_states"] = windows_probed(config) * length * shapes.hidden * ITEM[config.dtype]
    if traces:
        sizes["float32_model"] = 4 * (shapes.parameters - sum(block.weights for block in shapes.blocks) + block
                                      + sum(ends))
        sizes["signs"] = layout.space.parameters
    return sizes
