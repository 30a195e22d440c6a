"""The protocol of CoopQ (arXiv 2509.15455): decoder blocks at 2 or 4 bits, SPQE measured with Quanto and with the
deployed backend, beside the paper's baselines and references of the same bytes.

Rows are kept as JSON lines (``--kept``), each on disk before the next is measured, and every measured loss in a folder
beside the file. A stopped benchmark continues; several processes may measure backends at once, each into a file of its
own in the same folder. ``--report`` writes results/paper.md from the kept rows, without a model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from cells import Cell, Method, add_texts
from common import Bench, write
from paper_report import report
from rows import KEPT, Kept, read_rows, variants_of

from impq_core.config import RunConfig, TextConfig
from impq_core.errors import ImpqError, UsageError
from impq_core.ledger import MeasurementLog
from impq_core.parts import Parts
from impq_core.plugins import Plugins
from impq_core.runs.prepare import prepare
from impq_core.types import Measurements

MENU = ("2", "4")
BUDGETS = (2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 3.75)
PROXY = "quanto"
"""The backend that the paper measures with."""

SAMPLED = {"antithetic": False, "fresh": False}
BASELINES = (
    Method("Z-score, more outliers", "zscore", options={"estimator": {"direction": "more"}}, reads_text=False),
    Method("Z-score, fewer outliers", "zscore", options={"estimator": {"direction": "fewer"}}, reads_text=False),
    Method("LIM", "lim"),
    Method("LLM-MQ", "llm-mq"),
    Method("Activation", "activation"),
)
"""The baselines of the paper. It says that blocks with more outlying weights are more important; the original
(arXiv 2406.17415) says fewer."""

OURS = tuple(Method(f"impq: {name}", name) for name in dict.fromkeys((RunConfig().estimator, "aumann-shapley")))


@dataclass(frozen=True, eq=False)
class PaperCell(Cell):
    """A model and a deployed backend, under CoopQ's protocol."""

    @cached_property
    def proxy(self) -> Bench:
        """The model with Quanto's variants."""
        return Bench.build(replace(self.config, backend=PROXY))

    def measure(self, permutations: int, seeds: int) -> None:
        """Measure all rows that are missing, the most informative first."""
        self.uniforms()
        self.references()
        for seed in range(seeds):
            for method in BASELINES:
                self.estimated(method, seed)
            self.sampled(self.config.backend, seed, permutations)
            for method in OURS:
                self.estimated(method, seed)
            if self.config.backend != PROXY:
                self.sampled(PROXY, seed, permutations)

    def sampled(self, measured: str, seed: int, permutations: int) -> None:
        """The rows of SPQE with the paper's covariance, from a growing number of permutations."""
        name = "measured with Quanto" if measured == PROXY else "measured as deployed"
        for count in sorted({max(2, permutations // 5), max(2, permutations // 2), permutations}):
            method = Method(f"CoopQ, {count} permutations, {name}", "spqe",
                            options={"estimator": {**SAMPLED, "permutations": count}})
            budgets = self.kept.missing(self.facts, method.label, seed, self.budgets)
            if budgets:
                surrogate = Parts.build(replace(self.config, surrogate="covariance"), Plugins()).surrogate
                self.plan(method, surrogate.fit(self.losses(measured, seed, method)), budgets, seed)

    def losses(self, measured: str, seed: int, method: Method) -> Measurements:
        """SPQE's losses with the variants of a backend, read if a process has measured them."""
        prepared = self.prepared if measured == self.config.backend else prepare(
            replace(self.config, backend=measured), Plugins())
        text = self.text(seed)
        facts = [self.facts["model"], measured, variants_of(prepared), MENU, text.digest, seed]
        name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        folder = self.kept.path.parent / "paper-losses"
        folder.mkdir(exist_ok=True)
        path = folder / f"{name}-{method.options['estimator']['permutations']}.npz"
        if not path.exists():
            bench = self.bench if measured == self.config.backend else self.proxy
            key = prepared.losses_key(prepared.game_space, text)
            # Another process may measure the same: the name of the log has this one's backend.
            with closing(MeasurementLog(folder / f"{name}-for-{self.config.backend}.jsonl", key)) as log:
                config = method.applied(self.config)
                game = bench.game(config, text=text, log=log)
                result = Parts.build(config, bench.session.plugins).measure(
                    game, game.probe, np.random.default_rng(seed))
            assert isinstance(result, Measurements)
            result.save(path)
        return Measurements.load(path)


def cells(given: argparse.Namespace) -> Iterator[PaperCell]:
    """The cells of the command line. Everything that a word can break is checked before the first is measured."""
    if given.permutations < 2:
        raise UsageError("--permutations takes a number from 2 on: a covariance needs two")
    if given.seeds < 1:
        raise UsageError("--seeds takes a number from 1 on")
    configs = []
    for model in given.models.split(","):
        for backend in given.backends.split(","):
            config = RunConfig(
                tracking_uri="none", model=model, backend=backend, bits=MENU, granularity="block", estimator="spqe",
                device=given.device, dtype=given.dtype, game_windows=given.windows,
                calibration=TextConfig(given.calibration, max(64, given.windows * given.seeds), given.length),
                evaluation=TextConfig(given.text, given.evaluation_windows, given.length))
            prepare(config, Plugins())
            configs.append(config)
    kept = Kept(given.kept[0])
    for config in configs:
        yield PaperCell(config, kept, BUDGETS)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="demo", help="demo and folders of models, with , between [demo]")
    parser.add_argument("--backends", default="quanto,hqq,gptq", help="with , between [quanto,hqq,gptq]")
    parser.add_argument("--permutations", type=int, default=50, help="of SPQE [50]; a fifth and half of them have rows")
    parser.add_argument("--windows", type=int, default=8, help="calibration windows of every estimator [8]")
    add_texts(parser, evaluation_windows=32)
    parser.add_argument("--dtype", default="float32", help="of the forwards [float32]")
    parser.add_argument("--kept", type=Path, nargs="+", default=[KEPT / "paper.jsonl"],
                        help="file of rows; with --report also several [kept/paper.jsonl]")
    parser.add_argument("--report", action="store_true", help="measure nothing: write results/paper.md from the rows")
    given = parser.parse_args(words)
    try:
        if given.report:
            rows = read_rows(given.kept)
            if not rows:
                raise ImpqError(f"{given.kept[0]} has no rows: leave out --report, and they are measured")
            write("paper.md", report(rows))
            return 0
        for cell in cells(given):
            cell.measure(given.permutations, given.seeds)
    except ImpqError as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
