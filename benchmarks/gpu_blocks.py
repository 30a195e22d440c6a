"""Time and memory of blocks of the shape of Llama-3-8B's, for ``gpu.py``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from impq_core.config import RunConfig, TextConfig
from impq_core.interfaces import Backend, Statistics
from impq_core.model.device import resolve_device, resolve_dtype
from impq_core.plugins import Plugins
from impq_core.runs.footprint import HOST, MemoryPlan, plan_memory
from impq_core.runs.footprint import memory as forecast
from impq_core.runs.prepare import prepare
from impq_core.runs.session import Session
from impq_core.runs.work import work_of
from impq_core.space import LinearSpec
from impq_core.testing import made_text
from impq_core.testing.tiny import byte_tokenizer

BITS = (2.0, 3.0, 4.0)
BACKENDS = ("gptq", "hqq", "quanto")

@dataclass(frozen=True)
class Shape:
    """The shape of a block, and the tokens of its forward."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    windows: int
    length: int
    vocabulary: int = 259

    def __str__(self) -> str:
        return (f"hidden {self.hidden}, intermediate {self.intermediate}, {self.heads} heads, {self.kv_heads} key-value"
                f" heads; {self.windows} windows of {self.length} tokens")

    def config(self, blocks: int) -> LlamaConfig:
        return LlamaConfig(vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.intermediate,
                           num_hidden_layers=blocks, num_attention_heads=self.heads, bos_token_id=256, eos_token_id=257,
                           num_key_value_heads=self.kv_heads, tie_word_embeddings=False)


LLAMA_8B, SMALL = Shape(4096, 14336, 32, 8, 8, 512), Shape(128, 256, 4, 2, 2, 32)
BLOCKS = 6
"""Number of blocks of the model of the memory step; streaming that many takes less memory than keeping them."""


@dataclass(frozen=True)
class Spent:
    """Seconds, and the largest number of bytes on the device; None if it does not count them."""

    seconds: float
    peak: int | None


def measure(device: torch.device, work: Callable[[], Any], repeats: int = 1) -> Spent:
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
    return Spent(seconds, torch.accelerator.max_memory_allocated(device) if counts else None)


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


def block(name: str, tiny: bool, folder: Path) -> dict[str, Any]:
    """Time and memory of a block: forward, quantizing and unpacking. Each backend quantizes linears that share their
    inputs together, as a run does, at all widths and at each alone."""
    device, shape = resolve_device(name), SMALL if tiny else LLAMA_8B
    dtype = resolve_dtype("auto", device)
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(shape.config(1)).to(dtype).eval().requires_grad_(False)
        ids = torch.randint(0, 256, (shape.windows, shape.length))
    tokens, linears = shape.windows * shape.length, _linears(model)
    weights = sum(module.weight.numel() for _, module in linears)
    run = torch.inference_mode()(lambda: model.model(input_ids=ids, use_cache=False))
    inputs: dict[str, torch.Tensor] = {}
    with watched(model, inputs):
        run()
    rows: list[dict[str, Any]] = []

    def add(stage: str, what: str, spent: Spent, **more: float) -> None:
        rows.append({"stage": stage, "what": what, "seconds": spent.seconds, "peak": spent.peak, **more})
        print(rows[-1], flush=True)

    forward = measure(device, run, 5)
    add("forward", str(dtype).removeprefix("torch."), forward, tflops=2 * tokens * weights / forward.seconds / 1e12)
    grams: dict[int, Statistics] = {}

    def statistics() -> None:
        for x in inputs.values():
            if id(x) not in grams:
                flat = x.flatten(0, 1).float()
                grams[id(x)] = Statistics(flat.T @ flat, tokens)

    add("statistics", "second moments", measure(device, statistics))
    sharing: dict[int, list[LinearSpec]] = {}
    for linear, module in linears:
        sharing.setdefault(id(inputs[linear]), []).append(LinearSpec(linear, *module.weight.shape))
    modules = dict(linears)
    for backend_name in BACKENDS:
        backend = Plugins().load("backend", backend_name, Backend)()
        menu = sorted((choice for choice in backend.choices() if choice.bits in BITS), key=lambda choice: choice.bits)
        for choices in [menu, *([choice] for choice in menu)]:
            made: list[Any] = []

            def quantize(choices: Any = choices, made: list[Any] = made, backend: Any = backend) -> None:
                for key, specs in sharing.items():
                    floats = {spec: modules[spec.name].weight.float() for spec in specs}
                    wanted = [(spec, choice) for spec in specs for choice in choices]
                    made.extend(backend.quantize_together(floats, wanted, grams[key] if backend.needs else None))

            spent = measure(device, quantize)
            columns = sum(specs[0].columns for specs in sharing.values())
            add(f"quantize {backend_name}", ", ".join(str(choice) for choice in choices) + " bits", spent,
                us_per_column=1e6 * spent.seconds / columns, ns_per_weight=1e9 * spent.seconds / weights)
            if len(choices) > 1:
                continue
            there = [(spec, replace(variant, tensors={key: tensor.to(device) for key, tensor
                                                      in variant.tensors.items()})) for spec, variant in made]

            def unpack(there: Any = there, backend: Any = backend) -> None:
                for spec, variant in there:
                    backend.dequantize(variant, spec)

            unpack()
            spent = measure(device, unpack, 3)
            add(f"unpack {backend_name}", f"{choices[0]} bits", spent, ns_per_weight=1e9 * spent.seconds / weights)
    return {"shape": str(shape), "weights": weights, "rows": rows, "ok": True}


def memory(name: str, tiny: bool, folder: Path) -> dict[str, Any]:
    """The largest number of bytes on the device in each stage of a run, with resident and with streamed weights, beside
    the forecast; of a model of some blocks of the 8B shape, with the vocabulary of Llama-3."""
    device = resolve_device(name)
    shape = replace(SMALL, vocabulary=259) if tiny else replace(LLAMA_8B, vocabulary=128256)
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(shape.config(BLOCKS)).to(torch.bfloat16)
    model.to("cpu").save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    del model
    texts = folder / "calibration.txt", folder / "evaluation.txt"
    for seed, path in enumerate(texts):
        path.write_text(made_text(seed, 100_000))
    config = RunConfig(model=str(folder / "model"), backend="gptq", bits=("2", "3", "4"), granularity="group",
                       estimator="aumann-shapley", calibration=TextConfig(str(texts[0]), 4 if tiny else 64, 256),
                       game_windows=4 if tiny else 8, evaluation=TextConfig(str(texts[1]), 4 if tiny else 16, 256),
                       device=name, dtype="auto", tracking_uri="none", cache=False,
                       options={"backend": {"group_size": 64}})
    return {"shape": str(shape), "blocks": BLOCKS, "ok": True, "stages": [
        row for streamed in (False, True) for row in _stages(config, device, streamed)]}


def _stages(config: RunConfig, device: torch.device, streamed: bool) -> list[dict[str, Any]]:
    plugins = Plugins()
    prepared = prepare(config, plugins)
    room = plan_memory(prepared).room
    if streamed:  # the least memory that the forecast permits
        peaks = [sum(size for content, size in sizes.items() if content not in HOST)
                 for sizes in forecast(prepared, work_of(prepared), MemoryPlan(True, room)).values()]
        prepared = prepare(replace(config, memory=f"{max(peaks) + 2**20}B"), plugins)
    plan = plan_memory(prepared)
    assert plan.streamed == streamed or device.type == "cpu"
    expected = forecast(prepared, work_of(prepared), plan)
    found: dict[str, Spent] = {}
    session: list[Session] = []
    found["load"] = measure(device, lambda: session.append(Session(prepared, plugins)))
    found["quantize"] = measure(device, session[0].quantize_deployed)
    found["estimate"] = measure(device, lambda: session[0].probe().slopes(np.array([0.5, 0.25, 0.25])))
    game = session[0].game()
    picks = np.random.default_rng(0).integers(0, 3, (8, len(prepared.space)))
    found["game"] = measure(device, lambda: game.losses(picks))
    space = prepared.space
    found["evaluate"] = measure(device, lambda: [session[0].evaluator().score(space.assignment(pick))
                                                 for pick in picks[:2]])
    return [{"streamed": plan.streamed, "stage": stage, "seconds": spent.seconds, "peak": spent.peak,
             "forecast": sum(size for content, size in expected.get(stage, {}).items() if content not in HOST)}
            for stage, spent in found.items()]
