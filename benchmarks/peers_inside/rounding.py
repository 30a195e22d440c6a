"""auto-round's learned rounding at one width: the weights of the model's linears, quantized by it and dequantized.

``options``: ``bits``, ``steps`` (a block), ``batch`` (windows a step), ``blocks`` (the first ones alone; 0 for all).
The weights are written in float32 beside the answer, as a .safetensors file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from job import Job, run


def ask(job: Job) -> dict[str, Any]:
    from auto_round import AutoRound
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    options, tokens = job["options"], torch.from_numpy(np.load(job["tokens"]))
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    if options["blocks"]:
        model.model.layers = model.model.layers[:options["blocks"]]
        model.config.num_hidden_layers = options["blocks"]
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    rounding = AutoRound(
        model, AutoTokenizer.from_pretrained(job["model"]), iters=options["steps"], batch_size=options["batch"],
        scheme={"bits": options["bits"], "group_size": job["group_size"], "sym": False, "data_type": "int"},
        dataset=torch.utils.data.DataLoader(rows, batch_size=options["batch"]), seqlen=tokens.shape[1],
        nsamples=len(tokens), device_map="cpu", enable_torch_compile=False, amp=False)
    quantized, _ = rounding.quantize()
    modules = dict(quantized.named_modules())
    wanted = [name for name in job["linears"] if name in modules]
    weights = {name: modules[name].weight.detach().float().contiguous() for name in wanted}
    levels = [max(len(torch.unique(group)) for group in weights[name][0].split(job["group_size"])) for name in wanted]
    if max(levels) > 2 ** options["bits"]:
        raise SystemExit(f"a group has {max(levels)} levels: the weights are not quantized")
    file = Path(job["answer"]).with_suffix(".safetensors")
    save_file(weights, file)
    return {"weights": str(file), "cost": {"steps": options["steps"], "blocks": len(quantized.model.layers)}}


if __name__ == "__main__":
    run("auto-round", ask)
