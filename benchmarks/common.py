"""What the benchmarks share: a heading that says what was measured on what, and Markdown tables."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Sequence
from datetime import date
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("impq", "torch", "transformers", "gptqmodel", "pyomo", "highspy", "numpy")


def heading(title: str, command: str) -> list[str]:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return [f"# {title}", "",
            f"Written by `{command}` on {date.today()}, {os.cpu_count()} cores, no GPU; {versions}.", ""]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(header) + " |", "|" + "---|" * len(header),
            *("| " + " | ".join(row) + " |" for row in rows), ""]


def write(name: str, lines: Sequence[str]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text("\n".join(lines).rstrip() + "\n")
    print("\n".join(lines))


def say(stage: str) -> object:
    def progress(done: int, total: int) -> None:
        if done % max(1, total // 10) == 0:
            print(f"{stage}: {done} of {total}", flush=True)
    return progress
