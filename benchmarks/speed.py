"""Time of the stages of a run on the real model, with the sources of this version and of another, in turns.

``--against FOLDER`` names the sources of the other version. Each measurement is a process of its own, without a
cache of variants. Both versions must measure the same losses; the largest difference is in the report.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CODE = Path(__file__).parents[1]
STAGES = {"quantize": "quantize at 2, 3 and 4 bits, GPTQ, 64 windows of statistics",
          "permutation": "losses of the 30 demotions of a permutation and the reference",
          "slopes": "slopes on 16 windows at three widths",
          "references": "scores of a plan and its references on 16 windows"}


def measure(out: Path) -> None:
    """Measure this process's version of impq, and write seconds and losses."""
    import numpy as np
    import torch
    from impq_spqe.sampler import demotions

    from impq_core.config import RunConfig, TextConfig
    from impq_core.plugins import Plugins
    from impq_core.runs.prepare import prepare
    from impq_core.runs.session import Session
    from impq_core.types import Plan

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    plugins = Plugins()
    config = RunConfig(tracking_uri="none", granularity="block", estimator="spqe", cache=False, probe_windows=16,
                       budget="3bits", evaluation=TextConfig(windows=16))
    prepared = prepare(config, plugins)
    session = Session(prepared, plugins)
    seconds: dict[str, float] = {}

    def timed(stage: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        seconds[stage] = time.perf_counter() - start
        return result

    timed("quantize", session.quantize_for_game)
    space, game = prepared.space, session.game()
    picks = demotions(space, np.random.default_rng(0).permutation(len(space)))
    losses = timed("permutation", lambda: game.losses(picks))
    forwards = game.forwards
    probe = session.probe()
    slopes = timed("slopes", lambda: probe.slopes(np.full(len(space.choices), 1 / len(space.choices))))
    plan = Plan(space, (np.arange(len(space)) % 2 + 1) % 3, prepared.budget_bytes, method="every other block")
    evaluation = timed("references", lambda: session.evaluate(session.evaluator(), plan))
    out.write_text(json.dumps({
        "seconds": seconds, "losses": losses.tolist(), "forwards": {"permutation": forwards, "slopes": probe.forwards},
        "slopes": slopes.mean(axis=0).tolist(), "scores": [row.nll for row in evaluation.rows]}))


def measured(code: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(code), str(code / "plugins")])}
        subprocess.run([sys.executable, __file__, "--measure", str(out)], check=True, env=environment, cwd=folder)
        return json.loads(out.read_text())  # type: ignore[no-any-return]


def main() -> None:
    from common import heading, table, write

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path, help="folder with the sources of another version")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure)
        return
    versions = [*([args.against] if args.against else []), CODE]
    found: list[list[dict[str, Any]]] = [[] for _ in versions]
    for _ in range(args.rounds):
        for code, rounds in zip(versions, found, strict=True):
            rounds.append(measured(code))
            print(code.name, {stage: round(seconds, 1) for stage, seconds in rounds[-1]["seconds"].items()}, flush=True)
    middle = [{stage: statistics.median(one["seconds"][stage] for one in rounds) for stage in STAGES}
              for rounds in found]
    names = ["before, median s", "after, median s"] if args.against else ["median s"]
    rows = [[STAGES[stage], *(f"{times[stage]:.1f}" for times in middle),
             *([f"{middle[0][stage] / middle[-1][stage]:.2f}"] if args.against else [])] for stage in STAGES]
    lines = heading("Time of the stages of a run", "python benchmarks/speed.py" + (
        " --against FOLDER" if args.against else ""))
    lines += [f"SmolLM2-135M; {args.rounds} rounds, the versions in turns, a process each, no cache.", "",
              *table(["stage", *names, *(["ratio"] if args.against else [])], rows)]
    if args.against:
        import numpy as np

        before, after = found[0][0], found[1][0]
        for name, what in (("losses", "losses of the picks"), ("scores", "held-out NLL")):
            largest = float(np.abs(np.array(before[name]) - np.array(after[name])).max())
            lines.append(f"- The largest difference of {what} between the versions is {largest:.1e} nats per token.")
        slopes = [np.array(one["slopes"]) for one in (before, after)]
        lines += [f"- Slopes differ by {np.linalg.norm(slopes[0] - slopes[1]) / np.linalg.norm(slopes[0]):.1e} of "
                  "their norm.",
                  "- Forwards charged: " + "; ".join(
                      f"{stage} {before['forwards'][stage]:.2f} before, {after['forwards'][stage]:.2f} after"
                      for stage in before["forwards"]) + "."]
    write("speed.md", lines)


if __name__ == "__main__":
    main()
