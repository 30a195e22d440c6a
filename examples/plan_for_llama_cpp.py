"""A plan for llama.cpp as a list of types, for those who let llama-quantize make the file.

    python examples/plan_for_llama_cpp.py --model ./my-model --budget 60%

``impq run --backend gguf --export gguf`` writes the whole file itself. A recipe is for the cases where llama-quantize
has to: an architecture that impq does not write, a GGUF file with a vision tower, an importance matrix of your own.

The plan is measured with llama.cpp's own quantizers. Each tensor has its own type, so layers are single linears
(``granularity="linear"``). llama-quantize makes the weights again, from its own importance matrix and with the
unquantized model in front of every tensor, so its file is near what impq measured, not equal to it: measure it with
llama-perplexity.

Rows of K- and IQ-types consist of blocks of 256 weights. If the rows of a tensor are no multiple of 256, llama.cpp
takes another type, of 4 bits and more; the plan counts with it, and the recipe names it. In the demo model only the
down projections fit.

The script prints the evaluation, the types of the recipe with their size, and the commands. On the demo model it takes
96 forwards, about 12 minutes on two cores with matrix tiles (AMX).
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import impq_core
from impq_core import RunConfig, TextConfig


def main(arguments: list[str] | None = None) -> None:
    """Plan, write the recipe, and print the commands that use it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, a folder, or a hub name")
    parser.add_argument("--bits", default="Q6_K,Q5_K,IQ4_XS,Q3_K", help="llama.cpp's types to choose from")
    parser.add_argument("--budget", default="65%")
    parser.add_argument("--calibration", default="demo", help="text to measure on: demo or a file")
    parser.add_argument("--evaluation", default="demo", help="held-out text: demo or a file")
    parser.add_argument("--windows", type=int, default=64, help="windows drawn from each text")
    parser.add_argument("--length", type=int, default=256, help="tokens in a window")
    parser.add_argument("--output", type=Path, default=Path("impq-runs"))
    given = parser.parse_args(arguments)

    plugins = impq_core.console()
    result = impq_core.run(RunConfig(
        model=given.model, backend="gguf", bits=tuple(given.bits.split(",")), budget=given.budget, granularity="linear",
        calibration=TextConfig(given.calibration, given.windows, given.length), game_windows=min(8, given.windows),
        evaluation=TextConfig(given.evaluation, given.windows, given.length), output=given.output), plugins)
    recipe = impq_core.export_run(result.folder, "recipe-llama.cpp", plugins=plugins).folder / "tensor-types.txt"

    types = Counter(line.rpartition("=")[2] for line in recipe.read_text().splitlines())
    print(f"\n{recipe}: " + ", ".join(f"{count} tensors {kind}" for kind, count in sorted(types.items())))
    print(f"quantized weights: {result.plan.nbytes / 1e6:.2f} MB")

    print(f"""
in a clone of llama.cpp, with the model as a folder:
  python convert_hf_to_gguf.py MODEL --outtype f16 --outfile model-f16.gguf
  llama-imatrix -m model-f16.gguf -f TEXT -o imatrix.gguf
  llama-quantize --imatrix imatrix.gguf --tensor-type-file {recipe} --token-embedding-type f16 \\
      model-f16.gguf model-impq.gguf Q4_K_M
tensors that the recipe does not name follow Q4_K_M; llama-perplexity measures the result""")


if __name__ == "__main__":
    main()
