"""NVIDIA ModelOpt's AutoQuantize in gradient mode: a score for each format of each group of linears from one backward
pass, and a linear program. It ties q, k, v and gate, up by rules of its own.

The formats are searched by patterns of the linears, without the choice to leave one unquantized. All other linears,
such as the head, are disabled and left out of the budget: a global search quantizes and counts them, too.
"""

from __future__ import annotations

from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import torch
from job import Job, run
from modelopt.torch.quantization.algorithms import _resolve_best_recipe
from transformers import AutoModelForCausalLM


def ask(job: Job) -> dict[str, Any]:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    tokens = torch.from_numpy(np.load(job["tokens"]))
    formats = [{"quant_cfg": [{"quantizer_name": "*", "enable": False},
                              {"quantizer_name": "*weight_quantizer", "enable": True,
                               "cfg": {"num_bits": bits, "block_sizes": {-1: job["group_size"]}}}],
                "algorithm": "max"} for bits in job["widths"]]
    others = [name for name, module in model.named_modules()
              if isinstance(module, torch.nn.Linear) and name not in set(job["linears"])]
    passes = {"forwards": 0, "backwards": 0}

    def forward(model: Any, batch: Any) -> Any:
        passes["forwards"] += 1
        return model(input_ids=batch, labels=batch)

    def loss(output: Any, batch: Any) -> Any:
        passes["backwards"] += 1
        return output.loss

    _, state = mtq.auto_quantize(
        model, quantization_formats=formats, data_loader=[row[None] for row in tokens], forward_step=forward,
        loss_func=loss, disabled_layers=others, constraints={
            "effective_bits": job["budgets"][0], "cost": {"excluded_module_name_patterns": others}},
        module_search_spaces=[{"module_name_patterns": list(job["linears"]), "quantization_formats": formats,
                               "allow_no_quant": False}],
        num_calib_steps=len(tokens), num_score_steps=len(tokens))
    raw = {}
    for budget in job["budgets"]:
        recipes = _resolve_best_recipe(state, {"effective_bits": budget})
        found = [{"modules": state["candidate_stats"][name]["module_names"], "bits": recipe.num_bits}
                 for name, recipe in recipes.items()]
        raw[str(budget)] = [group for group in found if not set(group["modules"]) & set(others)]
    return {"raw": raw, "cost": passes}


if __name__ == "__main__":
    run("nvidia-modelopt", ask)
