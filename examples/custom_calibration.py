"""Compare calibration texts: a plan from your own text, and one from another text.

    python examples/custom_calibration.py
    python examples/custom_calibration.py --text notes/*.txt --evaluation held-out.txt

The script writes your text as a .jsonl file with an object and its field "text" in each line, which ``--calibration``
of ``impq run`` reads too. Without ``--text`` it takes the docstrings of Python's standard library. ``--other`` is the
other text: the demo's web pages, or a file.

A calibration text has two uses: the layers are measured on it, and the quantizer reads its activations. Therefore there
are three runs: each text with its own plan, and the plan of your text with variants from the other text, which differs
from the second run in the widths only. The script prints the linears with different widths, and the held-out NLL of all
three runs in nats per token, ± standard errors over windows, with differences paired over windows.

On the demo model this takes 96 forwards and 110 MB of variants for each of the two texts, and about 20 minutes on two
cores with matrix tiles (AMX).
"""

from __future__ import annotations

import argparse
import ast
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import impq_core
from impq_core import ImpqError, RunConfig, TextConfig

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings() -> Iterator[str]:
    """The joined docstrings of each module of the standard library."""
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        nodes = [node for node in ast.walk(ast.parse(file.read_bytes())) if isinstance(node, DOCUMENTED)]
        yield "\n\n".join(text for node in nodes if (text := ast.get_docstring(node)))


def main(arguments: list[str] | None = None) -> None:
    """Write the file, run three times, and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, a folder, or a hub name")
    parser.add_argument("--text", type=Path, nargs="+", help="your text files [docstrings of the standard library]")
    parser.add_argument("--other", default="demo", help="the other text: demo or a file")
    parser.add_argument("--evaluation", default="demo", help="held-out text: demo or a file")
    parser.add_argument("--budget", default="3bits")
    parser.add_argument("--windows", type=int, default=64, help="windows drawn from each text")
    parser.add_argument("--length", type=int, default=256, help="tokens in a window")
    parser.add_argument("--output", type=Path, default=Path("impq-runs"))
    given = parser.parse_args(arguments)

    for file in given.text or ():
        if not file.is_file():
            raise ImpqError(f"text {file}: no such file")
    texts = (file.read_text(errors="replace") for file in given.text) if given.text else docstrings()
    given.output.mkdir(parents=True, exist_ok=True)
    file = given.output / "calibration.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts if text.strip()))
    print(f"{file}: {file.stat().st_size / 1e6:.2f} MB of text")

    plugins = impq_core.console(brief=True)
    config = RunConfig(
        model=given.model, bits=(2, 3, 4), budget=given.budget, output=given.output, game_windows=min(8, given.windows),
        calibration=TextConfig(file, given.windows, given.length),
        evaluation=TextConfig(given.evaluation, given.windows, given.length))
    other_config = replace(config, calibration=replace(config.calibration, source=given.other))
    own, other = impq_core.run(config, plugins), impq_core.run(other_config, plugins)
    mixed = impq_core.run(replace(other_config, plan=own.folder / "plan.json"), plugins)

    before, after = (run.plan.widths() for run in (other, own))
    changed = [name for name in before if before[name] != after[name]]
    print(f"\n{len(changed)} of {len(before)} linears have another width than with {given.other}:")
    for name in changed:
        print(f"  {name:<36} {before[name]} -> {after[name]} bits")
    print(f"\n{'widths from':<12} {'quantized by':<13} {'NLL':<17} minus the second line")
    for widths, quantized, run in (("own", "own", own), ("other", "other", other), ("own", "other", mixed)):
        score, (difference, error) = run.evaluation.plan, run.evaluation.plan.minus(other.evaluation.plan)
        shown = "" if run is other else f"{difference:+.4f} ± {error:.4f}"
        print(f"{widths:<12} {quantized:<13} {score.nll:.4f} ± {score.stderr:.4f}   {shown}")
    print(f"nats per token on {own.evaluation.text}, {own.evaluation.tokens} scored tokens")


if __name__ == "__main__":
    main()
