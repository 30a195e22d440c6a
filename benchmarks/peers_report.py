"""The tables of peers.py from its rows."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from common import heading, model_name, plus_minus, table
from uniform_line import line

from impq_core.space import FloatArray
from impq_core.statistics import standard_error

Row = Mapping[str, Any]


def report(rows: Sequence[Row], command: str, given: argparse.Namespace) -> list[str]:
    """All tables of the rows of one key.

    Args:
        rows: all that was measured.
        command: that wrote the report.
        given: options of ``peers.py``; plans by the first estimator stand at the bytes of the peers'.
    """
    lines, estimator = heading("Plans of other tools, at equal bytes", command), given.estimators.split(",")[0]
    if not rows:
        return lines
    lines += [f"## {model_name(given.model)}, {given.backend} {given.bits}", "",
              f"Held-out NLL, nats per token, on {rows[0]['text']}."]
    plans = [row for row in rows if not row["granularity"].startswith("anchor")]
    if plans:
        lines[-1] += (
            f" Widths are chosen from {given.windows} windows of calibration text, the same for all; the backend that "
            f"quantizes every plan reads {given.calibration_windows}. *Minus impq*: minus impq's plan by `{estimator}` "
            "within the row's bytes; *minus the line*: minus the line between the uniform models, at the row's bytes. "
            "Differences are paired over windows, bold beyond three standard errors. *Passes*: forwards over one "
            "window, a backward counts two; of other tools, counted by the script that calls them. Seconds: of one "
            "core, without installation; a tool's contain its imports and the loading of the model, and serve all "
            "budgets, impq's do not contain the quantization, which every plan needs.")
        lines += ["", *uniform_table(plans)]
    for granularity, title in (("linear", "Single linears"), ("group", "Groups: q, k, v and gate, up share a width")):
        for budget in sorted({row["budget"] for row in plans if row["granularity"] == granularity}):
            lines += [f"### {title}, {budget:g} bits", "", *plan_table(plans, granularity, budget, estimator)]
    for name in dict.fromkeys(row["granularity"] for row in rows if row not in plans):
        anchors = [row for row in rows if row["granularity"] == name]
        lines += [f"### Learned rounding as an {name}", "",
                  f"Uniform models quantized in sequence at equal bytes, from {anchors[0]['calibration']}. Differences "
                  "are paired over windows.", "", *anchor_table(anchors)]
    return lines


def uniform_table(rows: Sequence[Row]) -> list[str]:
    return table(["", "MB", "bits stored", "NLL", "KL"], [
        [row["method"], f"{row['bytes'] / 1e6:.2f}" if row["bytes"] else "", f"{row['stored']:.3f}", *losses(row)]
        for row in sorted(uniforms(rows, True), key=lambda row: row["stored"])])


def plan_table(rows: Sequence[Row], granularity: str, budget: float, estimator: str) -> list[str]:
    """The plans of a granularity and budget, the best first."""
    here = [row for row in rows if (row["granularity"], row["budget"]) == (granularity, budget)]
    pairs = {(row["at"], row["version"]): row for row in here if row["at"] and row["method"] == f"impq {estimator}"}
    cells = []
    for row in sorted((row for row in here if not row["at"]), key=lambda row: float(np.mean(row["nll"]))):
        pair = pairs.get((row["method"], row["version"]))
        apart = ["", ""] if pair is None else [difference(row["nll"], pair["nll"]), difference(row["kl"], pair["kl"])]
        cells.append([f"{row['method']} {row['version']}".strip(), f"{row['bytes'] / 1e6:.2f}",
                      f"{row['stored']:.3f}", *losses(row), *apart,
                      difference(row["nll"], line_at(rows, row["bytes"])), f"{row['passes']:.0f}",
                      f"{row['seconds']:.0f}"])
    return table(["plan", "MB", "bits stored", "NLL", "KL", "NLL minus impq", "KL minus impq", "NLL minus the line",
                  "passes", "seconds"], cells)


def anchor_table(rows: Sequence[Row]) -> list[str]:
    cells = []
    for bits in sorted({row["budget"] for row in rows}):
        here = [row for row in rows if row["budget"] == bits]
        for row in here:
            apart = [difference(row[name], here[0][name]) if row is not here[0] else "" for name in ("nll", "kl")]
            cells.append([f"{bits:g}", row["method"], f"{row['bytes'] / 1e6:.2f}", *losses(row), *apart,
                          f"{row['seconds']:.0f}"])
    return table(["bits", "quantizer", "MB", "NLL", "KL", "NLL minus impq", "KL minus impq", "seconds"], cells)


def uniforms(rows: Sequence[Row], unquantized: bool = False) -> list[Row]:
    """The uniform models, from small to large, and the unquantized one if asked for."""
    found = [row for row in rows if row["method"].startswith("uniform ")]
    return sorted(found, key=lambda row: row["bytes"]) + [
        row for row in rows if unquantized and row["method"] == "unquantized"]


def line_at(rows: Sequence[Row], nbytes: int) -> FloatArray:
    """NLL (windows,) of the line between the uniform models at a size; raises ImpqError outside of it."""
    points = uniforms(rows)
    return line([row["bytes"] for row in points], [row["nll"] for row in points], nbytes)


def losses(row: Row) -> list[str]:
    return [plus_minus(float(np.mean(row[name])), standard_error(np.array(row[name]))) for name in ("nll", "kl")]


def difference(these: Sequence[float], those: Sequence[float] | FloatArray) -> str:
    """A mean difference over windows, bold if it is more than three standard errors from zero."""
    apart = np.array(these) - np.array(those)
    error = standard_error(apart)
    text = plus_minus(float(apart.mean()), error, sign=True)
    return f"**{text}**" if abs(apart.mean()) > 3 * error else text
