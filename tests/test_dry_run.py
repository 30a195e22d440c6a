"""A dry run forecasts what a run does and takes, without weights, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from impq_core.cli import cli, main
from impq_core.config import RunConfig, TextConfig
from impq_core.errors import ImpqError
from impq_core.interfaces import Inspector
from impq_core.machine import free_disk, free_memory, parse_vm_stat
from impq_core.model.demo import demo_path
from impq_core.model.layers import layers_of
from impq_core.model.shapes import Shapes
from impq_core.plugins import Plugins
from impq_core.runs import forecast as forecasting
from impq_core.runs.forecast import forecast_run, forecast_sweep
from impq_core.runs.grid import Sweep
from impq_core.runs.pipeline import run
from impq_core.runs.prepare import prepare
from impq_core.runs.session import Session
from impq_core.runs.sweep import run_sweep
from impq_core.testing import tiny_model
from impq_core.types import Plan

PLAYERS: list[tuple[str, str, dict[str, Any], float]] = [
    ("group", "isolated", {}, 0.001),
    ("group", "isolated", {"base": 3.0}, 0.001),
    ("group", "clado", {"pairs": "block"}, 0.001),
    ("group", "gamma", {"steps": 4}, 0.001),
    ("block", "clado", {}, 0.001),
    ("block", "spqe", {"permutations": 3, "antithetic": False}, 0.001),
    ("block", "spqe", {"permutations": 6}, 0.05),  # pairs of orders meet in a pick
    ("block", "spqe", {"fresh": False}, 0.1),
    ("block", "spqe", {"around": 3.0, "span": 0.5}, 0.15),  # a few picks an order
    ("block", "spqe", {"around": 2.1, "span": 0.5}, 0.15),
    ("block", "spqe", {"around": 3.9, "span": 0.5}, 0.15),
    ("group", "coarse-to-fine", {}, 0.1),  # the plan decides which moves there are
]
"""Granularity, estimator, options, and how far a forecast of forwards may be from the measured number."""

INSPECTORS = sorted(set(Plugins().names("estimator")) - {estimator for _, estimator, _, _ in PLAYERS})
"""The other estimators, which play no game."""

LEFT_OUT = {"lieq": 0.13}
"""The most that a forecast leaves out of an estimator's work: products of outputs."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, texts: tuple[Path, Path]) -> RunConfig:
    """A model of eight blocks: in fewer, the picks of different orders are often the same."""
    folder = tiny_model(tmp_path_factory.mktemp("model") / "llama", blocks=8)
    return RunConfig(model=str(folder), backend="hqq", bits=(2, 3, 4), granularity="group", game_windows=4,
                     calibration=TextConfig(str(texts[0]), 12, 48), evaluation=TextConfig(str(texts[1]), 4, 40),
                     dtype="float32", tracking_uri="none", cache=False, fallback="no")


@pytest.fixture(scope="module")
def session(base: RunConfig) -> Session:
    """The model with its variants."""
    session = Session(prepare(base, Plugins()), Plugins())
    session.quantize_for_game()
    return session


def measured(session: Session, config: RunConfig) -> float:
    """Forwards that the configuration's estimator is charged."""
    prepared = prepare(config, Plugins())
    seen = session.for_space(prepared)
    game = seen.game() if prepared.calibration else None
    probe = game.probe if game else seen.probe()
    return prepared.parts.measure(game, probe, np.random.default_rng(0)).forwards


@pytest.mark.parametrize("value", ["nll", "kl"])
@pytest.mark.parametrize("estimator", INSPECTORS)
def test_forwards_of_inspectors_are_exact(estimator: str, value: str, base: RunConfig, session: Session) -> None:
    config = replace(base, estimator=estimator, value=value, probe_windows=3)
    forecast = forecast_run(config).searches[0].forwards["estimate"]
    assert forecast == pytest.approx(measured(session, config), rel=max(1e-6, LEFT_OUT.get(estimator, 0)))


@pytest.mark.parametrize(("granularity", "estimator", "options", "tolerance", "value"), [
    *((*player, "nll") for player in PLAYERS),
    *((*player, "kl") for player in {player[1]: player for player in reversed(PLAYERS)}.values())])
def test_forwards_of_players_are_near(granularity: str, estimator: str, options: dict[str, Any], tolerance: float,
                                      value: str, base: RunConfig, session: Session) -> None:
    config = replace(base, granularity=granularity, estimator=estimator, value=value, options={"estimator": options})
    forecast = forecast_run(config).searches[0].forwards["estimate"]
    # Batches of picks, for each of which kl makes the unquantized logits again, are forecast as full.
    assert forecast == pytest.approx(measured(session, config), rel=max(tolerance, 0.1 * (value == "kl")))


def test_forwards_of_every_architecture_are_exact(base: RunConfig, tmp_path: Path) -> None:
    """Biases, gates of other names, windows of attention and fused linears change no number."""
    for architecture in ("qwen2", "gemma2", "phi3"):
        config = replace(base, model=str(tiny_model(tmp_path / architecture, architecture, blocks=2)),
                         estimator="aumann-shapley", granularity="block")
        session = Session(prepare(config, Plugins()), Plugins())
        session.quantize_for_game()
        forecast = forecast_run(config)
        assert forecast.flops == 4 * session.runner.cost(session.prepared.evaluation.ids[:, :1].repeat(48, 1)).total
        assert forecast.searches[0].forwards["estimate"] == pytest.approx(measured(session, config), rel=1e-6)


def meta_model(kind: str, **settings: Any) -> Any:
    """A model of a type without weights, of two blocks and hidden width 64."""
    config = CONFIG_MAPPING[kind](vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                                  num_attention_heads=4, num_key_value_heads=2, **settings)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_a_token_meets_the_experts_that_it_is_routed_to() -> None:
    model = meta_model("mixtral", num_local_experts=8, num_experts_per_tok=2)
    shapes = Shapes.of(model, layers_of(model, "group"))
    dense, routed = 2 * 64 * 64 + 2 * 64 * 32 + 8 * 64, 8 * 3 * 64 * 128  # attention and router; experts
    assert [(block.weights, block.active) for block in shapes.blocks] == [(dense + routed, dense + routed / 4)] * 2
    assert shapes.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_a_setting_that_differs_between_blocks_is_no_error() -> None:
    """transformers refuses to name one width of the heads of such a model."""
    model = meta_model("gemma4_text")
    with pytest.raises(RuntimeError, match="'head_dim' is a per-layer"):
        _ = model.config.head_dim
    assert Shapes.of(model, layers_of(model, "group")).attention == 64


def test_an_estimator_without_a_workload_is_unknown(base: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its forwards are null in JSON, and its memory is that of gradients."""
    known = forecast_run(replace(base, estimator="aumann-shapley")).searches[0]
    monkeypatch.setattr("impq_scores.inspected.Lim.workload", Inspector.workload)
    search = forecast_run(replace(base, estimator="lim")).searches[0]
    assert search.forwards["estimate"] is None and search.losses is None
    assert search.memory["estimate"].items() >= {
        name: size for name, size in known.memory["estimate"].items() if name != "hidden_states"}.items()
    assert search.memory["estimate"]["hidden_states"] > known.memory["estimate"]["hidden_states"]  # picks may be many


def test_sizes_are_those_of_the_run(base: RunConfig) -> None:
    config = replace(base, budget="2.75bits", exclude=("*.0.mlp.down_proj",), pins={"*.1.self_attn*": 4.0})
    prepared, forecast = prepare(config, Plugins()), forecast_run(config)
    [search] = forecast.searches
    space = prepared.space
    assert forecast.config == prepared.config
    assert (search.smallest.bytes, search.largest.bytes) == (space.low_bytes, space.high_bytes)
    [budget] = search.budgets
    assert budget.bytes == prepared.budget_bytes and budget.budget == "2.75bits"
    assert budget.bits_stored == space.bits_per_weight(budget.bytes)
    reasons = {part.name: (part.bits, part.reason) for part in search.fixed}
    assert reasons["model.layers.0.mlp.down_proj"] == ("16", "excluded")
    assert {bits for name, (bits, _) in reasons.items() if name.startswith("model.layers.1.self_attn")} == {"4"}
    layers = {layer.name for layer in space.everyone}
    assert sum(part.bytes for part in search.fixed if part.name not in layers) == prepared.rest_bytes
    assert sum(part.bytes for part in search.fixed if part.name in layers) == space.fixed_bytes
    assert search.weights + sum(part.weights for part in search.fixed) == forecast.parameters


def test_a_wrong_budget_has_the_error_of_the_run(base: RunConfig) -> None:
    config = replace(base, budget="1MB")
    with pytest.raises(ImpqError) as of_run:
        prepare(config, Plugins())
    with pytest.raises(ImpqError) as of_forecast:
        forecast_run(config)
    assert str(of_forecast.value) == str(of_run.value) and "outside what these widths can reach" in str(of_run.value)


@pytest.mark.parametrize("changes", [
    {"estimator": "spqe"}, {"estimate_with": "quanto", "bits": (2, 4)}, {"refine": 6, "estimator": "lim"},
    {"plan": "plan.json"}])
def test_a_run_takes_what_was_forecast(changes: dict[str, Any], base: RunConfig, tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMPQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    config = replace(base, granularity="block", cache=True, output=str(tmp_path / "runs"), **changes)
    if config.plan:
        result = run(replace(config, plan="", estimator="random", output=str(tmp_path / "before")), Plugins())
        shutil.copy(result.folder / "plan.json", config.plan)
    [search] = forecast_run(config).searches
    result = run(config, Plugins())
    planned = (search.forwards["estimate"] or 0.0) + (search.forwards["refine"] or 0.0)
    assert planned == pytest.approx(result.forwards, rel=0.15)
    size = sum(file.stat().st_size for file in result.folder.rglob("*") if file.is_file())
    assert size / 3 <= search.disk["run_bytes"] <= 3 * size
    kept = sum(file.stat().st_size for file in (tmp_path / "cache" / "variants").rglob("*.safetensors"))
    assert search.disk["cache_bytes"] == pytest.approx(kept, rel=0.15)


def test_statistics_plans_and_scores_cost_what_was_forecast(base: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages that no report counts: blocks run over windows, and floating point operations."""
    from impq_core.model.blockwise import BlockwiseModel
    from impq_core.model.cost import flop_counter

    monkeypatch.setattr("impq_hqq.backend.Hqq.needs", frozenset({"activations"}))
    config = replace(base, granularity="block", estimator="random", bits=(2, 4), value="kl")
    forecast = forecast_run(config)
    forwards, unit = forecast.searches[0].forwards, forecast.flops
    session = Session(prepare(config, Plugins()), Plugins())
    prepared, runner = session.prepared, session.runner
    assert prepared.calibration is not None
    for windows in (prepared.calibration, prepared.calibration.first(4), prepared.evaluation):
        runner.embed(windows.ids)  # checks partial forwards, which is not forecast
    cost, run_batch, done = runner.cost(prepared.calibration.ids), BlockwiseModel.run_batch, [0]

    def counted(self: BlockwiseModel, index: int, hidden: Any) -> Any:
        done[0] += len(hidden.ids) * cost.blocks[index]
        return run_batch(self, index, hidden)

    with monkeypatch.context() as patch:
        patch.setattr(BlockwiseModel, "run_batch", counted)
        session.quantize_for_game()
    assert forwards["quantize"] == pytest.approx(done[0] / unit)
    space = prepared.space
    with flop_counter() as counter:
        game = session.game()
        game.loss(space.uniform(1))
    assert forwards["plan"] == pytest.approx(counter.get_total_flops() / unit)
    plan = Plan(space, np.array([0, 1] * 4), prepared.budget_bytes, method="every other layer")
    with flop_counter() as counter:
        evaluation = session.evaluate(session.evaluator(), plan)
    assert len({float(row.nll) for row in evaluation.rows if row.score}) == 9, "two allocations are the same: no test"
    done_forwards = counter.get_total_flops() / unit  # allocations share the blocks in which they are the same
    assert done_forwards <= forwards["evaluate"] <= 1.2 * done_forwards


def test_a_sweep_shares_what_is_shared(base: RunConfig, tmp_path: Path) -> None:
    """Variants and references are in the first search of a backend; every search has its estimate and its plans."""
    sweep = Sweep(replace(base, granularity="block", output=str(tmp_path / "runs")),
                  {"estimator": ["isolated", "lim"], "budget": ["2.5bits", "3bits"], "backend": ["hqq"],
                   "surrogate": ["additive"]})
    forecast = forecast_sweep(sweep, Plugins())
    first = forecast.searches[0]
    alone = forecast_run(replace(sweep.base, estimator="isolated", budget="3bits"))
    assert [size.budget for size in first.budgets] == ["2.5bits", "3bits"]
    assert first.forwards["estimate"] == alone.searches[0].forwards["estimate"]
    evaluations = [search.forwards["evaluate"] or 0.0 for search in forecast.searches]
    assert evaluations[0] > 4 * evaluations[1] > 0
    folder = run_sweep(sweep, Plugins())
    lines = (folder / "scores-hqq.jsonl").read_text().splitlines()[1:]
    one = evaluations[1] / 2  # two plans
    assert len(lines) <= sum(evaluations) / one <= len(lines) + 8  # plans and references can be the same pick
    assert forecast.disk["cache_bytes"] == first.disk["cache_bytes"]


PEAK = """
import resource, sys
from impq_core.config import read_toml
from impq_core.plugins import Plugins
from impq_core.runs.pipeline import run
from pathlib import Path
run(read_toml(Path(sys.argv[1])), Plugins())
status = Path("/proc/self/status")
if status.exists():  # ru_maxrss there begins with the peak of the parent
    print("PEAK", 1024 * int(status.read_text().split("VmHWM:")[1].split()[0]))
    sys.exit()
unit = 1 if sys.platform == "darwin" else 1024
print("PEAK", unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_is_near_the_peak_of_the_run(base: RunConfig, tmp_path: Path) -> None:
    """A model with a large vocabulary: no more than the logits of a few positions exist at once."""
    from transformers import AutoConfig, AutoTokenizer

    shape = AutoConfig.from_pretrained(base.model)
    shape.vocab_size, shape.num_hidden_layers, shape.hidden_size, shape.intermediate_size = 32_000, 2, 256, 512
    AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path / "wide")
    AutoTokenizer.from_pretrained(base.model).save_pretrained(tmp_path / "wide")
    config = replace(base, model=str(tmp_path / "wide"), backend="quanto", bits=(2, 4), output=str(tmp_path / "runs"),
                     calibration=replace(base.calibration, windows=6, length=256), estimator="fisher", game_windows=1,
                     evaluation=replace(base.evaluation, windows=1))
    (tmp_path / "impq.toml").write_text(config.to_toml())
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path / "impq.toml")], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    peak = int(re.findall(r"PEAK (\d+)", done.stdout)[0])
    assert peak / 1.3 <= forecast_run(config).peak[1] <= 1.3 * peak


def command(*arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command in this process."""
    answer = CliRunner().invoke(cli, arguments)
    return answer.exit_code, answer.stdout, answer.stderr


@pytest.fixture
def arguments(base: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The options of a run in an empty folder, with an empty cache."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("IMPQ_CACHE", str(tmp_path / "no" / "cache"))
    return ["--model", base.model, "--backend", "hqq", "--bits", "2,4", "--calibration", base.calibration.source,
            "--evaluation", base.evaluation.source, "--calibration-windows", "8", "--evaluation-windows", "8"]


@pytest.mark.parametrize("name", ["run", "sweep"])
def test_nothing_is_written_and_no_weight_is_read(name: str, arguments: list[str], base: RunConfig, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's store included; weights that cannot be read are no hindrance."""
    model = tmp_path / "hollow"
    shutil.copytree(base.model, model)
    (model / "model.safetensors").write_bytes(b"no weights")
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = command(name, *arguments[2:], "--model", str(model), "--dry-run")
    assert code == 0 and "budget 3bits" in out and "8 blocks" in out
    assert sorted(tmp_path.rglob("*")) == before


def test_the_peak_of_the_json_is_that_of_its_stages(arguments: list[str]) -> None:
    for name in ("run", "sweep"):
        code, out, _ = command(name, *arguments, "--exclude", "*.0.mlp*", "--dry-run", "--json")
        data = json.loads(out)["result"]
        assert code == 0 and {search["estimator"] for search in data["searches"]} == {RunConfig().estimator}
        memory = data["searches"][0]["memory"]
        assert data["memory"]["peak_bytes"] == max(sum(sizes.values()) for sizes in memory.values())


@pytest.mark.parametrize(("words", "code", "name"), [
    (["run", "--dry-run", "--quiet", "--json"], 2, "--quiet"),
    (["run", "--dry-run", "--resume", "impq-runs/x"], 2, "--dry-run"),
    (["run", "--dry-run", "--estimator", "spqq"], 2, "spqe"),
    (["run", "--dry-run", "--budget", "9bits"], 2, "9bits"),
    (["run", "--dry-run", "--export", "ggml"], 2, "ggml"),
    (["run", "--dry-run", "--pin", "nothing=2"], 2, "nothing"),
    (["run", "--dry-run", "--calibration", "missing.txt"], 1, "missing.txt"),
    (["run", "--dry-run", "--model", "demo"], 1, "demo"),
    (["sweep", "--dry-run", "--budget", "2bits,9bits"], 2, "9bits")])
def test_a_typo_is_one_line(words: list[str], code: int, name: str, arguments: list[str],
                            capsys: pytest.CaptureFixture[str]) -> None:
    given = [*words[:1], *arguments, *words[1:]] if "--resume" not in words else words
    with pytest.raises(SystemExit) as end:
        main(given)
    line = capsys.readouterr().err.strip()
    assert end.value.code == code and name in line and "\n" not in line and line.startswith("impq: ")
    assert not list(Path().iterdir()) and not demo_path().exists()


def test_too_little_memory_and_disk_are_warnings(base: RunConfig, arguments: list[str],
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecasting, "free_memory", lambda: 10**6)
    monkeypatch.setattr(forecasting, "free_disk", lambda folder: 10)
    code, _, err = command("run", *arguments, "--dry-run")
    assert code == 0 and len(err.strip().splitlines()) == 3, "memory, the cache's disk, and the run's"
    assert len(forecast_run(replace(base, cache=False)).warnings) == 2
    monkeypatch.setattr(forecasting, "free_memory", lambda: None)
    assert len(forecast_run(base).warnings) == 1


def test_free_memory_is_the_least_of_machine_and_container(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       2000 kB\nMemFree:        10 kB\nMemAvailable:   1000 kB\n")
    assert free_memory(meminfo, tmp_path) == 1_024_000
    for name, text in (("max", "max"), ("current", "500000"), ("stat", "anon 1\ninactive_file 1000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert free_memory(meminfo, tmp_path) == 1_024_000
    (tmp_path / "memory.max").write_text("600000")
    assert free_memory(meminfo, tmp_path) == 101_000
    assert 0 < (free_memory() or 0) <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # of this machine


def test_free_memory_of_macos() -> None:
    text = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               10.
Pages active:                            300.
Pages inactive:                           20.
Pages speculative:                         5.
Pages wired down:                         99.
"""
    assert parse_vm_stat(text) == 35 * 16384
    assert parse_vm_stat("command not found") is None


def test_free_disk_of_a_folder_that_is_to_be_made(tmp_path: Path) -> None:
    assert free_disk(tmp_path / "not" / "yet") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.01)
