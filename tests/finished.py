"""Finished runs' folders with planted losses, a reader of pages, and contrasts in them, for tests of comparisons."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from impq_core.config import RunConfig
from impq_core.testing import planted_estimate
from impq_core.types import SensitivityEstimate

WINDOWS = 6
BASE = np.linspace(3.0, 4.0, WINDOWS)
CONFIG = RunConfig(bits=(2, 4), model="org/tiny", estimator="spqe", granularity="block")
NOISE = np.array([0.02, -0.01, 0.03, -0.04, 0.01, -0.01])


def make_run(folder: Path, config: RunConfig, plan: np.ndarray[Any, Any], estimate: SensitivityEstimate | None = None,
             references: Mapping[str, float] = {"first/last high": 0.9, "random 1": 0.8, "random 2": 0.7},
             unquantized: np.ndarray[Any, Any] = BASE, text: str = "6 windows of wiki", nbytes: int = 100_000,
             forwards: float = 12.5) -> Path:
    """A finished run's folder: a plan of a model that is at ``unquantized``, and references that much above."""
    folder.mkdir(parents=True)
    (folder / "impq.toml").write_text(replace(config, budget=config.budget or "3bits").to_toml())
    rows: list[dict[str, Any]] = [
        {"name": "plan", "bytes": nbytes, "window_nll": plan.tolist()},
        {"name": "unquantized", "bytes": None, "window_nll": unquantized.tolist()},
        {"name": "uniform 4", "bytes": 130_000, "window_nll": (unquantized + 0.2).tolist()},
        {"name": "uniform 2", "bytes": 70_000, "window_nll": (unquantized + 1.0 + NOISE).tolist()}]
    rows += [{"name": name, "bytes": nbytes - 1000, "window_nll": (unquantized + above).tolist()}
             for name, above in references.items()]
    for row in rows:
        row |= {"nll": float(np.mean(row["window_nll"])), "kl": 0.1, "top1_agreement": 0.9}
        if row["bytes"]:
            row |= {"bits_nominal": row["bytes"] / 33_000, "bits_stored": row["bytes"] / 30_000}
    share = (130_000 - nbytes) / 60_000
    line = float((unquantized + 0.2 + share * (0.8 + NOISE)).mean())
    rows.append({"name": "line low-high", "bytes": nbytes, "nll": line if math.isfinite(line) else None})
    (folder / "evaluation.json").write_text(json.dumps({"text": text, "tokens": 288, "rows": rows}))
    space = estimate.space if estimate else planted_estimate(0, 4).space
    layers = {layer.name: {"bits": (4, 2)[i % 2], "group_size": 64} for i, layer in enumerate(space.layers)}
    (folder / "plan.json").write_text(json.dumps({"budget_bytes": nbytes + 1000, "bits_nominal": nbytes / 33_000,
                                                  "layers": layers}))
    (folder / "cost.json").write_text(json.dumps({"forwards": forwards, "seconds": {"estimate": 3.0}}))
    if estimate:
        estimate.save(folder / "estimate.npz")
    return folder


class Page(HTMLParser):
    """The references of a page, and whether its elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.seen: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours by WCAG 2.2."""
    def luminance(colour: str) -> float:
        parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)
