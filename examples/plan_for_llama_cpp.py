"""A plan for llama.cpp: widths for single tensors, as a file for llama-quantize.

    python examples/plan_for_llama_cpp.py --model ./my-model --budget 3.5bits

llama.cpp quantizes by itself, so impq writes a recipe: a type for every tensor. Each tensor has its own type, so layers
are single linears (``granularity="linear"``). The k-quants have 2 to 6 bits, and q8_0 has 8; impq's backends have 2, 3,
4 and 8 of these.

Python cannot make k-quants, so the plan is measured with another quantizer, although rankings of layers depend on the
quantizer (docs/method.md). HQQ's losses are the nearest: like k-quants, HQQ fits scales and zeros of small groups, here
of 32 weights, and moves no error to other columns. GPTQ's sizes are the nearest, because its 3 bits are midway between
2 and 4. So the layers are measured with HQQ (``estimate_with``), and the plan is made for GPTQ and scored with it: a
plan that holds for two quantizers may hold for a third. Measure the result with llama-perplexity against a plain
Q3_K_M before you rely on it. On the demo model the plan did not hold even from HQQ to GPTQ: at 3 bits it was worse than
uniform 3 bits by 0.29 ± 0.05 nats per token, and no better than a random plan (2,032 tokens).

Rows of a k-quant consist of blocks of 256 weights. If the rows of a tensor are no multiple of 256, llama-quantize
ignores the recipe and takes a type of 4 bits or more; impq prints a warning. In the demo model only the down
projections fit, so its recipe is of no use beyond the demonstration.

The script prints the evaluation, the types of the recipe with their size, and the commands. On the demo model it takes
96 forwards, about 12 minutes on two cores with matrix tiles (AMX).
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import impq_core
from impq_core import RunConfig, TextConfig

STORED = {"2": 2.625, "3": 3.4375, "4": 4.5}  # bits per weight of q2_k, q3_k and q4_k, scales included


def main(arguments: list[str] | None = None) -> None:
    """Plan, write the recipe, and print the commands that use it."""
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
tensors that the recipe does not name follow Q4_K_M; --imatrix helps at 2 and 3 bits; llama-perplexity measures the \
result""")


if __name__ == "__main__":
    main()
