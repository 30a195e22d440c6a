"""Cost and held-out loss of plans: every estimator, surrogate and refiner on the real model.

The held-out NLL on two texts is reported against the full-model forwards of the search, with the paper's protocol and
the line of uniforms. Measurements are kept in ``--work`` and never repeated: an interrupted benchmark continues, and a
method that is added later costs only its own measurements.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from common import Bench, add_model, model_name
from frontier_report import Row, write_report
from frontier_settings import GAME_WINDOWS, LONG, MENUS, SETTINGS, Method, Setting
from lines import Lines
from rows import UNIFORM, Kept, PlanRow, problem_of

from impq_core.budget import Budget
from impq_core.config import RunConfig, TextConfig
from impq_core.errors import ImpqError
from impq_core.game.model_game import ModelGame
from impq_core.model.text import Windows, draw_windows
from impq_core.parts import Parts
from impq_core.results import Score
from impq_core.runs.pipeline import REFINE_STREAM
from impq_core.runs.prepare import Prepared
from impq_core.space import FloatArray
from impq_core.types import Measurements, Plan, SensitivityEstimate

WORK = Path(__file__).parent / "kept" / "frontier"
TEXT_WINDOWS = 16


class Store:
    """Measurements on disk. Every score is written before the next one is measured.

    Args:
        folder: the folder; created if it is missing.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._scores = Lines(folder / "scores.jsonl")
        self.plans = Kept(folder / "plans.jsonl")
        """Every plan in the form of all benchmarks, for ``regret.py --rows``."""
        self._windows: dict[tuple[str, str], list[float]] = {
            (row["backend"], row["pick"]): row["windows"] for row in self._scores.rows}

    def path(self, *key: Any) -> Path:
        """The path, without suffix, of a result with a key."""
        return self.folder / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]

    def score(self, backend: str, pick: str, measure: Callable[[], FloatArray]) -> FloatArray:
        """Held-out NLL (windows,) of a pick; measured if it is not stored."""
        if (backend, pick) not in self._windows:
            windows = measure().tolist()
            self._scores.add({"backend": backend, "pick": pick, "windows": windows})
            self._windows[backend, pick] = windows
        return np.array(self._windows[backend, pick])


@dataclass(frozen=True, eq=False)
class Workshop:
    """A backend's model with its variants over single linears. Plans of every granularity are scored on it."""

    whole: Bench
    judge: ModelGame
    store: Store
    held_out: Windows
    texts: tuple[Windows, ...]
    """The calibration text, and texts of the same source for other seeds; disjoint, and disjoint from the held-out
    windows."""

    @classmethod
    def build(cls, chosen: str, backend: str, bits: tuple[float, ...], store: Store) -> Workshop:
        config = RunConfig(tracking_uri="none", model=chosen, backend=backend, bits=bits, granularity="linear",
                           game_windows=GAME_WINDOWS, evaluation=TextConfig(windows=TEXT_WINDOWS))
        whole = Bench.build(config)
        prepared = whole.prepared
        assert prepared.calibration is not None
        model = prepared.source
        # Windows of one text lie on a grid: those of another draw are the same or disjoint.
        other = draw_windows(TextConfig(windows=256, seed=1), "calibration", model.tokenizer(),
                             model.skeleton().get_input_embeddings().num_embeddings)
        calibration = {row.tobytes() for row in prepared.calibration.ids}
        fresh = np.stack([row for row in other.ids if row.tobytes() not in calibration])
        held_out = Windows(np.concatenate([prepared.evaluation.ids, fresh[:TEXT_WINDOWS]]), "two texts", "two texts")
        spare, size = fresh[TEXT_WINDOWS:], len(calibration)
        others = [replace(other, ids=spare[first:first + size]) for first in range(0, len(spare) - size + 1, size)]
        return cls(whole, ModelGame(prepared.space, whole.session.bank, whole.session.runner, held_out), store,
                   held_out, (prepared.calibration, *others))

    def score(self, plan: Plan) -> FloatArray:
        """Held-out NLL (windows,) of a plan of any granularity."""
        widths = plan.widths()
        choices = self.whole.prepared.space.choices
        pick = np.array([choices.index(widths[layer.linears[0].name]) for layer in self.whole.prepared.space.layers])
        return self.score_pick(pick)

    def keep(self, prepared: Prepared, plan: Plan, windows: FloatArray, budget: float, method: str, seed: int = 0,
             forwards: float = 0.0) -> None:
        """Keep a plan, its held-out NLL (windows,) and its cost."""
        text = self.held_out
        facts = {**problem_of(prepared, GAME_WINDOWS * (text.ids.shape[1] - 1)), "text": text.digest,
                 "shown": f"{text}, Wikipedia and C4"}
        if self.store.plans.missing(facts, method, seed, [budget]):
            self.store.plans.add([PlanRow.of(facts, plan, Score(windows, np.nan, np.nan), budget, method, seed,
                                             forwards)])

    def score_pick(self, pick: Any) -> FloatArray:
        """Held-out NLL (windows,) of a pick over single linears."""
        name = "".join(map(str, pick))
        return self.store.score(self.whole.prepared.config.backend, name, lambda: self._measure(pick))

    def _measure(self, pick: Any) -> FloatArray:
        return self.judge.window_losses(pick)


def measured(bench: Bench, config: RunConfig, store: Store, budget: int | None,
             text: Windows) -> tuple[SensitivityEstimate | None, Measurements | None]:
    """The estimate or the measurements of a configuration's estimator on a text, from the store or made now."""
    calibration = bench.prepared.calibration
    others = [text.digest] if calibration is None or text.digest != calibration.digest else []
    path = store.path(config.backend, config.bits, config.granularity, config.estimator,
                      dict(config.options.get("estimator", {})), config.value, config.seed, budget,
                      config.game_windows, config.probe_windows, *others)
    kinds = ((SensitivityEstimate, path.with_suffix(".estimate.npz")), (Measurements, path.with_suffix(".losses.npz")))
    results = [kind.load(file) if file.exists() else None for kind, file in kinds]
    if not any(results):
        game = bench.game(config, budget, text)
        result = Parts.build(replace(config, surrogate="additive"), bench.session.plugins).measure(
            game, game.probe, np.random.default_rng(config.seed))
        results = [result, None] if isinstance(result, SensitivityEstimate) else [None, result]
        for item, (_, file) in zip(results, kinds, strict=True):
            if item is not None:
                item.save(file)
    return results[0], results[1]


def estimates(bench: Bench, base: RunConfig, method: Method, shop: Workshop,
              budget: int | None) -> Iterator[tuple[str, int, RunConfig, SensitivityEstimate]]:
    """Name, seed, configuration and estimate for every seed, part and surrogate of a method."""
    for seed in range(method.seeds):
        options = {"estimator": dict(method.options)}
        config = replace(base, estimator=method.estimator, options=options, value=method.value, seed=seed,
                         game_windows=method.game, probe_windows=method.text)
        estimate, losses = measured(bench, config, shop.store, budget if method.aimed else None,
                                    shop.texts[seed if method.drawn else 0])
        name = method.estimator + "".join(f" {k}={v}" for k, v in method.options.items())
        name += f", {method.value}" if method.value != "nll" else ""
        name += f" on {method.game} windows" if method.game != GAME_WINDOWS and not method.refine[0] else ""
        name += f", gradients of {method.text} windows" if method.text != GAME_WINDOWS else ""
        name += f", {method.seeds} texts" if method.drawn else ""
        if losses is None:
            assert estimate is not None
            yield name, seed, config, estimate
            continue
        losses, (count, size) = replace(losses, budget_bytes=budget), method.parts
        pieces = [losses] if not count else [
            replace(losses.part(rows := np.flatnonzero(losses.path // size == part)),
                    forwards=losses.forwards * len(rows) / len(losses)) for part in range(count)]
        for part, piece in enumerate(pieces):
            for surrogate in method.surrogates:
                config = replace(config, surrogate=surrogate)
                try:
                    fitted = Parts.build(config, bench.session.plugins).surrogate.fit(piece)
                except ImpqError as error:
                    print(f"{name}, {surrogate}: {error}", flush=True)
                    continue
                label = name.replace("permutations=", f"permutations={size} of ") if count else name
                yield f"{label}: {surrogate}", part or seed, config, fitted


def rows_of(shop: Workshop, setting: Setting) -> Iterator[Row]:
    """The rows of a setting: every method at every budget."""
    base = RunConfig(tracking_uri="none", model=shop.whole.prepared.config.model, backend=setting.backend,
                     bits=setting.bits, granularity=setting.granularity,
                     game_windows=GAME_WINDOWS, evaluation=TextConfig(windows=TEXT_WINDOWS))
    bench = shop.whole.at(base)
    for method in setting.methods:
        sizes = {budget: Budget(budget, "bits").resolve(bench.prepared.space)
                 for budget in method.budgets or setting.budgets}
        one_by_one = method.aimed or "auto" in method.surrogates
        for group in ([budget] for budget in sizes) if one_by_one else [list(sizes)]:
            for name, seed, config, estimate in estimates(bench, base, method, shop,
                                                          sizes[group[0]] if one_by_one else None):
                allocator = Parts.build(replace(config, options={"allocator": {"work_limit": 10.0}}),
                                        bench.session.plugins).allocator
                for budget in group:
                    key = [setting.name, name, seed, budget]
                    plan = stored_plan(shop.store, key, bench,
                                       lambda a=allocator, e=estimate, b=sizes[budget]: a.allocate(e, b))
                    unit = method.game / GAME_WINDOWS
                    label, forwards = name, estimate.forwards * unit
                    if method.refine[0]:
                        plan, refine_forwards = refined(bench, config, plan, estimate, method, shop.store,
                                                        [*key, method.refine, method.game])
                        label, forwards = f"{name} + {method.refine[0]}", forwards + refine_forwards * unit
                        label += f" on {method.game} windows" if unit != 1 else ""
                    windows = shop.score(plan)
                    shop.keep(bench.prepared, plan, windows, budget, label, seed, forwards)
                    yield Row(setting.name, label, seed, budget, plan.nbytes, forwards, windows.tolist())


def stored_plan(store: Store, key: Sequence[Any], bench: Bench, make: Callable[[], Plan]) -> Plan:
    path = store.path("plan", *key).with_suffix(".json")
    if not path.exists():
        make().save(path)
    return Plan.load(path, bench.prepared.space)


def refined(bench: Bench, config: RunConfig, plan: Plan, estimate: SensitivityEstimate, method: Method, store: Store,
            key: Sequence[Any]) -> tuple[Plan, float]:
    """The refined plan, and the forwards of the refinement."""
    path = store.path("refined", *key).with_suffix(".json")
    cost = path.with_suffix(".cost")
    if not cost.exists():
        name, forwards = method.refine
        refiner = Parts.build(replace(config, refiner=name, refine=forwards, options={}), bench.session.plugins).refiner
        calibration, first = bench.prepared.calibration, max(method.text, method.game)
        assert refiner is not None and calibration is not None
        games = [ModelGame(bench.prepared.space, bench.session.bank, bench.session.runner, windows)
                 for windows in (calibration.first(method.game), calibration.part(first, first + method.game))]
        rng = np.random.default_rng([config.seed, *REFINE_STREAM])
        better = refiner.refine(plan, estimate, *games, float(forwards), rng)
        better.save(path)
        cost.write_text(str(sum(game.forwards for game in games)))
    return Plan.load(path, bench.prepared.space), float(cost.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="only settings with this text in their names")
    add_model(parser)
    parser.add_argument("--work", type=Path, help="folder of the measurements, of one model")
    parser.add_argument("--name", help="name of the report in results/, of all rows in --work")
    parser.add_argument("--long", action="store_true", help="also methods that need hundreds of forwards for each plan")
    given = parser.parse_args()
    beside = "" if given.model == "demo" else f"-{model_name(given.model)}"
    work, name = given.work or WORK.with_name(WORK.name + beside), given.name or f"frontier{beside}"
    store = Store(work)
    chosen = [setting for setting in (*SETTINGS, *(LONG if given.long else ())) if given.only in setting.name]
    for backend, settings in groupby(chosen, key=lambda setting: setting.backend):
        file = work / f"{backend}.rows.json"
        stored = [Row(**data) for data in json.loads(file.read_text())] if file.exists() else []
        rows = {key(row): row for row in stored}
        for row in measure(Workshop.build(given.model, backend, MENUS[backend], store), list(settings)):
            rows[key(row)] = row
            file.write_text(json.dumps([vars(row) for row in rows.values()]))
    write_report(work, TEXT_WINDOWS, name, model_name(given.model))


def measure(shop: Workshop, settings: Sequence[Setting]) -> Iterator[Row]:
    """The rows of a backend: its uniform models, then the plans of each setting."""
    space = shop.whole.prepared.space
    for k, choice in enumerate(space.choices):
        pick, nbytes = space.uniform(k), space.bytes_of(space.uniform(k))
        windows = shop.score_pick(pick)
        shop.keep(shop.whole.prepared, Plan(space, pick, nbytes), windows, choice.bits, UNIFORM)
        yield Row("uniform", f"uniform {choice}", 0, choice.bits, nbytes, 0.0, windows.tolist())
    for setting in settings:
        for row in rows_of(shop, setting):
            print(f"{row.setting}; {row.method}; seed {row.seed}; {row.budget:g} bits: "
                  f"{np.mean(row.windows):.4f} for {row.forwards:.1f}", flush=True)
            yield row


def key(row: Row) -> tuple[str, str, int, float]:
    """The identity of a row."""
    return row.setting, row.method, row.seed, row.budget


if __name__ == "__main__":
    main()
