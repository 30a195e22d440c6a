"""Exports: stock software loads the measured model, and its bytes are the plan's."""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import promise
from impq_gptq.exporter import module_pattern
from safetensors import safe_open

from impq_core.config import RunConfig
from impq_core.errors import ImpqError, UsageError
from impq_core.exports.export import bare_checkpoint, evaluate_folder, export_run
from impq_core.interfaces import Variant
from impq_core.model.outline import stored_widths
from impq_core.model.source import locate_model
from impq_core.parts import Parts, load_exporter
from impq_core.plugins import Plugins
from impq_core.results import RunResult
from impq_core.runs.pipeline import run
from impq_core.space import Choice, LinearSpec
from impq_core.testing import tiny_model

ROOT = Path(__file__).parents[1]
IDS = np.random.default_rng(0).integers(0, 256, (2, 40))

STOCK = """
import sys
import numpy as np, torch
sys.path.insert(0, sys.argv[1])
from load_exported import FORMATS
torch.set_num_threads(1)
ids = torch.from_numpy(np.load(sys.argv[3]))
for folder in sys.argv[4:]:
    model = FORMATS[sys.argv[2]](folder)
    with torch.no_grad():
        np.save(folder + "/logits.npy", model(input_ids=ids).logits.float().numpy())
assert not any(name.startswith("impq") for name in sys.modules)
"""


@dataclass(frozen=True)
class Format:
    """A weight format under test: its backend and menu, the type of its software, and its tensors of a linear."""

    backend: str
    bits: tuple[str, ...]
    dtype: torch.dtype
    tolerance: float
    tensors: str
    options: dict[str, object] = field(default_factory=dict)
    nbytes: Callable[[LinearSpec, Choice], int] | None = None
    """Bytes of a linear in the file, if they differ from the backend's."""


MODULES = [*(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))]


def _without_zeros(linear: LinearSpec, choice: Choice) -> int:
    """Whole words of codes in each row, and 16-bit scales."""
    words = math.ceil(linear.columns / (32 // int(choice.bits)))
    return linear.rows * (4 * words + 2 * linear.columns // choice.group_size)


FORMATS = {
    # bfloat16 keeps 8 bits, and GPTQModel rounds the scales to it too: a per cent or two after 12 blocks.
    "gptq": Format("gptq", ("2@128", "2", "2@32", "3@128", "3", "4"), torch.bfloat16, 0.03,
                   r"\.(qweight|qzeros|scales|g_idx)$", {"grid": "min-max"}),
    # Products of 16-bit scales round to 11 bits.
    "compressed-tensors": Format("gptq", ("2", "2@32", "3", "4", "8"), torch.float32, 2e-3, r"\.weight_(packed|scale)$",
                                 {"grid": "min-max", "symmetric": True}, _without_zeros),
    "hqq": Format("hqq", ("2@128", "2", "2@32", "3@128", "3", "4", "8"), torch.float32, 1e-6, r"\.(W_q|scale|zero)$"),
    "quanto": Format("quanto", ("2", "4", "8"), torch.float16, 5e-3, r"\.weight\._(data|data\._data|scale|shift)$"),
}


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    """Root mean square of ``a - b``, relative to that of ``a``."""
    return float(np.sqrt(((a - b) ** 2).mean() / (a**2).mean()))


@pytest.mark.parametrize("name", FORMATS)
def test_stock_software_loads_what_was_measured(name: str, tiny_config: RunConfig, tmp_path: Path) -> None:
    form = FORMATS[name]
    np.save(tmp_path / "ids.npy", IDS)
    exported = []
    for architecture in ("llama", "qwen3", "gemma2"):
        blocks = 11 if (name, architecture) == ("gptq", "llama") else 2  # patterns must tell layers.1 from layers.10
        model = tiny_model(tmp_path / architecture, architecture, blocks=blocks)
        last = f"model.layers.{blocks - 1}.mlp.down_proj"
        config = replace(tiny_config, model=str(model), bits=form.bits, backend=form.backend, granularity="linear",
                         dtype="bfloat16", exclude=(last,), budget="100%", options={"backend": form.options})
        result = run(replace(config, plan=str(_every_width(config, blocks, tmp_path / f"{architecture}.json"))))
        assert set(result.plan.pick.tolist()) == set(range(len(form.bits)))
        out = tmp_path / f"{architecture}-out"
        exported.append((result, export_run(str(result.folder), name, out, Plugins()), last))
    folders = [str(export.folder) for _, export, _ in exported]
    arguments = [str(ROOT / "examples"), name, str(tmp_path / "ids.npy"), *folders]
    done = subprocess.run([sys.executable, "-c", STOCK, *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for result, export, last in exported:
        again = evaluate_folder(str(export.folder), Plugins())
        promised = promise(result, name)
        assert export.file_bytes <= promised <= 1.2 * export.file_bytes  # mostly header: the model is tiny
        assert export.score is not None and again.score is not None
        assert again.score.nll == export.score.nll and again.score.kl == export.score.kl
        backend, options = Parts.build(result.config, Plugins()).backend, result.config.options["backend"]
        bare = bare_checkpoint(result.plan, form.backend, options)
        variants = load_exporter(name, form.backend, options, Plugins()).restore(
            export.folder, replace(bare, widths=stored_widths(result.plan, backend)))
        ours, unquantized = (_logits(result, form.dtype, some) for some in (variants, {}))
        theirs = np.load(export.folder / "logits.npy")
        assert _apart(ours, theirs) <= form.tolerance < 0.1 < _apart(ours, unquantized)
        with safe_open(export.folder / "model.safetensors", framework="pt") as file:
            sizes = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        packed = sum(t.numel() * t.element_size() for key, t in sizes.items() if re.search(form.tensors, key))
        specs = {spec.name: spec for layer in result.plan.space.everyone for spec in layer.linears}
        nbytes = form.nbytes or backend.nbytes
        assert packed == sum(nbytes(specs[linear], variant.choice) for linear, variant in variants.items())
        excluded = sizes[f"{last}.weight"]
        assert form.nbytes or packed + 2 * excluded.numel() == result.plan.nbytes
    fewer = evaluate_folder(folders[-1], Plugins(), evaluation_windows=3, evaluation=None)
    assert fewer.text == again.text.replace("6 windows", "3 windows")


def _every_width(config: RunConfig, blocks: int, path: Path) -> Path:
    """A plan that gives the linears one width of the menu after another."""
    names = [f"model.layers.{block}.{module}" for block in range(blocks) for module in MODULES]
    menu = itertools.cycle(Parts.build(config, Plugins()).menu)
    layers = {name: None if name in config.exclude else {"bits": choice.bits, "group_size": choice.group_size}
              for name, choice in zip(names, menu, strict=False)}
    path.write_text(json.dumps({"layers": layers}))
    return path


def _logits(result: RunResult, dtype: torch.dtype, variants: Mapping[str, Variant]) -> np.ndarray:
    """The run's model as plain weights, computing as the format's software does."""
    model = locate_model(result.config.model).load(torch.bfloat16).to(dtype)
    backend = Parts.build(result.config, Plugins()).backend
    for layer in result.plan.space.layers:
        for spec in layer.linears:
            if spec.name in variants:
                model.get_submodule(spec.name).weight.data = backend.dequantize(variants[spec.name], spec).to(dtype)
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(IDS)).logits.float().numpy()


def test_patterns_match_one_module_and_no_other() -> None:
    pattern = module_pattern("model.layers.1.mlp.up_proj").removeprefix("+:")
    assert re.match(pattern, "model.layers.1.mlp.up_proj")
    for other in ("model.layers.10.mlp.up_proj", "model.layers.1.mlp.up_proj_b", "modelXlayers.1.mlp.up_proj"):
        assert not re.match(pattern, other)


def test_recipes_name_every_linear_with_its_width(tiny_config: RunConfig, tmp_path: Path) -> None:
    result = run(replace(tiny_config, granularity="linear", estimator="random", exclude=("model.layers.3*",),
                         options={"backend": {"grid": "min-max"}}))
    files = {"recipe-gptqmodel": "dynamic.json", "recipe-auto-round": "layer_config.json"}
    written = {}
    for name, file in files.items():
        export_run(str(result.folder), name, tmp_path / name, Plugins())
        written[name] = (tmp_path / name / file).read_text()
    bits = {layer.name: int(result.plan.space.choices[k].bits)
            for layer, k in zip(result.plan.space.layers, result.plan.pick, strict=True)}
    dynamic = json.loads(written["recipe-gptqmodel"])
    rounds = json.loads(written["recipe-auto-round"])
    assert len(dynamic) == len(rounds) == 28
    for name, width in bits.items():
        assert dynamic[module_pattern(name)]["bits"] == rounds[name]["bits"] == width
    assert dynamic[module_pattern("model.layers.3.mlp.up_proj").replace("+", "-")] == {}
    assert rounds["model.layers.3.mlp.up_proj"] == {"bits": 16}
    with pytest.raises(ImpqError, match="a recipe, not weights"):
        evaluate_folder(str(tmp_path / "recipe-gptqmodel"), Plugins())
    with pytest.raises(ImpqError, match=r"gptq.*--backend gguf"):
        export_run(str(result.folder), "recipe-llama.cpp", tmp_path / "x", Plugins())


def test_what_cannot_be_exported_or_loaded(tiny_config: RunConfig, tmp_path: Path) -> None:
    result = run(replace(tiny_config, estimator="random", backend="hqq", options={}))
    found = Plugins()
    with pytest.raises(UsageError, match="did you mean 'gptq'"):
        export_run(str(result.folder), "gtpq", tmp_path / "x", found)
    with pytest.raises(ImpqError, match="holds variants of auto-gptq, gptq, not of hqq"):
        export_run(str(result.folder), "gptq", tmp_path / "x", found)
    grouped = run(replace(tiny_config, estimator="random", backend="quanto", options={"backend": {"group_size": 64}}))
    with pytest.raises(ImpqError, match="group_size=128"):
        export_run(str(grouped.folder), "quanto", tmp_path / "x", found)
    asymmetric = run(replace(tiny_config, estimator="random", options={"backend": {"grid": "min-max"}}))
    with pytest.raises(ImpqError, match="symmetric=true"):
        export_run(str(asymmetric.folder), "compressed-tensors", tmp_path / "x", found)
    with pytest.raises(ImpqError, match="no run folder"):
        export_run(str(tmp_path), "gptq", tmp_path / "x", found)
    with pytest.raises(ImpqError, match="not empty"):
        export_run(str(result.folder), "recipe-auto-round", result.folder, found)
    for folder in (tmp_path, result.folder, tmp_path / "none"):
        with pytest.raises(ImpqError, match="no folder that impq exported"):
            evaluate_folder(str(folder), found)
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".x.*"))
