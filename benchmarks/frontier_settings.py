"""The methods of benchmarks/frontier.py, by backend, menu and granularity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from frontier_report import AIMS

GAME_WINDOWS = 4


@dataclass(frozen=True)
class Method:
    """A method that makes plans.

    Args:
        estimator: name of the estimator; with ``options``, ``value`` and the seed it determines the measurements.
        surrogates: surrogates that are fitted to the measurements.
        seeds: number of seeds.
        value: loss of the game.
        parts: number of plans and permutations for each: plans from parts of one measurement, in place of more seeds.
        refine: refiner and its limit in forwards, starting from the estimate's plan; empty for no refinement.
        budgets: budgets in nominal bits; empty for all budgets of the setting.
        aimed: whether every budget has its own measurement.
        game: number of windows of the game; forwards are counted over ``GAME_WINDOWS`` windows.
        text: number of windows of gradients.
        drawn: whether every seed has its own text; the first seed has the calibration text.
    """

    estimator: str
    options: Mapping[str, Any] = field(default_factory=dict)
    surrogates: tuple[str, ...] = ("",)
    seeds: int = 1
    value: str = "nll"
    parts: tuple[int, int] = (0, 0)
    refine: tuple[str, int] = ("", 0)
    budgets: tuple[float, ...] = ()
    aimed: bool = False
    game: int = GAME_WINDOWS
    text: int = GAME_WINDOWS
    drawn: bool = False


@dataclass(frozen=True)
class Setting:
    """A backend, a menu and a granularity, with methods for them, which ``of`` names if they are some among others."""

    backend: str
    bits: tuple[float, ...]
    granularity: str
    budgets: tuple[float, ...]
    methods: tuple[Method, ...]
    of: str = ""

    @property
    def name(self) -> str:
        name = f"{self.backend} {','.join(f'{b:g}' for b in self.bits)}, {self.granularity}"
        return f"{name}, {self.of}" if self.of else name


PAPER = {"permutations": 50, "antithetic": False, "fresh": False}
TEN = {**PAPER, "permutations": 10}
LOW = (2.25, 2.5, 2.75, 3.0, 3.5)
HIGH = (3.5, 4.0, 4.5, 5.5, 6.5)
ALL = (2.0, 3.0, 4.0)
TWO = Method("aumann-shapley", {"nodes": 2})
WIDE = replace(TWO, text=32)
WIDEST = replace(WIDE, text=64)
ISOLATED = Method("isolated")
ONE = Method("aumann-shapley", {"nodes": 1})


def slopes(aim: tuple[float, ...]) -> tuple[Method, ...]:
    return tuple(Method(name, options, budgets=aim) for name, options in (
        ("aumann-shapley", {"nodes": 2}), ("aumann-shapley", {"nodes": 4}), ("fisher", {"at": 0.5}),
        ("fisher", {"at": 1.0}), ("hawq", {"samples": 4}), ("llm-mq", {})))


def metrics(aim: tuple[float, ...]) -> tuple[Method, ...]:
    """Scores of the field, beside ours on as many windows."""
    return (*(Method(name, text=16, budgets=aim) for name in (
        "guided-output", "autoscheme", "aumann-shapley", "fisher", "llm-mq", "lieq", "kurtosis", "nsds")),
        Method("guided-output", {"form": "gram", "groups": 1}, text=16, budgets=aim),
        Method("gamma", text=16, budgets=aim, aimed=True))


def chance(aim: tuple[float, ...]) -> tuple[Method, ...]:
    return Method("random", seeds=3, budgets=aim), Method("first-last", budgets=aim)


def games(aim: tuple[float, float]) -> tuple[Method, ...]:
    """Methods with many measured losses, for the paper's players and menu."""
    top = aim[1:]
    return (Method("clado", budgets=aim),
            Method("spqe", {**TEN, "antithetic": True, "around": top[0]}, ("additive", "regression"), seeds=3,
                   budgets=top),
            Method("random", refine=("evolve", 100), budgets=top, seeds=3),
            Method("spqe", {**TEN, "fresh": True}, ("covariance",), seeds=3, budgets=aim),
            Method("spqe", TEN, ("covariance",), value="kl", budgets=aim))


def long(aim: tuple[float, float]) -> tuple[Method, ...]:
    """Methods that need hundreds of forwards for each plan."""
    return (Method("spqe", {**PAPER, "settle": 0.02}, ("covariance",), budgets=aim[1:], aimed=True),
            Method("spqe", PAPER, ("covariance",), seeds=3, budgets=aim))


def papers(aim: tuple[float, float]) -> tuple[Method, ...]:
    """The paper's protocol, other surrogates for its losses, and plans from parts of its losses."""
    return (Method("spqe", PAPER, ("covariance", "additive")),
            Method("spqe", PAPER, ("regression", "coverage"), budgets=aim),
            Method("spqe", PAPER, ("auto",), budgets=aim),
            Method("spqe", PAPER, ("covariance",), parts=(3, 10), budgets=aim))


def drawn(aim: tuple[float, float], *methods: Method) -> tuple[Method, ...]:
    """Methods on three texts."""
    return tuple(replace(method, seeds=3, drawn=True, budgets=aim) for method in methods)


FITS = "covariance", "regression", "auto"
FINE = Method("coarse-to-fine", budgets=(3.0,), aimed=True)
FEW = (ISOLATED, ONE, WIDE)
GPTQ, HQQ = AIMS["gptq"], AIMS["hqq"]
SETTINGS = (  # the expensive ones last
    Setting("gptq", ALL, "group", LOW, (
        *FEW, *slopes(GPTQ), WIDEST, FINE, replace(WIDE, refine=("swaps", 60), budgets=(3.0,)),
        replace(WIDE, refine=("evolve", 60), budgets=(3.0,)))),
    Setting("gptq", ALL, "group", LOW, (ISOLATED, ONE, *metrics(GPTQ)), "scores"),
    Setting("gptq", (2.0, 4.0), "block", LOW, (*FEW, *papers(GPTQ), *chance(GPTQ), *slopes(GPTQ))),
    Setting("gptq", ALL, "linear", LOW, (*FEW, WIDEST)),
    Setting("hqq", (3.0, 8.0), "block", HIGH, (*FEW, *chance(HQQ))),
    Setting("hqq", (3.0, 8.0), "group", HIGH, FEW),
    Setting("hqq", (3.0, 8.0), "linear", HIGH, FEW),
    Setting("gptq", (2.0, 4.0), "group", LOW, FEW),
    Setting("gptq", (2.0, 4.0), "linear", LOW, FEW),
    Setting("gptq", ALL, "block", LOW, (
        *FEW, *slopes(GPTQ), Method("spqe", {"permutations": 4}, FITS, seeds=3, budgets=GPTQ),
        Method("spqe", {"permutations": 4, "fresh": False}, FITS, seeds=3, budgets=GPTQ))),
    Setting("gptq", (2.0, 4.0), "block", LOW, games(GPTQ)),
    Setting("gptq", ALL, "linear", LOW, slopes(GPTQ)),
    Setting("hqq", (3.0, 8.0), "block", HIGH, (*slopes(HQQ), *papers(HQQ), *games(HQQ))),
    Setting("gptq", ALL, "group", LOW, (
        replace(FINE, text=32), replace(WIDE, refine=("swaps", 60), budgets=(3.0,), game=16))),
    Setting("gptq", ALL, "linear", LOW, (replace(FINE, text=32),)),
)
LONG = (
    Setting("gptq", (2.0, 4.0), "block", LOW, long(GPTQ)),
    Setting("hqq", (3.0, 8.0), "block", HIGH, long(HQQ)),
    Setting("gptq", ALL, "group", LOW, drawn(GPTQ, ONE, TWO, WIDE, WIDEST, ISOLATED)),
    Setting("gptq", ALL, "linear", LOW, drawn(GPTQ, ONE, TWO, WIDE, WIDEST)),
    Setting("gptq", (2.0, 4.0), "block", LOW, drawn(GPTQ, *FEW, TWO)),
    Setting("hqq", (3.0, 8.0), "block", HIGH, drawn(HQQ, *FEW, TWO)),
)
MENUS = {"gptq": ALL, "hqq": (3.0, 4.0, 8.0)}
"""Widths of a backend's settings and uniform references."""
