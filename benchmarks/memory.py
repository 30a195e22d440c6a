"""Peak resident memory of runs by stage, beside the forecast of ``impq run --dry-run``.

Each case is a process of its own, which reads its resident memory every few milliseconds. ``--against FOLDER`` measures
the same cases with the sources of another version of impq, for a comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

CODE = Path(__file__).parents[1]
INTERVAL = 0.005
"""Seconds between two readings."""


@dataclass(frozen=True)
class Case:
    """A run to measure.

    Args:
        model: ``demo``, a folder, or ``random-1b``: a random Llama of hidden width 2048 and 16 blocks.
        options: arguments of ``impq run``.
    """

    model: str
    options: tuple[str, ...] = ()


QUICK = ("--backend", "quanto", "--estimator", "llm-mq", "--calibration-windows", "8", "--evaluation-windows", "2")
CASES = {
    "demo": Case("demo"),
    "demo, --memory 1.2GB": Case("demo", ("--memory", "1.2GB")),
    "1.2B": Case("random-1b", QUICK),
    "1.2B, --memory 3GB": Case("random-1b", (*QUICK, "--memory", "3GB")),
}
STAGES = ("imports", "check", "load", "quantize", "estimate", "evaluate")


@dataclass
class Readings:
    """The largest resident memory by stage, bytes: all of it, and the part that is not mapped from files."""

    resident: dict[str, int] = field(default_factory=dict)
    anonymous: dict[str, int] = field(default_factory=dict)
    stage: str = "imports"

    def take(self) -> None:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        for name, peaks in (("VmRSS", self.resident), ("RssAnon", self.anonymous)):
            peaks[self.stage] = max(peaks.get(self.stage, 0), 1024 * int(lines[name].split()[0]))

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Read in a thread for as long as the context lasts."""
        ended = threading.Event()

        def read() -> None:
            while not ended.wait(INTERVAL):
                self.take()

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        yield
        ended.set()
        thread.join()


def measure(arguments: list[str], out: Path) -> None:
    """Run ``impq run`` in this process, and write its readings."""
    readings = Readings()
    with readings.taken():
        from impq_core.cli import main
        from impq_core.hookspecs import hookimpl
        from impq_core.model.source import ModelSource
        from impq_core.plugins import Plugins

        class Watcher:
            @hookimpl
            def impq_progress(self, stage: str, done: int, total: int) -> None:
                readings.stage = stage

            @hookimpl
            def impq_run_started(self) -> None:
                readings.stage = "load"

        watch, check = Plugins.__init__, ModelSource.check_weights

        def init(self: Plugins, *args: object, **kwargs: object) -> None:
            watch(self, *args, **kwargs)  # type: ignore[arg-type]
            self.watch(Watcher())

        def checked(self: ModelSource) -> None:
            readings.stage = "check"
            check(self)

        Plugins.__init__, ModelSource.check_weights = init, checked  # type: ignore[method-assign]
        start = time.monotonic()
        try:
            main(["run", "--tracking-uri", "none", *arguments])
        except SystemExit as end:
            if end.code:
                raise
    out.write_text(json.dumps({"resident": readings.resident, "anonymous": readings.anonymous,
                               "seconds": time.monotonic() - start}))


def random_model(folder: Path) -> Path:
    """A random Llama of 1.2 billion weights in bfloat16, made once."""
    if not (folder / "model.safetensors").exists() and not list(folder.glob("*.safetensors")):
        import torch
        from transformers import AutoModelForCausalLM, LlamaConfig

        from impq_core.testing.tiny import byte_tokenizer

        config = LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                             num_key_value_heads=8, vocab_size=128256, max_position_embeddings=2048,
                             tie_word_embeddings=True, bos_token_id=256, eos_token_id=257)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="1GB")
        byte_tokenizer().save_pretrained(folder)
    return folder


def folder_of(case: Case, scratch: Path) -> str:
    return str(random_model(scratch / "random-1b")) if case.model == "random-1b" else case.model


def readings_of(case: Case, code: Path, scratch: Path) -> Mapping[str, Mapping[str, int]]:
    """The readings of a case in a process of its own, with the sources in ``code`` and a cache of its own, which holds
    no variants yet."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        out = Path(folder) / "readings.json"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(code), str(code / "plugins")]),
                       "IMPQ_CACHE": str(scratch / f"cache-{code.name}")}
        words = ["--model", folder_of(case, scratch), "--output", folder, *case.options]
        subprocess.run([sys.executable, __file__, "--measure", str(out), "--", *words], check=True, env=environment,
                       stdout=subprocess.DEVNULL)
        return json.loads(out.read_text())  # type: ignore[no-any-return]


def forecast_of(case: Case, scratch: Path) -> Mapping[str, int]:
    """Bytes by stage that a dry run forecasts."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(CODE), str(CODE / "plugins")]),
                   "IMPQ_CACHE": str(scratch / f"cache-{CODE.name}")}
    done = subprocess.run([sys.executable, "-m", "impq_core.cli", "run", "--dry-run", "--json", "--model",
                           folder_of(case, scratch), *case.options], check=True, env=environment, capture_output=True,
                          text=True)
    [search] = json.loads(done.stdout)["result"]["searches"]
    return {stage: sum(sizes.values()) for stage, sizes in search["memory"].items()}


def main() -> None:
    from common import command, heading, table, write

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path, help="folder with the sources of another version")
    parser.add_argument("--case", action="append", help="name of a case; all by default")
    parser.add_argument("--model", action="append", help="a further model folder to measure")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "impq-memory")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.arguments, args.measure)
        return
    args.scratch.mkdir(exist_ok=True)
    cases = {name: CASES[name] for name in args.case or CASES}
    cases |= {Path(model).name: Case(model, QUICK) for model in args.model or ()}
    rows = []
    for name, case in cases.items():
        for code in [CODE, *([args.against] if args.against else [])]:
            found = readings_of(case, code, args.scratch)
            for what, peaks in (("resident", found["resident"]), ("anonymous", found["anonymous"])):
                rows.append([name if code == CODE else f"{name}, before", what,
                             *(_megabytes(peaks.get(stage)) for stage in STAGES),
                             _megabytes(max(peaks.values())), f"{found['seconds']:.0f}"])
        forecast = forecast_of(case, args.scratch)
        rows.append([name, "forecast", *(_megabytes(forecast.get(stage)) for stage in STAGES),
                     _megabytes(max(forecast.values())), ""])
        print(rows[-3:], flush=True)
    lines = heading("Peak memory by stage", command())
    lines += ["Megabytes at the peak of each stage, read every 5 ms in a process for each case. *Resident* is all "
              "memory of the process, pages of mapped files included; *anonymous* is the part that the system cannot "
              "take back without swapping; *forecast* is what `impq run --dry-run` says. *1.2B* is a random Llama of "
              "hidden width 2048, 16 blocks and vocabulary 128,256 in bfloat16, with "
              f"`{' '.join(QUICK)}`, as models given by `--model`; the demo runs with the defaults.", "",
              *table(["case", "memory", *STAGES, "peak", "seconds"], rows)]
    write("memory.md", lines)


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:,.0f}"


if __name__ == "__main__":
    main()
