"""Load a checkpoint of ``impq export`` without impq, by the software of its format, and continue a text.

    python examples/load_exported.py gptq impq-runs/20260101-120000-ab12/gptq "The capital of France is"

Each function shows all that its format needs.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch


def gptq(folder: str) -> Any:
    """Load with GPTQModel, which computes in bfloat16."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, os.cpu_count() or 2)))
    from gptqmodel import BACKEND, GPTQModel

    return GPTQModel.load(folder, device="cpu", backend=BACKEND.GPTQ_TORCH).model


def compressed_tensors(folder: str) -> Any:
    """Load with transformers alone."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def quanto(folder: str) -> Any:
    """Load with optimum-quanto, which computes in float16, the type of its scales."""
    from optimum.quanto import QuantizedModelForCausalLM

    return QuantizedModelForCausalLM.from_pretrained(folder)


def hqq(folder: str) -> Any:
    """Load with hqq's linears in a transformers model; the width of each linear is in the file."""
    from hqq.core.quantize import HQQLinear
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    tensors = load_file(f"{folder}/model.safetensors")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    for name in [key.removesuffix(".W_q") for key in tensors if key.endswith(".W_q")]:
        model.set_submodule(name, HQQLinear(None, None, compute_dtype=torch.float32, device="cpu"))
    model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    return model.eval()


def dense(folder: str) -> Any:
    """Load with transformers alone, as any model."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


FORMATS = {"dense": dense, "gptq": gptq, "compressed-tensors": compressed_tensors, "quanto": quanto, "hqq": hqq}


def main() -> None:
    """Print the text with twenty more tokens, each the most likely one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("folder")
    parser.add_argument("text")
    given = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(given.folder)
    model = FORMATS[given.format](given.folder)
    ids = tokenizer(given.text, return_tensors="pt").input_ids
    for _ in range(20):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(dim=-1)], dim=1)
    print(tokenizer.decode(ids[0]))


if __name__ == "__main__":
    main()
