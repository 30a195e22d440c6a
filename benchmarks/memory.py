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


CASES = {
    "demo, default": Case("demo"),
    "demo, 1 GB": Case("demo", ("--memory", "1.1GB")),
    "1B, quanto, isolated": Case("random-1b", (
        "--backend", "quanto", "--estimator", "llm-mq", "--calibration-windows", "8", "--evaluation-windows", "2")),
    "1B, quanto, streamed": Case("random-1b", (
        "--backend", "quanto", "--estimator", "llm-mq", "--calibration-windows", "8", "--evaluation-windows", "2",
        "--memory", "2.5GB")),
}


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
        import impq_gptq.backend  # noqa: F401
        import mlflow  # noqa: F401
        import transformers  # noqa: F401

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


def readings_of(case: Case, code: Path, scratch: Path) -> Mapping[str, Mapping[str, int]]:
    """The readings of a case in a process of its own, with the sources in ``code`` and an empty cache."""
    model = str(random_model(scratch / "random-1b")) if case.model == "random-1b" else case.model
    options = [*case.options]
    if "--memory" in options and code != CODE:  # not known there
        at = options.index("--memory")
        del options[at:at + 2]
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        out = Path(folder) / "readings.json"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(code), str(code / "plugins")]),
                       "IMPQ_CACHE": str(scratch / f"cache-{code.name}-{abs(hash(tuple(options)))}")}
        subprocess.run([sys.executable, __file__, "--measure", str(out), "--", "--model", model, "--output", folder,
                        *options], check=True, env=environment, stdout=subprocess.DEVNULL)
        return json.loads(out.read_text())  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path, help="folder with the sources of another version")
    parser.add_argument("--case", action="append", help="name of a case; all by default")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "impq-memory")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.arguments, args.measure)
        return
    args.scratch.mkdir(exist_ok=True)
    for name in args.case or CASES:
        for code in [CODE, *([args.against] if args.against else [])]:
            found = readings_of(CASES[name], code, args.scratch)
            print(name, code.name, {stage: round(size / 1e6) for stage, size in found["resident"].items()},
                  {stage: round(size / 1e6) for stage, size in found["anonymous"].items()}, round(found["seconds"]),
                  flush=True)


if __name__ == "__main__":
    main()
