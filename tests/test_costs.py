"""Costs beside bytes: limits of plans, tables, traffic, and whole runs with meters."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from impq_greedy.allocators import Exhaustive, Greedy
from impq_meters.table import Options, Table
from impq_qp.program import QuadraticProgram

from impq_core.config import RunConfig
from impq_core.costs import Cost, Metering, fit, fits
from impq_core.errors import ImpqError, InvalidArrays, UsageError
from impq_core.feasible import least, require_fitting
from impq_core.forecast_lines import forecast_lines
from impq_core.interfaces import Form, InputFile, Stored
from impq_core.plugins import Plugins
from impq_core.runs.allocate import allocate_run
from impq_core.runs.forecast import forecast_run
from impq_core.runs.layout import lay_out
from impq_core.runs.pipeline import resume, run
from impq_core.space import Choice, LayerSpec, LinearSpec
from impq_core.testing import planted_estimate, planted_space, tiny_model
from impq_core.types import Plan, SensitivityEstimate
from impq_core.units import at_least, parse_amount

FOUR, TWO = Choice(4, 64), Choice(2, 64)


def limited_cost(values: np.ndarray, share: float, name: str = "latency") -> Cost:
    """A cost whose limit is at a share of the way from its least to its most."""
    low, high = values.min(axis=1).sum(), values.max(axis=1).sum()
    return Cost(name, "ms", "planted", values, limit=float(low + share * (high - low)))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 5), st.sampled_from([(4, 2), (4, 3, 2)]), st.booleans(),
       st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_plans_of_two_limits_are_those_of_all_plans(seed: int, n: int, bits: tuple[int, ...], pairs: bool,
                                                    shares: list[float]) -> None:
    estimate = planted_estimate(seed, n, bits, 0.3 * pairs)
    space, rng = estimate.space, np.random.default_rng(seed)
    limits = [limited_cost(rng.random(space.nbytes.shape), share, f"cost{at}") for at, share in enumerate(shares[:2])]
    budget = int(space.low_bytes + shares[2] * (space.high_bytes - space.low_bytes))
    picks = np.array(list(itertools.product(range(len(bits)), repeat=n)))
    fitting = picks[fit(space, picks, budget, limits)]
    found = least(space, limits[0].values, budget, limits)
    assert (found is not None) == bool(len(fitting))
    if not len(fitting):
        with pytest.raises(UsageError, match=r"--budget|--limit"):
            require_fitting(space, budget, limits)
        for allocator in (Greedy(), Exhaustive(), QuadraticProgram()):
            with pytest.raises(ImpqError):
                allocator.allocate(estimate, budget, limits)
        return
    assert found is not None and fits(space, found, budget, limits)
    assert limits[0].of(found) <= limits[0].of_all(fitting).min() + 1e-3
    best = estimate.predict(fitting).min()
    for allocator in (Greedy(), Exhaustive(), QuadraticProgram()):
        plan = allocator.allocate(estimate, budget, limits)
        assert fits(space, plan.pick, budget, limits) and plan.predicted_loss >= best - 1e-9
        assert isinstance(allocator, Greedy) or plan.predicted_loss == pytest.approx(best, abs=1e-6)


def test_a_limit_is_kept_where_narrow_types_are_slow() -> None:
    """As on a processor, where the smallest type is the slowest: the limit asks for wider choices than the budget."""
    estimate = planted_estimate(3, 24, (8, 4, 2), 0.02)
    space = estimate.space
    values = np.tile([2.0, 1.0, 3.0], (24, 1))
    budget = (2 * space.low_bytes + space.high_bytes) // 3
    free = QuadraticProgram().allocate(estimate, budget)
    cost = Cost("latency", "ms", "planted", values, limit=0.8 * Cost("a", "ms", "planted", values).of(free.pick))
    for allocator in (Greedy(), QuadraticProgram()):
        plan = allocator.allocate(estimate, budget, [cost])
        assert fits(space, plan.pick, budget, [cost])
    assert plan.bound is not None and plan.predicted_loss >= free.predicted_loss - 1e-9
    assert plan.gap < 0.05 * plan.predicted_loss


def test_a_plan_of_its_own_kind_is_not_accepted_above_a_limit() -> None:
    space = planted_space(3)
    cost = Cost("latency", "ms", "planted", np.ones((3, 2)), limit=2.0)
    with pytest.raises(InvalidArrays, match="latency"):
        Plan(space, space.uniform(0), space.high_bytes, costs=(cost,))
    plan = Plan(space, space.uniform(0), space.high_bytes, costs=(replace(cost, limit=3.0),))
    assert plan.admits(space.uniform(0)) and not replace(plan, pick=space.uniform(1), budget_bytes=space.low_bytes,
                                                         costs=()).admits(space.uniform(0))


def test_the_nearest_limits_that_are_named_are_possible() -> None:
    estimate = planted_estimate(1, 6, (4, 2), 0.0)
    space = estimate.space
    values = np.tile([1.0, 2.0], (6, 1))  # narrow is slow
    cost = Cost("latency", "ms", "planted", values, limit=7.0)
    with pytest.raises(UsageError) as caught:
        require_fitting(space, space.low_bytes, [cost])
    text = str(caught.value)
    nearest = float(text.split("possible are latency=")[1].split("ms")[0])
    require_fitting(space, space.low_bytes, [replace(cost, limit=nearest)])
    nbytes = int(text.split("quantized weights of ")[1].split("B")[0])
    require_fitting(space, nbytes, [cost])
    with pytest.raises(UsageError, match="6ms"):
        require_fitting(space, space.high_bytes, [replace(cost, limit=5.9)])


@given(st.floats(1e-3, 1e9), st.sampled_from(["ms", "bytes", "mJ"]))
def test_amounts_that_are_shown_can_be_typed(amount: float, unit: str) -> None:
    read = parse_amount(at_least(amount, unit), unit, "--limit x")
    assert amount * (1 - 1e-9) <= read <= amount * 1.002


@pytest.mark.parametrize("text", ["", "fast", "-1ms", "0ms", "9 parsecs", "1e999", "nan", "9bits", "٣ms"])
def test_no_amount_of_time(text: str) -> None:
    with pytest.raises(UsageError, match="--limit latency"):
        parse_amount(text, "ms", "--limit latency")


def test_amounts_of_other_units() -> None:
    assert [parse_amount(text, "ms", "") for text in ("9", "9ms", ".009 s", "9000us")] == pytest.approx([9] * 4)
    assert parse_amount("1.2GB", "bytes", "") == 1.2e9 and parse_amount("3mJ", "mJ", "") == 3


def forms() -> tuple[Form, ...]:
    gate, down = LinearSpec("layers.0.gate", 128, 64), LinearSpec("layers.0.experts.1.down", 64, 128)
    both = LayerSpec("layers.0", 0, (gate, down))
    return tuple(Form(both, choice, (Stored(gate, choice, 10), Stored(down, choice, 10, 0.25)))
                 for choice in (FOUR, TWO, None))


def table(folder: Path, text: str) -> Table:
    (folder / "costs.csv").write_text(text)
    return Table(Options(InputFile(folder / "costs.csv")))


def test_lines_of_layers_come_before_those_of_linears_and_shapes(tmp_path: Path) -> None:
    meter = table(tmp_path, "layer,choice,cost,error\n*.gate,*,1,0.1\n64x128,4,2,0\n64x128,2,8,0\nlayers.0,2,7,0.5\n"
                            "rest,*,3,0.25\n")
    readings = meter.read(forms(), "float32", lambda done, total: None)
    assert readings.values[:2].tolist() == [1 + 2 / 4, 7] and np.isnan(readings.values[2])
    assert readings.stderr is not None and readings.stderr[:2].tolist() == [0.1, 0.5]
    assert (readings.rest, readings.rest_stderr) == (3, 0.25)


@pytest.mark.parametrize(("text", "where"), [
    ("", "header"), ("a,b\n", "header"), ("layer,choice,cost\n", "lines"), ("layer,choice,cost\n*,4,fast\n", "line 2"),
    ("layer,choice,cost\n*,4,1\n\n*,2,-1\n", "line 4"), ("layer,choice,cost\n*,4,nan\n", "line 2"),
    ("layer,choice,cost\n*,4\n", "line 2"), ("layer,choice,cost\n,4,1\n", "line 2"),
    ("layer,choice,cost\n*,4,1\n", "no line for 2")])
def test_wrong_tables_are_refused(tmp_path: Path, text: str, where: str) -> None:
    with pytest.raises(ImpqError, match=where):
        table(tmp_path, text).check((FOUR, TWO))


def test_readings_survive_their_file(tmp_path: Path) -> None:
    metering = Metering("m", "latency", "ms", {"a": {"4": (1 / 3, 0.1), "unquantized": (3.0, 0.0)}}, 0.1, 0.01, ("x",))
    again = Metering.from_dict(json.loads(json.dumps(metering.to_dict())))
    assert again.to_dict() == metering.to_dict()
    assert again.of(["a"], [FOUR]) == 1 / 3 + 0.1 and again.of(["a"], [TWO]) is None
    space = replace(planted_space(1), choices=(FOUR, TWO))
    with pytest.raises(ImpqError, match=r"'m'.*blocks\.0"):
        metering.on(space)


def config_with(tiny_config: RunConfig, folder: Path) -> RunConfig:
    """A run whose meter says that narrow is slow, beside the traffic."""
    (folder / "ms.csv").write_text("layer,choice,cost,error\nmodel.layers.?,4,1,0.01\nmodel.layers.?,2,1.5,0.01\n"
                                   "*,3,1.25,0\nrest,*,0.5,0\n")
    return replace(tiny_config, estimator="first-last", budget="3bits", meters=("table", "traffic"),
                   options={"meter.table": {"file": str(folder / "ms.csv")}, "backend": {"grid": "min-max"}})


@pytest.mark.usefixtures("variants")
def test_a_run_keeps_its_limit_and_is_resumed(tiny_config: RunConfig, tmp_path: Path) -> None:
    config = replace(config_with(tiny_config, tmp_path), limits={"latency": "5.5ms"})
    result = run(config)
    assert result.plan is not None and result.evaluation is not None
    stored = json.loads((result.folder / "plan.json").read_text())["costs"]
    assert stored["latency"]["value"] <= 5.5 and stored["latency"]["limit"] == 5.5 and stored["latency"]["unit"] == "ms"
    assert stored["traffic"]["value"] > result.plan.nbytes and stored["traffic"]["limit"] is None
    rows = {row.name: row.costs for row in result.evaluation.rows}
    assert rows["plan"]["latency"] == stored["latency"]["value"]
    assert rows["uniform 2"]["latency"] == pytest.approx(6.5) and rows["uniform 3"]["latency"] == pytest.approx(5.5)
    assert "latency" not in rows["unquantized"] and rows["unquantized"]["traffic"] > rows["uniform 4"]["traffic"]
    (tmp_path / "ms.csv").write_text("layer,choice,cost\n*,*,1\n")  # what was read is kept
    for file in ("plan.json", "evaluation.json"):
        shutil.copy(result.folder / file, tmp_path / file)
    with pytest.raises(ImpqError, match="files"):
        resume(result.folder)
    config_with(tiny_config, tmp_path)
    resume(result.folder)
    for file in ("plan.json", "evaluation.json"):
        assert (result.folder / file).read_bytes() == (tmp_path / file).read_bytes()
    wider, narrower = allocate_run(result.folder, ["3bits", "2.5bits"], limits={"latency": "6ms"})
    assert wider.plan.costs[0].of(wider.plan.pick) <= 6 and narrower.plan.nbytes < wider.plan.nbytes
    with pytest.raises(UsageError, match=r"4\.5ms"):
        allocate_run(result.folder, ["4bits"], limits={"latency": "4ms"})


def test_limits_are_checked_before_weights(tiny_config: RunConfig, tmp_path: Path) -> None:
    config = config_with(tiny_config, tmp_path)
    with pytest.raises(UsageError, match=r"3bits.*latency=5ms.*latency=5\.5ms"):
        lay_out(replace(config, limits={"latency": "5ms"}), Plugins())
    with pytest.raises(UsageError, match="'traffic'"):
        lay_out(replace(config, limits={"trafic": "5MB"}), Plugins())
    chosen = lay_out(replace(tiny_config, limits={"traffic": "1GB"}), Plugins())
    assert chosen.config.meters == ("traffic",) and chosen.costs[0].limit == 1e9


def test_an_allocator_that_keeps_no_limits_is_refused(tiny_config: RunConfig, tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text("from impq_core.hookspecs import Component, hookimpl\n"
                      "from impq_core.interfaces import Allocator\nfrom impq_core.types import Plan\n"
                      "class Mine(Allocator):\n    def allocate(self, estimate, budget_bytes):\n"
                      "        space = estimate.space\n"
                      "        return Plan(space, space.uniform(len(space.choices) - 1), budget_bytes)\n"
                      "@hookimpl\ndef impq_allocators():\n    return [Component('mine', f'{__name__}:Mine')]\n")
    config, plugins = replace(tiny_config, allocator="mine", meters=("traffic",)), Plugins([plugin])
    layout = lay_out(config, plugins)
    estimate = SensitivityEstimate(layout.space, np.zeros(layout.space.nbytes.shape))
    assert layout.parts.plan(estimate, layout.budget_bytes, layout.costs).costs == layout.costs
    with pytest.raises(UsageError, match=r"'mine'.*greedy"):
        lay_out(replace(config, limits={"traffic": "1GB"}), plugins)


def test_experts_count_by_how_often_they_are_read(tmp_path: Path, tiny_config: RunConfig) -> None:
    model = tiny_model(tmp_path / "moe", "mixtral")
    facts = json.loads((model / "config.json").read_text())
    share = facts["num_experts_per_tok"] / facts["num_local_experts"]
    layout = lay_out(replace(tiny_config, model=str(model), granularity="expert", meters=("traffic",)), Plugins())
    [cost] = layout.costs
    for at, layer in enumerate(layout.space.layers):
        reads = share if ".experts." in layer.linears[0].name else 1
        assert cost.values[at] == pytest.approx(reads * layout.space.nbytes[at])
    assert share < 1 and layout.meterings[0].notes


def test_a_dry_run_shows_the_reachable_costs(tiny_config: RunConfig, tmp_path: Path) -> None:
    forecast = forecast_run(replace(config_with(tiny_config, tmp_path), limits={"latency": "6ms"}))
    [latency, traffic] = forecast.searches[0].costs
    assert any("latency by meter table: 4.5 ms to 6.5 ms a token, limit 6 ms" in line
               for line in forecast_lines(forecast))
    assert (latency.least, latency.most, latency.limit) == (4.5, 6.5, 6.0) and traffic.limit is None
