"""A smoke run on an accelerator, in under five minutes: equal plans and near-equal losses on both devices, and the time
and memory of a block of the shape of Llama-3-8B's. Without an accelerator: one line, exit code 1.

``--device cpu --tiny`` tries the script itself without one, with small shapes, and writes no file.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import torch
from common import heading, table, write
from transformers import LlamaConfig, LlamaForCausalLM

from impq_core.budget import Budget
from impq_core.config import RunConfig, TextConfig
from impq_core.errors import ImpqError
from impq_core.interfaces import Allocator, Backend, Sampler, Statistics, Surrogate
from impq_core.model.demo import demo_path
from impq_core.model.device import hardware, resolve_device, resolve_dtype
from impq_core.model.source import locate_model
from impq_core.plugins import Plugins
from impq_core.runs.prepare import prepare
from impq_core.runs.session import Session
from impq_core.space import IntArray, LinearSpec
from impq_core.testing import PlantedGame, planted_estimate, tiny_model
from impq_core.types import SensitivityEstimate

BITS = (2.0, 3.0, 4.0)
BACKENDS = ("gptq", "hqq")
QUANTIZED = 2
"""Blocks of the real model that are quantized: GPTQ on the processor is slow."""

RTOL = 1e-3
"""Of losses on two devices, float32."""


@dataclass(frozen=True)
class Shape:
    """The shape of a block, and the tokens of its forward."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    windows: int
    length: int

    def __str__(self) -> str:
        return (f"hidden {self.hidden}, intermediate {self.intermediate}, {self.heads} heads, {self.kv_heads} key-value"
                f" heads; {self.windows} windows of {self.length} tokens")


LLAMA_8B, SMALL = Shape(4096, 14336, 32, 8, 8, 512), Shape(128, 256, 4, 2, 2, 32)


@dataclass(frozen=True)
class Stage:
    """What a stage took: seconds, and the largest number of bytes on the device; None if it does not count them."""

    seconds: float
    peak: int | None

    @property
    def memory(self) -> str:
        return "" if self.peak is None else f"{self.peak / 1e9:.2f}"


def measure(device: torch.device, work: Callable[[], Any], repeats: int = 1) -> Stage:
    """Time a piece of work on a device: the mean of ``repeats``."""
    counts = device.type != "cpu"
    if counts:
        torch.accelerator.reset_peak_memory_stats(device)
        torch.accelerator.synchronize(device)
    start = time.monotonic()
    for _ in range(repeats):
        work()
    if counts:
        torch.accelerator.synchronize(device)
    seconds = (time.monotonic() - start) / repeats
    return Stage(seconds, torch.accelerator.max_memory_allocated(device) if counts else None)


def loss_on(device: torch.device, truth: SensitivityEstimate) -> Callable[[IntArray], float]:
    """The loss of a planted game, computed on a device in float32."""
    assert truth.pairwise is not None
    n, m = truth.linear.shape
    linear = torch.tensor(truth.linear, dtype=torch.float32, device=device).flatten()
    pairs = torch.tensor(truth.pairwise, dtype=torch.float32, device=device).reshape(n * m, n * m)

    def loss(pick: IntArray) -> float:
        chosen = torch.tensor(np.eye(m)[pick], dtype=torch.float32, device=device).flatten()
        return float(3.0 + chosen @ linear + chosen @ pairs @ chosen / 2)

    return loss


def planted(device: torch.device) -> str:
    """Equal plans from a game whose losses are computed on either device."""
    truth = planted_estimate(0, 24, (4, 2), strength=0.05, rising=True)
    plugins = Plugins()
    sampler, surrogate, allocator = (plugins.load(role, name, kind) for role, name, kind in (
        ("estimator", "spqe", Sampler), ("surrogate", "regression", Surrogate), ("allocator", "qp", Allocator)))
    plans, losses = [], []
    for where in (torch.device("cpu"), device):
        game = PlantedGame(truth.space, loss_on(where, truth))
        measured = sampler(sampler.Options(permutations=16)).sample(game, np.random.default_rng(0))
        budget = Budget.parse("3bits").resolve(truth.space)
        plans.append(allocator().allocate(surrogate().fit(measured), budget).pick)
        losses.append(measured.losses)
    np.testing.assert_array_equal(*plans)
    apart = float(np.abs(losses[0] - losses[1]).max())
    return ("A planted game of 24 layers, whose losses are computed on the device: SPQE, the regression surrogate and "
            f"the QP make the same plan on both; losses differ by at most {apart:.1e} nats.")


def model_of(folder: Path, tiny: bool) -> tuple[str, str]:
    """The model and what it is: the demo if it is in the cache, else a random one."""
    if demo_path().is_dir() and not tiny:
        return "demo", "SmolLM2-135M"
    return str(tiny_model(folder / "model", blocks=3)), "a tiny random Llama (the demo model is not in the cache)"


def losses(config: RunConfig) -> tuple[Session, np.ndarray]:
    plugins = Plugins()
    prepared = prepare(config, plugins)
    session = Session(prepared, plugins)
    session.quantize_deployed()
    picks = np.random.default_rng(0).integers(0, len(prepared.space.choices), (6, len(prepared.space)))
    game = session.game()
    return session, np.append(game.losses(picks) + game.reference_loss, game.reference_loss)


def real(device: torch.device, tiny: bool) -> list[str]:
    """Near-equal losses and equal bytes of the same model on both devices."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        name, shown = model_of(folder, tiny)
        text = "\n".join(topics.topics.values())
        for role, part in (("calibration", text[:len(text) // 2]), ("evaluation", text[len(text) // 2:])):
            (folder / f"{role}.txt").write_text(part)
        blocks = locate_model(name).skeleton().config.num_hidden_layers
        for backend in BACKENDS:
            config = RunConfig(
                model=name, backend=backend, bits=(2.0, 4.0), granularity="group", estimator="spqe", dtype="float32",
                exclude=tuple(f"model.layers.{block}.*" for block in range(QUANTIZED, blocks)), partial=True,
                calibration=TextConfig(str(folder / "calibration.txt"), 8, 128), game_windows=2, cache=False,
                evaluation=TextConfig(str(folder / "evaluation.txt"), 2, 128), tracking_uri="none")
            (first, ours), (second, theirs) = (losses(replace(config, device=str(where))) for where in ("cpu", device))
            np.testing.assert_allclose(theirs, ours, rtol=RTOL)
            assert first.bank.nbytes == second.bank.nbytes
            rows.append([backend, f"{first.bank.nbytes:,}", f"{100 * _equal_share(first, second):.2f}%",
                         f"{np.abs(theirs / ours - 1).max():.1e}"])
    return [f"Losses of {shown} in float32, {QUANTIZED} of {blocks} blocks quantized at 2 and 4 bits on each device by "
            "itself: seven picks, relative differences.", "",
            *table(["backend", "bytes of variants, the same on both", "equal tensor elements",
                    "largest difference of losses"], rows)]


def _equal_share(first: Session, second: Session) -> float:
    """Share of equal elements of all stored tensors of two banks."""
    equal = total = 0
    for layer in first.prepared.space.layers:
        for linear in layer.linears:
            for choice in first.prepared.space.choices:
                for name, tensor in first.bank.stored(linear, choice).tensors.items():
                    other = second.bank.stored(linear, choice).tensors[name].cpu()
                    equal += int((tensor.cpu() == other).sum())
                    total += tensor.numel()
    return equal / total


@contextmanager
def watched(model: LlamaForCausalLM, inputs: dict[str, torch.Tensor]) -> Iterator[None]:
    """Keep the inputs of the block's linears."""
    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            inputs[name] = args[0]
        return hook

    hooks = [module.register_forward_pre_hook(keep(name)) for name, module in _linears(model)]
    yield
    for hook in hooks:
        hook.remove()


def _linears(model: LlamaForCausalLM) -> list[tuple[str, torch.nn.Linear]]:
    return [(name, module) for name, module in model.model.layers[0].named_modules()
            if isinstance(module, torch.nn.Linear)]


def block(device: torch.device, shape: Shape) -> list[str]:
    """Time and memory of a block: forward, quantizing and unpacking."""
    dtype = resolve_dtype("auto", device)
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=256, hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=1,
            num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads)).to(dtype).eval().requires_grad_(False)
        ids = torch.randint(0, 256, (shape.windows, shape.length))
    tokens = shape.windows * shape.length
    linears = _linears(model)
    weights = sum(module.weight.numel() for _, module in linears)
    run = torch.inference_mode()(lambda: model.model(input_ids=ids, use_cache=False))
    inputs: dict[str, torch.Tensor] = {}
    with watched(model, inputs):
        run()
    forward = measure(device, run, 5)
    rows = [["forward", str(dtype).removeprefix("torch."), f"{1e3 * forward.seconds:.1f} ms",
             f"{2 * tokens * weights / forward.seconds / 1e12:.1f} TFLOP/s", forward.memory]]

    grams: dict[str, Statistics] = {}

    def statistics() -> None:
        for name, x in inputs.items():
            flat = x.flatten(0, 1).float()
            grams[name] = Statistics(flat.T @ flat, tokens)

    spent = measure(device, statistics)
    rows.append(["statistics", "second moments", f"{spent.seconds:.2f} s", "", spent.memory])
    inputs.clear()
    for name in BACKENDS:
        backend = Plugins().load("backend", name, Backend)()
        for choice in sorted(choice for choice in backend.choices() if choice.bits in BITS):
            made: list[Any] = []

            def quantize(backend: Any = backend, choice: Any = choice, made: list[Any] = made) -> None:
                made.extend(backend.quantize(module.weight.float(), choice, grams[linear] if backend.needs else None)
                            for linear, module in linears)

            quantizing = measure(device, quantize)
            specs = [LinearSpec(linear, *module.weight.shape) for linear, module in linears]
            there = [replace(variant, tensors={key: tensor.to(device) for key, tensor in variant.tensors.items()})
                     for variant in made]

            def unpack(backend: Any = backend, there: list[Any] = there, specs: list[Any] = specs) -> None:
                for variant, spec in zip(there, specs, strict=True):
                    backend.dequantize(variant, spec)

            unpack()
            unpacking = measure(device, unpack, 3)
            rows.append([f"quantize {name}", f"{choice} bits", f"{quantizing.seconds:.2f} s",
                         f"{1e9 * quantizing.seconds / weights:.1f} ns a weight", quantizing.memory])
            rows.append([f"unpack {name}", f"{choice} bits", f"{1e3 * unpacking.seconds:.1f} ms",
                         f"{1e9 * unpacking.seconds / weights:.3f} ns a weight", unpacking.memory])
    return [f"One block of {weights / 1e6:.1f} M weights: {shape}. Linears are quantized one by one, each with its own "
            "random weights and the inputs that they see. Memory is the most that was allocated on the device during "
            "the stage, with what stood there before.", "",
            *table(["stage", "", "time", "", "GB at the peak"], rows)]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto", help="as impq's [auto]")
    parser.add_argument("--tiny", action="store_true", help="small shapes, and no file")
    given = parser.parse_args(words)
    try:
        device = resolve_device(given.device)
    except ImpqError as error:
        print(error, file=sys.stderr)
        return 1
    if device.type == "cpu" and not given.tiny:
        print("torch can use no accelerator here: nothing to measure (--device cpu --tiny tries the script)",
              file=sys.stderr)
        return 1
    start = time.monotonic()
    lines = [*heading("On an accelerator", "python benchmarks/gpu.py", hardware(device)), "## Plans", "",
             planted(device), "", "## Losses", "", *real(device, given.tiny), "## A block", "",
             *block(device, SMALL if given.tiny else LLAMA_8B)]
    lines.append(f"The whole script took {time.monotonic() - start:.0f} s.")
    if given.tiny:
        print("\n".join(lines))
    else:
        write("gpu.md", lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
