"""Memory and disk that a run takes, by arithmetic from the shapes of its model. No weight is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from impq_core.config import RunConfig
from impq_core.game.probe import BATCH_TOKENS
from impq_core.interfaces import Backend
from impq_core.runs.layout import Layout
from impq_core.space import FUSED, Choice, LinearSpec
from impq_core.workload import Workload

LIBRARIES = 650_000_000
"""Resident bytes of Python with torch, transformers, MLflow and a backend's library: measured, 560 MB without the
last."""

ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number, by dtype of the forwards."""

GRAPH = {"float32": (18.1, 12.0), "bfloat16": (13.1, 6.0), "float16": (13.1, 6.0)}
"""Bytes that a forward with gradients keeps for each token and block, by dtype: as many times the hidden width, and as
many times the width inside the feed-forward. Measured on three shapes of Llama; float16 is
taken to be as bfloat16."""

LOGITS = 4
"""Float32 copies of a batch's logits that exist at once in a backward; those of a model in float32 are one of them."""

HEAP = 0.5
"""Bytes that the C library keeps beside each byte of variants and unpacked weights, because memory that was given back
lies between them: measured from 0.5 to 0.9 on models of 0.3 and 1 billion weights."""

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


def memory(layout: Layout, work: Workload | None) -> dict[str, Bytes]:
    """Resident bytes at the peak of each stage, by content.

    Counted are the libraries, the model, its file while it is mapped to be read, the packed variants, the unpacked
    copies that stand in the model, memory between them that was given back and is not used again, hidden states,
    statistics, gradients and logits. Not counted are the texts and the arrays of surrogates and allocators.

    Args:
        layout: of the run.
        work: of the estimator; None if it is unknown, which is taken for gradients, the largest.
    """
    config, shapes = layout.config, layout.shapes
    item = ITEM[config.dtype]
    token = shapes.hidden * item  # a hidden state
    calibration = config.calibration.windows * config.calibration.length
    played = config.game_windows * config.calibration.length
    file = layout.source.file_bytes or item * shapes.parameters
    model = {"libraries": LIBRARIES, "model": item * shapes.parameters}
    unpacked = item * sum(layer.parameters for layer, menu in zip(layout.space.everyone, layout.deployed_menus,
                                                                  strict=True) if menu)
    linears = [linear for layer in layout.space.everyone for linear in layer.linears]
    largest = max(linears, key=lambda linear: linear.parameters)
    stages: dict[str, Bytes] = {"check": {"libraries": LIBRARIES, "weights_file": file},
                                "load": {**model, "weights_file": file}}
    variants = []
    for backend, menus in _made(layout):
        variants.append(_packed(layout, backend, menus))
        reads = bool(backend.needs)
        stages["quantize" if len(variants) == 1 else "quantize_deployed"] = {
            **model, **_quantized(variants[-1], unpacked),
            "hidden_states": 2 * calibration * token * reads,
            "statistics": _statistics(layout) * reads,
            "quantizer": max(_solver(linear, reads) for linear in linears)}
    standing = {**model, **_quantized(variants[0], unpacked)}
    if layout.plan is None or layout.parts.needs_calibration:
        estimate = {**standing, "hidden_states": 0}
        if layout.parts.needs_calibration:  # states in front of every block, and behind the last of the unquantized
            estimate["hidden_states"] = (1 + len(shapes.blocks) + (config.value == "kl")) * played * token
        if layout.plan is None:
            estimate |= _gradients(layout, work, largest)
        stages["estimate"] = estimate
    standing |= _quantized(variants[-1], unpacked)
    if config.refine:  # two games
        stages["refine"] = {**standing, "hidden_states": 2 * (1 + len(shapes.blocks)) * played * token}
    stages["evaluate"] = {**standing, "hidden_states": 4 * config.evaluation.windows * config.evaluation.length * token}
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
    count = sum(len(menu) * len(layer.linears) for _, menus in backends
                for layer, menu in zip(layout.space.everyone, menus, strict=True))
    packed = sum(_packed(layout, backend, menus) for backend, menus in backends)
    folder = runs * (FOLDER + VARIANT_ROW * count) + scores * config.evaluation.windows * NUMBER
    if work:
        folder += round(float(work.losses.sum()) * (config.game_windows * NUMBER + 3 * n))
        folder += work.slopes * windows_probed(config) * n * m * NUMBER
    return {"cache_bytes": (packed + VARIANT_FILE * count) * config.cache, "run_bytes": folder,
            "export_bytes": exports * (layout.budget_bytes + layout.rest_bytes)}


def windows_probed(config: RunConfig) -> int:
    """Number of calibration windows that gradients and activations are read on."""
    every = config.calibration.windows - (config.game_windows if config.refine else 0)
    return min(config.probe_windows or every, every)


def _made(layout: Layout) -> list[tuple[Backend, Sequence[Sequence[Choice]]]]:
    """The backends that make variants, with the choices of each layer; the deployed backend is the last."""
    played: list[tuple[Backend, Sequence[Sequence[Choice]]]] = []
    if layout.measures_another_backend:
        played.append((layout.game_backend, layout.game_menus))
    return [*played, (layout.parts.backend, layout.deployed_menus)]


def _packed(layout: Layout, backend: Backend, menus: Sequence[Sequence[Choice]]) -> int:
    """Bytes of all variants of a backend."""
    return sum(backend.nbytes(linear, choice) for layer, menu in zip(layout.space.everyone, menus, strict=True)
               for linear in layer.linears for choice in menu)


def _quantized(variants: int, unpacked: int) -> dict[str, int]:
    return {"variants": variants, "unpacked": unpacked, "heap": round(HEAP * (variants + unpacked))}


def _statistics(layout: Layout) -> int:
    """Bytes of the second moments of the inputs of a block's linears, and of two more while one is summed up."""
    grams: dict[int, set[tuple[str, int]]] = {}
    for layer in layout.space.everyone:
        for linear in layer.linears:
            parent, _, leaf = linear.name.rpartition(".")
            grams.setdefault(layer.block, set()).add((f"{parent}.{_ENGINES.get(leaf, leaf)}", linear.columns))
    blocks: Iterator[list[int]] = ([4 * columns**2 for _, columns in block] for block in grams.values())
    return max(sum(sizes) + 2 * max(sizes) for sizes in blocks)


def _solver(linear: LinearSpec, reads: bool) -> int:
    """Bytes of float32 copies that the quantizer of a linear makes: four of its weight, and four of its Hessian if it
    reads one."""
    return 16 * linear.parameters + 16 * linear.columns**2 * reads


def _gradients(layout: Layout, work: Workload | None, largest: LinearSpec) -> dict[str, int]:
    """Bytes that an estimator with gradients takes: the graph of a batch, its logits, and weights in float32."""
    config, shapes = layout.config, layout.shapes
    if work and not work.slopes and not work.traces:
        return {}
    item = ITEM[config.dtype]
    length = config.calibration.length
    tokens = min(max(1, BATCH_TOKENS // length), windows_probed(config)) * length
    hidden, inner = GRAPH["float32" if work and work.traces else config.dtype]
    inputs = (3 * shapes.hidden + shapes.intermediate) * item  # of linears, kept for the gradients of their weights
    kept = hidden * shapes.hidden + inner * shapes.intermediate + inputs  # of a token in a block
    sizes = {"graph": round(tokens * len(shapes.blocks) * kept),
             "logits": tokens * shapes.vocabulary * (4 * LOGITS + (item if item < 4 else 0)),
             "changes": 4 * largest.parameters * (1 + len(layout.space.choices))}
    if config.value == "kl":
        sizes["unquantized_states"] = windows_probed(config) * length * shapes.hidden * item
    if work and work.traces:
        sizes["float32_model"] = 4 * shapes.parameters
    return sizes
