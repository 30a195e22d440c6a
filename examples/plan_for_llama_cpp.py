"""A plan for llama.cpp: widths for single tensors, as a file that llama-quantize reads.

    python examples/plan_for_llama_cpp.py --model ./my-model --budget 3.5bits

llama.cpp quantizes by itself, so what it takes is a recipe: a type for every tensor. Each tensor has its own, so layers
are single linears (``granularity="linear"``). Its k-quants have 2 to 6 bits, and q8_0 has 8; impq's backends share 2,
3, 4 and 8 with them.

No k-quants can be made from Python, so the plan is measured with something else, and rankings of layers depend on the
quantizer (docs/method.md). Of what there is, HQQ's losses are nearest: like k-quants it fits scales and zeros of small
groups, here of 32 weights, and shifts no error to other columns. GPTQ's sizes are nearest, where 3 bits lie in the
middle between 2 and 4. So layers are measured with HQQ (``estimate_with``), and the plan is made for and scored with
GPTQ: what holds from one quantizer to another may well hold for the third. It is a guess all the same, until
llama-perplexity has measured it beside a plain Q3_K_M; and on the demo model it did not hold even from HQQ to GPTQ: at
3 bits the plan lost to plain 3 bits by 0.29 ± 0.05 nats per token and was no better than random (2,032 tokens).

Rows of a k-quant are made of 256 weights. Where a tensor's are no multiple of that, llama-quantize does not follow the
recipe and takes a type of 4 bits or more; impq warns of it. In the demo model only the down projections fit: there the
recipe shows the way and is worth nothing.

Printed are the evaluation, the recipe's types and what they take, and the commands. On the demo model: 96 forwards,
some 12 minutes on two cores with matrix tiles.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import impq_core
from impq_core import RunConfig, TextConfig

STORED = {"2": 2.625, "3": 3.4375, "4": 4.5}  # bits a weight of q2_k, q3_k and q4_k, scales and all


def main(arguments: list[str] | None = None) -> None:
    """Plan, write the recipe, say how to use it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, a folder, or a hub name")
    parser.add_argument("--budget", default="3bits")
    parser.add_argument("--calibration", default="demo", help="text to measure on: demo or a file")
    parser.add_argument("--evaluation", default="demo", help="held-out text: demo or a file")
    parser.add_argument("--windows", type=int, default=64, help="windows drawn from each text")
    parser.add_argument("--length", type=int, default=256, help="tokens in a window")
    parser.add_argument("--output", type=Path, default=Path("impq-runs"))
    given = parser.parse_args(arguments)

    plugins = impq_core.console()
    result = impq_core.run(RunConfig(
        model=given.model, backend="gptq", estimate_with="hqq", bits=(2, 3, 4), budget=given.budget,
        granularity="linear", options={"backend": {"group_size": 32}, "estimate_with": {"group_size": 32}},
        calibration=TextConfig(given.calibration, given.windows, given.length), game_windows=min(8, given.windows),
        evaluation=TextConfig(given.evaluation, given.windows, given.length), output=given.output), plugins)
    recipe = impq_core.export_run(result.folder, "recipe-llama.cpp", plugins=plugins).folder / "tensor-types.txt"

    bits = {name: str(choice) for name, choice in result.plan.widths().items()}
    linears = [linear for layer in result.plan.space.everyone for linear in layer.linears]
    size = sum(linear.parameters * STORED[bits[linear.name]] for linear in linears) / 8e6
    types = Counter(line.rpartition("=")[2] for line in recipe.read_text().splitlines())
    print(f"\n{recipe}: " + ", ".join(f"{count} tensors {kind}" for kind, count in sorted(types.items())))
    print(f"quantized weights: {size:.2f} MB as k-quants, {result.plan.nbytes / 1e6:.2f} MB as GPTQ, as in the table")

    print(f"""
in a clone of llama.cpp, with the model as a folder:
  python convert_hf_to_gguf.py MODEL --outtype f16 --outfile model-f16.gguf
  llama-quantize --tensor-type-file {recipe} --token-embedding-type f16 model-f16.gguf model-impq.gguf Q4_K_M
what the recipe does not name follows Q4_K_M; --imatrix helps at 2 and 3 bits; llama-perplexity measures the result""")


if __name__ == "__main__":
    main()
