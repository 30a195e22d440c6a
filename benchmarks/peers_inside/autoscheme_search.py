"""auto-round's AutoScheme: for each format the gradients of the loss in the quantized model, one backward pass a batch
of windows and a format, and a dynamic program. Tied linears are its ``shared_layers``.

Its average bits are those of codes (``ignore_scale_zp_bits``), of the linears alone. Scores are kept beside the
windows, so that a second budget, or ties, cost a program alone; ``cost`` has the seconds that an earlier job took.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from job import Job, run


def ask(job: Job) -> dict[str, Any]:
    scores = Path(job["tokens"]).with_suffix(".scores")
    spent = scores / "seconds.json"
    earlier = json.loads(spent.read_text()) if spent.is_file() else 0.0
    os.environ["AR_AUTO_SCHEME_CACHE"] = str(scores)
    os.environ["AR_DISABLE_DATASET_SUBPROCESS"] = "1"
    from auto_round.auto_scheme.gen_auto_scheme import AutoScheme, GenScheme
    from auto_round.calib_dataset import register_dataset
    from auto_round.schemes import QuantizationScheme
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    tokens = np.load(job["tokens"])

    @register_dataset("windows_of_job")
    def windows(*_: Any, **__: Any) -> Dataset:
        return Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in tokens.tolist()])

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    options = [QuantizationScheme(bits=bits, group_size=job["group_size"], sym=False, data_type="int", act_bits=16)
               for bits in job["widths"]]
    raw = {}
    for budget in job["budgets"]:
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
        scheme = AutoScheme(
            avg_bits=budget, options=options, shared_layers=job["tied"] or None, ignore_scale_zp_bits=True,
            batch_size=job["options"].get("batch", 4), nsamples=len(tokens), seqlen=tokens.shape[1], device_map="cpu",
            enable_torch_compile=False)
        found = GenScheme(scheme, model, list(job["linears"]), {}, dataset="windows_of_job", device_map="cpu",
                          tokenizer=tokenizer, enable_torch_compile=False).get_layer_config()
        raw[str(budget)] = {name: {"bits": entry["bits"]} for name, entry in found.items()}
    if not earlier:
        spent.write_text(json.dumps(round(time.process_time(), 1)))
    passes = len(tokens) * len(job["widths"])
    return {"raw": raw, "cost": {"forwards": passes, "backwards": passes, "earlier": earlier}}


if __name__ == "__main__":
    run("auto-round", ask)
