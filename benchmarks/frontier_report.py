"""The tables and pictures of benchmarks/frontier.py, from the rows it measured."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from common import RESULTS, heading, plus_minus, table, write

from impq_core.space import FloatArray

PAPER = ("gptq 2,4, block", "spqe permutations=50 antithetic=False: covariance")
"""The paper's protocol: setting and method."""


@dataclass(frozen=True)
class Row:
    """A plan and what it is worth: held-out NLL of each window, nats per token, one text after the other."""

    setting: str
    method: str
    seed: int
    budget: float
    nbytes: int
    forwards: float
    windows: list[float]


@dataclass(frozen=True)
class Board:
    """All rows of one backend."""

    rows: list[Row]

    @cached_property
    def uniforms(self) -> list[Row]:
        return sorted((row for row in self.rows if row.setting == "uniform"), key=lambda row: row.nbytes)

    @cached_property
    def settings(self) -> list[str]:
        return list(dict.fromkeys(row.setting for row in self.rows if row.setting != "uniform"))

    def methods(self, setting: str) -> list[str]:
        """By what they cost."""
        spent = {row.method: row.forwards for row in self.rows if row.setting == setting}
        return sorted(spent, key=lambda method: spent[method])

    def budgets(self, setting: str) -> list[float]:
        return sorted({row.budget for row in self.rows if row.setting == setting})

    def plans(self, setting: str, method: str, budget: float) -> list[Row]:
        return [r for r in self.rows if (r.setting, r.method, r.budget) == (setting, method, budget)]

    def windows(self, setting: str, method: str, budget: float) -> FloatArray | None:
        """Mean over seeds (windows,); None where it was not tried."""
        plans = self.plans(setting, method, budget)
        return np.mean([row.windows for row in plans], axis=0) if plans else None

    def line(self, nbytes: float) -> FloatArray:
        """The line through the uniform models (windows,) at a size."""
        sizes = [row.nbytes for row in self.uniforms]
        return np.array([np.interp(nbytes, sizes, losses)
                         for losses in zip(*(row.windows for row in self.uniforms), strict=True)])

    def best(self, budget: float) -> float:
        """Least NLL of any plan at a budget, the line of uniforms included."""
        rows = [row for row in self.rows if row.budget == budget and row.setting != "uniform"]
        return min([float(np.mean(row.windows)) for row in rows] + [float(self.line(rows[0].nbytes).mean())])


def write_report(work: Path, text_windows: int) -> None:
    """results/frontier.md and frontier-*.png from the rows in a folder."""
    lines = heading("What a plan costs and what it is worth, SmolLM2-135M", "python benchmarks/frontier.py")
    lines += [f"Held-out NLL, nats per token, mean over {text_windows} windows of 256 tokens of Wikipedia and as many "
              f"of C4 ({2 * text_windows * 255} scored tokens; no window is among those of calibration or game); "
              "differences are paired over windows, ± their standard error. Losses of the game are measured on 1,020 "
              "tokens of C4, and a forward is one of the whole model over these (a backward counts two). *Regret* is "
              "the NLL above the best plan that anything here found at the budget, mean over budgets. Methods with "
              "several seeds: mean, and *sd* their standard deviation, mean over budgets. Plans are made by `qp` in "
              "10 s. `permutations=10 of 50`: plans from parts of one run.", ""]
    for file in sorted(work.glob("*.rows.json")):
        board = Board([Row(**row) for row in json.loads(file.read_text())])
        backend = file.name.split(".")[0]
        lines += [f"## {backend}", "", *uniform_lines(board, text_windows)]
        for setting in board.settings:
            lines += [f"### {setting}", "", *setting_table(board, setting)]
        if PAPER[0] in board.settings:
            lines += ["### Against the paper's protocol and the line of uniforms", "", *against_paper(board)]
        draw(board, RESULTS / f"frontier-{backend}.png")
        lines += [f"![NLL above the best plan against forwards, {backend}](frontier-{backend}.png)", ""]
    write("frontier.md", lines)


def uniform_lines(board: Board, text_windows: int) -> list[str]:
    rows = []
    for row in board.uniforms:
        first, second = np.array(row.windows[:text_windows]), np.array(row.windows[text_windows:])
        rows.append([row.method, f"{row.nbytes / 1e6:.2f}", *(plus_minus(float(part.mean()), stderr(part))
                                                              for part in (np.array(row.windows), first, second))])
    return table(["", "MB", "NLL", "Wikipedia", "C4"], rows)


def setting_table(board: Board, setting: str) -> list[str]:
    budgets = board.budgets(setting)
    least = {b: min(w.mean() for m in board.methods(setting) if (w := board.windows(setting, m, b)) is not None)
             for b in budgets}
    rows = []
    for method in board.methods(setting):
        cells, regrets, spreads = [], [], []
        for budget in budgets:
            windows = board.windows(setting, method, budget)
            if windows is None:
                cells.append("")
                continue
            plans = board.plans(setting, method, budget)
            cells.append(("**{:.3f}**" if windows.mean() <= least[budget] + 5e-4 else "{:.3f}").format(windows.mean()))
            regrets.append(windows.mean() - board.best(budget))
            spreads.append(np.std([np.mean(row.windows) for row in plans], ddof=1) if len(plans) > 1 else np.nan)
        forwards = next(row.forwards for row in board.rows if (row.setting, row.method) == (setting, method))
        rows.append([method, f"{forwards:.1f}", *cells, f"{np.mean(regrets):.3f}",
                     "" if np.isnan(spreads).all() else f"{np.nanmean(spreads):.3f}"])
    line = [board.line(next(r.nbytes for r in board.rows if r.setting == setting and r.budget == b)) for b in budgets]
    rows.append(["line of uniforms", "", *(f"{windows.mean():.3f}" for windows in line),
                 f"{np.mean([w.mean() - board.best(b) for w, b in zip(line, budgets, strict=True)]):.3f}", ""])
    return table(["method", "forwards", *(f"{b:g} bits" for b in budgets), "regret", "sd"], rows)


def against_paper(board: Board) -> list[str]:
    rows = []
    for setting in board.settings:
        for method in board.methods(setting):
            cells = []
            for budget in (2.5, 3.0):
                windows, paper = board.windows(setting, method, budget), board.windows(*PAPER, budget)
                if windows is None or paper is None:
                    continue
                line = board.line(board.plans(setting, method, budget)[0].nbytes)
                cells += [starred(windows - paper), starred(windows - line)]
            if len(cells) == 4:
                forwards = next(r.forwards for r in board.rows if (r.setting, r.method) == (setting, method))
                rows.append([setting, method, f"{forwards:.1f}", *cells])
    return ["Bold: better by more than three standard errors.", "",
            *table(["setting", "method", "forwards", "2.5 bits, minus paper", "minus line", "3 bits, minus paper",
                    "minus line"], rows)]


def starred(difference: FloatArray) -> str:
    told = plus_minus(float(difference.mean()), stderr(difference), sign=True)
    return f"**{told}**" if difference.mean() < -3 * stderr(difference) else told


def stderr(values: FloatArray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def draw(board: Board, path: Path) -> None:
    """NLL above the best plan against forwards, a panel for each of two budgets, a colour for each setting."""
    from matplotlib.figure import Figure

    shared = set.intersection(*(set(board.budgets(setting)) for setting in board.settings))
    budgets = sorted(shared)[1::2]
    figure = Figure(figsize=(6.2 * len(budgets), 5.4), layout="constrained", dpi=110)
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#777777")
    for axes, budget in zip(figure.subplots(1, len(budgets), squeeze=False)[0], budgets, strict=True):
        for colour, setting in zip(colours, board.settings, strict=False):
            points = [(max(plan.forwards, 0.5), float(np.mean(plan.windows)) - board.best(budget), method)
                      for method in board.methods(setting) if method != "random"
                      for plan in board.plans(setting, method, budget)]
            axes.scatter([x for x, *_ in points], [max(y, 1e-3) for _, y, _ in points], s=22, color=colour,
                         label=setting)
            seen = [(x, y, m) for x, y, m in points if y < 0.06 or m == PAPER[1]]
            for x, y, method in seen:
                axes.annotate(method, (x, max(y, 1e-3)), fontsize=5.5, xytext=(3, 2), textcoords="offset points")
        size = next(row.nbytes for row in board.rows if row.budget == budget and row.setting != "uniform")
        line = max(float(board.line(size).mean()) - board.best(budget), 1e-3)
        axes.axhline(line, color="#777777", linewidth=1, linestyle="--", label="line of uniforms")
        axes.set(xscale="log", yscale="log", title=f"{budget:g} nominal bits", xlabel="forwards spent (0 drawn at 0.5)",
                 ylabel="held-out NLL above the best plan, nats per token")
        axes.legend(fontsize=7)
    figure.savefig(path)
