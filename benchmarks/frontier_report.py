"""The tables and figures of benchmarks/frontier.py, from its measured rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from common import RESULTS, command, heading, plus_minus, table, write
from uniform_line import line

from impq_core.space import FloatArray
from impq_core.statistics import standard_error

PAPERS = {"gptq": "gptq 2,4, block", "hqq": "hqq 3,8, block"}
"""The setting of the paper's protocol, by backend."""

PAPER = "spqe permutations=50 antithetic=False fresh=False: covariance"
"""The paper's method."""

AIMS = {"gptq": (2.5, 3.0), "hqq": (4.0, 5.5)}
"""The two budgets, in nominal bits, at which every method is tried, by backend."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#777777"


@dataclass(frozen=True)
class Row:
    """A plan and its held-out NLL of each window, nats per token, one text after the other."""

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

    backend: str
    rows: list[Row]

    def paper(self, budget: float) -> list[Row]:
        """The plans of the paper's protocol at a budget; empty if there are none."""
        return self.plans(PAPERS[self.backend], PAPER, budget)

    @cached_property
    def uniforms(self) -> list[Row]:
        return sorted((row for row in self.rows if row.setting == "uniform"), key=lambda row: row.nbytes)

    @cached_property
    def settings(self) -> list[str]:
        return list(dict.fromkeys(row.setting for row in self.rows if row.setting != "uniform"))

    def methods(self, setting: str) -> list[str]:
        """Methods of a setting, the cheapest first."""
        forwards = {row.method: row.forwards for row in self.rows if row.setting == setting}
        return sorted(forwards, key=lambda method: forwards[method])

    def budgets(self, setting: str) -> list[float]:
        return sorted({row.budget for row in self.rows if row.setting == setting})

    def plans(self, setting: str, method: str, budget: float) -> list[Row]:
        """The plans of a method, one for each seed."""
        return [row for row in self.rows if (row.setting, row.method, row.budget) == (setting, method, budget)]

    def windows(self, setting: str, method: str, budget: float) -> FloatArray | None:
        """Mean NLL over seeds (windows,); None if the method was not tried."""
        plans = self.plans(setting, method, budget)
        return np.mean([row.windows for row in plans], axis=0) if plans else None

    def line(self, nbytes: float) -> FloatArray:
        """NLL (windows,) of the line through the uniform models at a size; raises ImpqError outside of it."""
        return line([row.nbytes for row in self.uniforms], [row.windows for row in self.uniforms], nbytes)

    def best(self, budget: float) -> float:
        """Smallest NLL of any plan at a budget, the line of uniforms included."""
        rows = [row for row in self.rows if row.budget == budget and row.setting != "uniform"]
        return min([float(np.mean(row.windows)) for row in rows] + [float(self.line(rows[0].nbytes).mean())])


def write_report(work: Path, text_windows: int, name: str, model: str) -> None:
    """Write results/NAME.md and NAME-*.png from the rows of a model in a folder."""
    lines = heading(f"Cost and held-out loss of plans, {model}", command())
    lines += [f"Held-out NLL, nats per token, mean over {text_windows} windows of 256 tokens of Wikipedia and as many "
              f"of C4 ({2 * text_windows * 255} scored tokens; no window is among those of calibration or game); "
              "differences are paired over windows, ± their standard error. Losses of the game are measured on 1,020 "
              "tokens of C4, and a forward is one of the whole model over these. *Regret* is the NLL above that of the "
              "best plan in this report at the budget, mean over budgets. For methods with several seeds (some at two "
              "budgets only) the NLL is the mean over seeds, and *sd* the standard deviation, mean over budgets. Plans "
              "are made by `qp` with `work_limit=10`. `permutations=10 of 50`: plans from parts of one run.", ""]
    for file in sorted(work.glob("*.rows.json")):
        backend = file.name.split(".")[0]
        board = Board(backend, [Row(**row) for row in json.loads(file.read_text())])
        lines += [f"## {backend}", "", *uniform_lines(board, text_windows)]
        for setting in board.settings:
            lines += [f"### {setting}", "", *setting_table(board, setting)]
        lines += ["### Against the line of uniforms and the paper's protocol", "",
                  "Bold: better by more than three standard errors. Empty: no plan of the paper's protocol.", ""]
        for text, part in (("Both texts", slice(None)), ("Wikipedia", slice(text_windows)),
                           ("C4", slice(text_windows, None))):
            lines += [f"{text}:", "", *against(board, part)]
        draw(board, RESULTS / f"{name}-{backend}.png")
        lines += [f"![NLL above the best plan against forwards, {backend}]({name}-{backend}.png)", ""]
    write(f"{name}.md", lines)


def uniform_lines(board: Board, text_windows: int) -> list[str]:
    rows = []
    for row in board.uniforms:
        first, second = np.array(row.windows[:text_windows]), np.array(row.windows[text_windows:])
        rows.append([row.method, f"{row.nbytes / 1e6:.2f}", *(plus_minus(float(part.mean()), standard_error(part))
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


def against(board: Board, part: slice) -> list[str]:
    """Table of the differences to the paper's protocol and to the line of uniforms, over a part of the windows."""
    rows = []
    for setting in board.settings:
        for method in board.methods(setting):
            cells = []
            for budget in AIMS[board.backend]:
                windows, paper = board.windows(setting, method, budget), board.windows(
                    PAPERS[board.backend], PAPER, budget)
                if windows is None:
                    continue
                line = board.line(board.plans(setting, method, budget)[0].nbytes)
                cells += ["" if paper is None else starred((windows - paper)[part]), starred((windows - line)[part])]
            if len(cells) == 4:
                forwards = next(r.forwards for r in board.rows if (r.setting, r.method) == (setting, method))
                rows.append([setting, method, f"{forwards:.1f}", *cells])
    header = [title for budget in AIMS[board.backend] for title in (f"{budget:g} bits, minus paper", "minus line")]
    return table(["setting", "method", "forwards", *header], rows)


def starred(difference: FloatArray) -> str:
    """A mean difference, bold if it is below zero by more than three standard errors."""
    text = plus_minus(float(difference.mean()), standard_error(difference), sign=True)
    return f"**{text}**" if difference.mean() < -3 * standard_error(difference) else text


def family(method: str) -> str:
    """The refiner of a method, or its estimator if there is no refiner."""
    return method.split(" + ")[-1].split(" ")[0].strip(",:")


def draw(board: Board, path: Path) -> None:
    """Draw NLL against forwards: a panel for each budget, a colour for each setting, a marker for each family."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    budgets = AIMS[board.backend]
    families = dict.fromkeys(family(row.method) for row in board.rows if row.setting != "uniform")
    signs = dict(zip((name for name in families if name != "random"), "o^vsDPX*<>hp", strict=False))
    colours = dict(zip(board.settings, COLOURS, strict=False))
    figure = Figure(figsize=(6.4 * len(budgets), 5.6), layout="constrained", dpi=110)
    for axes, budget in zip(figure.subplots(1, len(budgets), squeeze=False)[0], budgets, strict=True):
        for setting, colour in colours.items():
            for method in board.methods(setting):
                for plan in board.plans(setting, method, budget) if family(method) in signs else ():
                    axes.plot(max(plan.forwards, 0.7), np.mean(plan.windows), signs[family(method)],
                              color=colour, markersize=6, alpha=0.8, clip_on=True)
            size = next(row.nbytes for row in board.rows if (row.setting, row.budget) == (setting, budget))
        line = float(board.line(size).mean())
        axes.axhline(line, color=GREY, linewidth=1, linestyle="--")
        axes.annotate("line of uniforms", (0.75, line), xytext=(0, 3), textcoords="offset points", fontsize=8,
                      color=GREY)
        paper = board.paper(budget)
        if paper:
            axes.annotate("the paper's protocol", (paper[0].forwards, float(np.mean(paper[0].windows))), fontsize=8,
                          xytext=(-30, 14), textcoords="offset points", arrowprops={"arrowstyle": "-", "color": GREY})
        axes.set(xscale="log", title=f"{budget:g} nominal bits", xlim=(0.6, 2000),
                 ylim=(board.best(budget) - 0.05, max([line, *(np.mean(row.windows) for row in paper)]) + 0.5),
                 xlabel="forwards spent (none drawn at 0.7)", ylabel="held-out NLL, nats per token")
    figure.legend(fontsize=8, loc="outside lower center", ncols=6, handles=[
        *(Line2D([], [], marker="s", linestyle="", color=colour, label=name) for name, colour in colours.items()),
        *(Line2D([], [], marker=sign, linestyle="", color="black", label=name) for name, sign in signs.items())])
    figure.savefig(path)
