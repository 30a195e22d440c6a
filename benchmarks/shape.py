"""The shape of the game on the real model: joint damage of k demoted blocks against the sum of their single damages.

Joint damages are measured along SPQE's random orders, single damages with all other blocks at the widest choice. Joint
damages above the sum compound, damages below it saturate.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from common import RESULTS, Bench, add_model, command, heading, model_name, page_of, plus_minus, table, write

from impq_core.compare.drawing import COLOURS, GREY
from impq_core.config import RunConfig
from impq_core.statistics import standard_error
from impq_core.types import Measurements
from impq_core.validation import HigherOrder, higher_order_share

MENUS = (("gptq", (2.0, 4.0)), ("hqq", (3.0, 8.0)), ("quanto", (4.0, 8.0)))
BASE = RunConfig(tracking_uri="none", estimator="spqe", granularity="block", game_windows=2,
                 options={"estimator": {"permutations": 4, "fresh": False}})
EVERY = 5
"""Step of the numbers of demoted blocks in the table."""


@dataclass(frozen=True, eq=False)
class Curve:
    """Losses in nats per token above the all-widest model, (permutations, n + 1) for 0 to n demoted blocks."""

    name: str
    joint: np.ndarray
    singles: np.ndarray
    share: HigherOrder
    reference: float
    forwards: float
    text: str

    def at(self, k: int) -> list[str]:
        """A row of the table. Half of the orders are reverses of the others, so they are not quite independent."""
        joint, singles = self.joint[:, k], self.singles[:, k]
        return [self.name, str(k), plus_minus(joint.mean(), standard_error(joint)), f"{singles.mean():.3f}",
                f"{joint.mean() / singles.mean():.2f}"]


def measure(config: RunConfig) -> Curve:
    """Measure a configuration of two widths: its SPQE orders, and each layer alone."""
    bench = Bench.build(config)
    space = bench.prepared.space
    single, _ = bench.estimate(replace(config, estimator="isolated", options={}))
    estimate, measured = bench.estimate(config)
    assert measured is not None and len(space.choices) == 2
    joint, together = by_size(measured, measured.losses), by_size(measured, single.predict(measured.picks))
    menu = ",".join(f"{choice}" for choice in reversed(space.choices))
    return Curve(f"{config.backend} {menu}", joint, together, higher_order_share(measured), measured.reference_loss,
                 single.forwards + estimate.forwards, f"{bench.windows}, {bench.windows.scored_tokens} scored tokens")


def by_size(measured: Measurements, values: np.ndarray) -> np.ndarray:
    """Values (N,) of the measured picks, as (permutations, n + 1) by permutation and number of demotions."""
    table = np.full((len(np.unique(measured.path)), len(measured.space) + 1), np.nan)
    table[measured.path, measured.picks.sum(axis=1)] = values
    return table


def report(curves: Sequence[Curve], picture: str) -> list[str]:
    permutations = len(curves[0].joint)
    rows = [curve.at(k) for curve in curves for k in range(EVERY, curve.joint.shape[1], EVERY)]
    shares = [[curve.name, f"{curve.reference:.3f}", f"{100 * curve.share.loss:.1f}%",
               f"{100 * curve.share.linked:.1f}%", f"{curve.forwards:.1f}"] for curve in curves]
    return ["Losses of the game, nats per token above the all-widest model: the mean over "
            f"{permutations} random orders ({permutations // 2} and their reverses) after k demotions ± its standard "
            "error, and the mean sum of the same blocks' single damages. On " + curves[0].text + ".", "",
            *table(["menu", "k", "joint", "sum of singles", "ratio"], rows),
            "Of the variance of the loss among picks of equally many demotions, the share of order two and above, "
            "which no additive model explains, and the same share after the best saturating or growing curve of an "
            "additive model (a curve changes no plan):", "",
            *table(["menu", "all-widest NLL", "order two and above", "after a curve", "forwards"], shares),
            f"![The same for every k]({picture})", ""]


def draw(curves: Sequence[Curve], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6 * -(-len(curves) // 2)), layout="constrained", dpi=110)
    for curve, axes in zip(curves, figure.subplots(-(-len(curves) // 2), 2, squeeze=False).flat, strict=False):
        places = np.arange(curve.joint.shape[1])
        axes.plot(places, curve.joint.T, color=GREY, linewidth=0.7)
        error = [standard_error(losses) for losses in curve.joint.T]
        axes.errorbar(places, curve.joint.mean(axis=0), yerr=error, color=COLOURS[0], capsize=2,
                      label="joint: mean of orders ± standard error")
        axes.plot(places, curve.singles.mean(axis=0), "--", color=COLOURS[1],
                  label="sum of single damages, same blocks")
        axes.plot([], [], color=GREY, linewidth=0.7, label="joint: each order")
        axes.set(title=f"{curve.name} bits", xlabel="demoted blocks k", ylabel="loss above all-widest (nats per token)")
        axes.legend(fontsize=8)
    for empty in list(figure.axes)[len(curves):]:
        empty.set_axis_off()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=sorted({backend for backend, _ in MENUS}),
                        help="one backend for a quick try: printed, the results stay as they are")
    add_model(parser)
    given = parser.parse_args()
    only, model = given.only, given.model
    lines = heading(f"The shape of the game on {model_name(model)}, block level", command())
    curves: list[Curve] = []
    for backend, bits in MENUS:
        if only in (None, backend):
            curves.append(measure(replace(BASE, model=model, backend=backend, bits=bits)))
            if only:
                print("\n".join(report(curves, "shape.png")), flush=True)
            else:
                picture = page_of("shape.png", model)
                write(page_of("shape.md", model), [*lines, *report(curves, picture)])
                draw(curves, str(RESULTS / picture))


if __name__ == "__main__":
    main()
