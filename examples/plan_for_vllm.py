"""A mixed-precision checkpoint for vLLM: plan it, write it, and measure the written files.

    python examples/plan_for_vllm.py
    python examples/plan_for_vllm.py --model ./my-model --format compressed-tensors --budget 5bits

vLLM runs q, k, v as one matrix, and gate, up as another, so linears that it fuses must share a width
(``granularity="group"``). The format determines the menu:

``gptq``: 2, 3, 4 and 8 bits with zeros, for vLLM's own GPTQ kernel, which computes in float16. Zeros are written
without an offset (gptq_v2). vLLM reads this format since its pull request 26092 of October 2025; older versions
generate nonsense. vLLM warns that the 4 bits of that kernel may be wrong: check the generated text.
``compressed-tensors``: symmetric codes, for faster kernels. Every vLLM version with this format loads 4 and 8 bits,
which are the menu here.

The script prints the evaluation of the run (by impq's terminal reporter), the widths, the files, the loss of the model
at its export and after reading the files, and the command that serves it, which the script does not run.

On the demo model it takes 96 forwards for gptq and 48 for compressed-tensors, and about 15 minutes on two cores with
matrix tiles (AMX).
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import impq_core
from impq_core import RunConfig, TextConfig

BITS = {"gptq": (2, 3, 4), "compressed-tensors": (4, 8)}
BUDGET = {"gptq": "3bits", "compressed-tensors": "5bits"}


def main(arguments: list[str] | None = None) -> None:
    """Plan, export, and measure the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, a folder, or a hub name")
    parser.add_argument("--format", choices=BITS, default="gptq")
    parser.add_argument("--budget", help="3bits for gptq, 5bits for compressed-tensors, unless another is given")
    parser.add_argument("--calibration", default="demo", help="text to quantize with: demo or a file")
    parser.add_argument("--evaluation", default="demo", help="held-out text: demo or a file")
    parser.add_argument("--windows", type=int, default=64, help="windows drawn from each text")
    parser.add_argument("--length", type=int, default=256, help="tokens in a window")
    parser.add_argument("--output", type=Path, default=Path("impq-runs"))
    given = parser.parse_args(arguments)

    plugins = impq_core.console()
    result = impq_core.run(RunConfig(
        model=given.model, backend="gptq", bits=BITS[given.format], budget=given.budget or BUDGET[given.format],
        granularity="group", options={"backend": {"symmetric": given.format == "compressed-tensors"}},
        calibration=TextConfig(given.calibration, given.windows, given.length), game_windows=min(8, given.windows),
        evaluation=TextConfig(given.evaluation, given.windows, given.length), output=given.output), plugins)
    widths = Counter(str(choice) for choice in result.plan.widths().values())
    print("\nlinears by width: " + ", ".join(f"{count} at {bits} bits" for bits, count in sorted(widths.items())))

    # An export quantizes again, each block behind the quantized ones, so its loss differs from the table's.
    exported = impq_core.export_run(result.folder, given.format, plugins=plugins)
    print(f"\n{exported.folder} holds")
    for file in sorted(exported.folder.iterdir()):
        print(f"  {file.name:<28} {file.stat().st_size:>12,} bytes")

    loaded = impq_core.evaluate_folder(exported.folder)  # from the files alone, as 'impq evaluate' does
    for name, score in (("in the run", result.evaluation.plan), ("at export", exported.score),
                        ("from files", loaded.score)):
        print(f"NLL {name:<10} {score.nll:.4f} ± {score.stderr:.4f}")
    print(f"nats per token on {loaded.text}, {result.evaluation.tokens} scored tokens\n")

    half = " --dtype float16" if given.format == "gptq" else ""
    print(f"serve it, where vLLM is: vllm serve {exported.folder}{half}")


if __name__ == "__main__":
    main()
