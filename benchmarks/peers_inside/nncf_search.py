"""NNCF's mixed precision: a share of the weights at its 4 bits, the rest at its 8 bits, by a score of every linear from
its weights and inputs. It has these two widths alone, so they stand for the narrowest and the widest of the job.

The head and the embedding take no part; NNCF gives them its wider width by a rule of its own.
"""

from __future__ import annotations

from typing import Any

import nncf
import numpy as np
import torch
from job import Job, run
from transformers import AutoModelForCausalLM


def ask(job: Job) -> dict[str, Any]:
    torch.set_num_threads(1)
    tokens = torch.from_numpy(np.load(job["tokens"]))
    low, high = job["widths"][0], job["widths"][-1]
    metric = job["options"].get("metric")
    raw = {}
    for budget in job["budgets"]:
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
        model.config.use_cache = False
        compressed = nncf.compress_weights(
            model, mode=nncf.CompressWeightsMode.INT4_ASYM, ratio=(high - budget) / (high - low),
            group_size=job["group_size"], dataset=nncf.Dataset([{"input_ids": row[None]} for row in tokens]),
            subset_size=len(tokens), sensitivity_metric=nncf.SensitivityMetric(metric) if metric else None)
        raw[str(budget)] = {name: type(module).__name__ for name, module in compressed.named_modules()
                            if type(module).__name__.endswith("Decompressor")}
    return {"raw": raw, "cost": {"forwards": len(tokens), "backwards": 0}}


if __name__ == "__main__":
    run("nncf", ask)
