"""mlx-lm's dynamic_quant: the KL divergence of the model at the narrower width and its gradients, a score for every
linear, and a threshold. It has two widths, the narrowest and the widest of the job.

It would also quantize the embedding, which the head is tied to; here that stays as it is, and takes no part.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from job import Job, run
from mlx.utils import tree_flatten
from mlx_lm.quant.dynamic_quant import estimate_sensitivities
from mlx_lm.utils import load_model


def ask(job: Job) -> dict[str, Any]:
    mx.set_default_device(mx.cpu)
    model, _ = load_model(Path(job["model"]))
    wanted = set(job["linears"])
    for name, module in tree_flatten(model.leaf_modules(), is_leaf=lambda part: hasattr(part, "parameters")):
        if hasattr(module, "to_quantized") and name not in wanted:
            kind = type(module)
            module.__class__ = type(kind.__name__, (kind,), {"to_quantized": property(_absent)})
    model.set_dtype(mx.float32)
    tokens = mx.array(np.load(job["tokens"]))
    batch = job["options"].get("batch", 4)
    scores = estimate_sensitivities(model, tokens, job["widths"][0], job["group_size"], job["widths"][-1],
                                    job["group_size"], batch_size=batch)
    found = {name: score for name, score in scores if name in wanted}
    return {"raw": {str(budget): found for budget in job["budgets"]},
            "cost": {"forwards": 2 * len(tokens), "backwards": len(tokens)}}


def _absent(self: Any) -> None:
    raise AttributeError("to_quantized")


if __name__ == "__main__":
    run("mlx-lm", ask)
