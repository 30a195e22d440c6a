"""Round trips of the formats gptq, compressed-tensors, hqq and quanto on the real model: export, ``impq evaluate``, and
the format's own software.

The plan mixes all widths of the menu over single linears. The software of the format runs in a process without impq.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Printer, heading, table, write
from safetensors import safe_open

from impq_core.config import RunConfig, TextConfig
from impq_core.exports.export import bare_checkpoint, export_run
from impq_core.parts import Parts, load_exporter
from impq_core.plugins import Plugins
from impq_core.references import random_plan
from impq_core.runs.pipeline import prepare
from impq_core.types import Plan

EXAMPLES = Path(__file__).parents[1] / "examples"
LOGITS = 2
"""Number of windows for the comparison of logits."""

STOCK = """
import json, sys
import numpy as np, torch
sys.path.insert(0, sys.argv[1])
from load_exported import FORMATS
ids = torch.from_numpy(np.load(sys.argv[3]))
model, nll, kept = FORMATS[sys.argv[2]](sys.argv[4]), [], []
for window in ids:
    with torch.no_grad():
        logits = model(input_ids=window[None]).logits[0].float()
    nll.append(float(torch.nn.functional.cross_entropy(logits[:-1], window[1:])))
    kept = kept if len(kept) == int(sys.argv[6]) else [*kept, logits.numpy()]
np.save(sys.argv[5], np.stack(kept))
assert not any(name.startswith("impq") for name in sys.modules)
print(json.dumps(float(np.mean(nll))))
"""


@dataclass(frozen=True)
class Format:
    backend: str
    bits: tuple[float, ...]
    dtype: torch.dtype
    tensors: str
    options: Mapping[str, Any] = field(default_factory=dict)


FORMATS = {
    "gptq": Format("gptq", (2.0, 3.0, 4.0), torch.bfloat16, r"\.(qweight|qzeros|scales|g_idx)$"),
    "compressed-tensors": Format("gptq", (3.0, 4.0, 8.0), torch.float32, r"\.weight_(packed|scale)$",
                                 {"symmetric": True}),
    "hqq": Format("hqq", (3.0, 4.0, 8.0), torch.float32, r"\.(W_q|scale|zero)$"),
    "quanto": Format("quanto", (2.0, 4.0, 8.0), torch.float16, r"\.weight\._(data|data\._data|scale|shift)$"),
}


def measure(name: str, form: Format, folder: Path) -> list[str]:
    config = RunConfig(tracking_uri="none", backend=form.backend, bits=form.bits, granularity="linear",
                       estimator="random", allocator="greedy", evaluation=TextConfig(windows=16),
                       options={"backend": form.options})
    plugins = Plugins()
    plugins.watch(Printer())
    prepared = prepare(config, plugins)
    pick = random_plan(prepared.space, prepared.budget_bytes, np.random.default_rng(0))
    plan = Plan(prepared.space, pick, prepared.budget_bytes, method="random")
    source = folder / "run"
    source.mkdir()
    (source / "impq.toml").write_text(prepared.config.to_toml())
    plan.save(source / "plan.json")
    export = export_run(str(source), name, folder / "out", plugins)
    assert export.score is not None
    again = subprocess.run([sys.executable, "-m", "impq_core.cli", "evaluate", str(export.folder)], check=True,
                           capture_output=True, text=True).stdout.split()[1]
    ids = prepared.evaluation.ids
    np.save(folder / "ids.npy", ids)
    stock = subprocess.run([sys.executable, "-c", STOCK, str(EXAMPLES), name, str(folder / "ids.npy"),
                            str(export.folder), str(folder / "logits.npy"), str(LOGITS)],
                           check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    model = prepared.source.load(torch.bfloat16).to(form.dtype)
    unquantized = logits_of(model, ids)
    backend = Parts.build(config, plugins).backend
    variants = load_exporter(name, form.backend, prepared.config.options["backend"], plugins).restore(
        export.folder, bare_checkpoint(plan, form.backend, {}))
    for layer in prepared.space.layers:
        for spec in layer.linears:
            model.get_submodule(spec.name).weight.data = backend.dequantize(variants[spec.name], spec).to(form.dtype)
    ours, theirs = logits_of(model, ids), np.load(folder / "logits.npy")
    with safe_open(export.folder / "model.safetensors", framework="pt") as file:
        packed = sum(file.get_tensor(key).nbytes for key in file.keys() if re.search(form.tensors, key))  # noqa: SIM118
    counts = "/".join(str(int((pick == k).sum())) for k in range(len(form.bits)))
    menu = "/".join(f"{c}" for c in prepared.space.choices)
    return [name, f"{counts} at {menu}", f"{plan.nbytes:,}", f"{packed:,}", f"{export.file_bytes / 1e6:.1f}",
            f"{export.score.nll:.4f}", again, f"{json.loads(stock):.4f}", str(form.dtype).removeprefix("torch."),
            f"{apart(ours, theirs):.1e}", f"{apart(ours, unquantized):.1e}"]


def logits_of(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return np.stack([model(input_ids=torch.from_numpy(window)[None]).logits[0].float().numpy()
                         for window in ids[:LOGITS]])


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """Root mean square of ``a - b``, relative to that of ``a``."""
    return float(np.sqrt(((a - b) ** 2).mean() / (a**2).mean()))


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    lines = heading("Round trips of weight formats on SmolLM2-135M", "python benchmarks/roundtrip.py")
    lines += [" ".join([
        "A plan that mixes all widths over the 210 linears, requantized in sequence and exported. NLL in nats",
        "per token on 16 windows of 256 tokens of the demo's Wikipedia text: of the model in memory at export",
        "(bfloat16 forwards), by `impq evaluate` in a fresh process, and by the stock software in a process",
        "without impq, in the type it computes in. *Logits apart*: relative root mean square difference between",
        "the stock software's logits and those of a plain model with the dequantized weights in the same type.",
        "*From unquantized*: the same difference to the unquantized model.",
    ]), ""]
    header = ["format", "linears", "plan bytes", "bytes in file", "file MB", "NLL at export", "`impq evaluate`",
              "stock", "stock type", "logits apart", "from unquantized"]
    rows: list[list[str]] = []
    for name, form in FORMATS.items():
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(name, form, Path(folder)))
        write("roundtrip.md", [*lines, *table(header, rows)])


if __name__ == "__main__":
    main()
