"""Runs whose embedding and head are layers, and budgets for the whole file."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stopped import cut, outcome
from transformers import AutoModelForCausalLM

from impq_core.cli import main
from impq_core.compare.read import read_contestant
from impq_core.config import RunConfig
from impq_core.errors import ImpqError, UsageError
from impq_core.exports.checkpoint import SafetensorsExporter, write_model
from impq_core.exports.export import check_formats, evaluate_folder, export_run
from impq_core.hookspecs import Component, hookimpl
from impq_core.interfaces import Checkpoint
from impq_core.plugins import Plugins
from impq_core.runs.allocate import allocate_run
from impq_core.runs.footprint import MemoryPlan
from impq_core.runs.forecast import forecast_run
from impq_core.runs.layout import lay_out
from impq_core.runs.pipeline import resume, run
from impq_core.runs.prepare import prepare
from impq_core.runs.session import Session
from impq_core.space import Choice
from impq_core.testing import tiny_model
from impq_core.types import Plan

ENDS = {"llama": ["model.embed_tokens", "lm_head"], "gemma3": ["model.embed_tokens"]}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: tiny_model(tmp_path_factory.mktemp("ends") / kind, kind, 2, vocabulary=288) for kind in ENDS}


@pytest.fixture
def config(tiny_config: RunConfig, models: dict[str, Path]) -> RunConfig:
    return replace(tiny_config, model=str(models["llama"]), quantize_embeddings=True, tracking_uri="none")


class Plain(SafetensorsExporter):
    """Every variant's tensors under their own names, those of embedding and head, too."""

    backends = frozenset({"hqq"})
    holds_ends = True

    def parts(self, choice: Choice) -> Mapping[str, str]:
        return {part: part for part in ("codes", "scale", "zero")}

    def export(self, checkpoint: Checkpoint, folder: Path) -> None:
        tensors = dict(checkpoint.dense)
        for name, variant in checkpoint.variants.items():
            tensors |= {f"{name}.{part}": tensor for part, tensor in variant.tensors.items()}
        write_model(folder, tensors, checkpoint.config)


class Greedy(Plain):
    """Writes more than it says."""

    def export(self, checkpoint: Checkpoint, folder: Path) -> None:
        super().export(replace(checkpoint, dense={**checkpoint.dense, "more": torch.zeros(1000)}), folder)


class PlainFormat:
    @hookimpl
    def impq_exporters(self) -> list[Component]:
        return [Component("plain", f"{__name__}:Plain", "for these tests"),
                Component("greedy", f"{__name__}:Greedy", "for these tests")]


def plugins() -> Plugins:
    found = Plugins()
    found.watch(PlainFormat())
    return found


CASES: dict[str, dict[str, Any]] = {
    "losses": {"estimator": "spqe", "options": {"estimator": {"permutations": 2}, "backend": {"grid": "min-max"}}},
    "divergences": {"estimator": "isolated", "value": "kl", "backend": "hqq", "refine": 4, "options": {}},
    "slopes": {"estimator": "aumann-shapley", "granularity": "group", "backend": "hqq", "options": {}},
    "traces": {"estimator": "hawq", "granularity": "linear", "backend": "hqq", "options": {}},
}


@pytest.mark.parametrize(("kind", "case"), [("llama", "losses"), ("gemma3", "divergences"), ("llama", "slopes"),
                                            ("gemma3", "slopes"), ("gemma3", "traces")])
def test_a_run_with_ends_is_resumed_bit_for_bit_and_does_not_depend_on_where_its_blocks_are(
        kind: str, case: str, config: RunConfig, models: dict[str, Path], cache: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(config, **{"model": str(models[kind]), **CASES[case]})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*rounded to nearest")
        uncut = run(config)
    whole = outcome(uncut.folder)
    assert uncut.plan is not None and uncut.evaluation is not None
    names = [layer.name for layer in uncut.plan.space.layers]
    assert [name for name in names if name in ENDS["llama"]] == ENDS[kind]
    assert uncut.plan.nbytes <= uncut.plan.budget_bytes
    stage = ("evaluate", 3) if case in ("slopes", "traces") else ("estimate", 1)
    for score in cache.rglob("score-*.json"):
        score.unlink()
    folder = cut(config, *stage)
    resume(folder)
    assert outcome(folder) == whole
    for score in cache.rglob("score-*.json"):
        score.unlink()
    monkeypatch.setattr("impq_core.runs.session.plan_memory", lambda prepared: MemoryPlan(True, 1))
    assert outcome(run(config).folder) == whole


@pytest.mark.parametrize(("estimator", "value"), [("isolated", "kl"), ("aumann-shapley", "nll"), ("hawq", "kl"),
                                                  ("spqe", "nll"), ("guided-output", "nll"), ("token-fisher", "kl")])
@pytest.mark.parametrize("kind", ENDS)
def test_the_work_of_ends_is_forecast(kind: str, estimator: str, value: str, config: RunConfig,
                                      models: dict[str, Path]) -> None:
    config = replace(config, model=str(models[kind]), estimator=estimator, value=value, backend="hqq",
                     granularity="group", options={"estimator": {"permutations": 2}} if estimator == "spqe" else {})
    [search] = forecast_run(config).searches
    assert search.forwards["estimate"] == pytest.approx(run(config, only_estimate=True).forwards, rel=0.2)


@pytest.mark.parametrize("kind", ENDS)
def test_the_score_of_a_plan_is_that_of_the_model_with_its_weights(kind: str, config: RunConfig,
                                                                   models: dict[str, Path]) -> None:
    config = replace(config, model=str(models[kind]), granularity="group", estimator="random", options={})
    result = run(config)
    assert result.plan is not None and result.evaluation is not None
    prepared = prepare(config, Plugins())
    session = Session(prepared, Plugins())
    session.quantize_deployed()
    model: Any = AutoModelForCausalLM.from_pretrained(models[kind], dtype=torch.float32).eval()
    choices = zip(session.bank.layers, prepared.space.assignment(result.plan.pick), strict=True)
    with torch.no_grad():
        for layer, choice in choices:
            for linear in layer.linears:
                model.get_submodule(linear.name).weight.copy_(session.bank.variant(linear, choice))
        ids = torch.from_numpy(prepared.evaluation.ids)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(dim=1)
    np.testing.assert_allclose(result.evaluation.plan.window_nll, nll.numpy(), rtol=1e-5)


def test_a_map_of_widths_has_the_ends_at_its_ends(config: RunConfig) -> None:
    folder = run(replace(config, pins={"lm_head": "4", "*embed*": "2"}, estimator="random", options={})).folder
    names = list(read_contestant(folder).widths)
    assert names[0] == "model.embed_tokens" and names[-1] == "lm_head"


def test_ends_are_layers_if_a_pin_or_a_plan_names_them(config: RunConfig, tmp_path: Path) -> None:
    config = replace(config, quantize_embeddings=False)
    plain, all_in = lay_out(config, Plugins()), lay_out(replace(config, quantize_embeddings=True), Plugins())
    assert not plain.ends and [end.name for end in all_in.ends] == ENDS["llama"]
    pinned = lay_out(replace(config, pins={"*embed*": "4", "model.layers.0": "2"}), Plugins())
    assert [(pin.layer.name, str(pin.choice)) for pin in pinned.space.pinned] == [
        ("model.embed_tokens", "4"), ("model.layers.0", "2")]
    assert plain.rest_bytes - pinned.rest_bytes == 4 * 288 * 64
    everything = lay_out(replace(config, pins={"*layers.0": "4"}), Plugins())
    assert not everything.ends  # the pattern matches in the blocks
    plan = Plan(all_in.space, np.ones(len(all_in.space), dtype=np.int64), all_in.space.high_bytes)
    plan.save(tmp_path / "plan.json")
    given = lay_out(replace(config, plan=str(tmp_path / "plan.json")), Plugins())
    assert given.plan is not None and given.plan.nbytes == plan.nbytes and len(given.ends) == 2
    left_out = lay_out(replace(config, quantize_embeddings=True, exclude=("lm_head",)), Plugins())
    assert [pin.choice for pin in left_out.space.pinned] == [None]


def test_ends_that_a_backend_cannot_store_are_refused(config: RunConfig, tiny_llama: Path) -> None:
    with pytest.raises(UsageError, match=r"model\.embed_tokens.*--exclude"):
        lay_out(replace(config, model=str(tiny_llama)), Plugins())
    lay_out(replace(config, model=str(tiny_llama), exclude=tuple(ENDS["llama"])), Plugins())


def test_a_format_that_holds_no_quantized_embedding_is_refused_first(
        config: RunConfig, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "impq.toml").write_text(config.to_toml())
    with pytest.raises(SystemExit):
        main(["run", "--export", "gptq"])
    assert "format 'gptq'" in capsys.readouterr().err
    pinned = replace(config, quantize_embeddings=False, pins={"lm_head": "4"}, estimator="random", options={})
    for format in ("gptq", "recipe-auto-round"):
        with pytest.raises(ImpqError, match="lm_head"):
            check_formats(pinned, [format], Plugins())
    result = run(pinned)
    monkeypatch.setattr(Session, "quantize_plan", None)
    with pytest.raises(ImpqError, match="lm_head"):
        export_run(result.folder, "gptq")


@pytest.mark.parametrize("kind", ENDS)
def test_a_file_with_a_quantized_embedding_holds_the_measured_model_and_is_no_larger_than_its_budget(
        kind: str, config: RunConfig, models: dict[str, Path]) -> None:
    config = replace(config, model=str(models[kind]), backend="hqq", estimator="random", granularity="group",
                     whole=True, budget="100%", options={})
    with pytest.raises(UsageError) as refused:
        lay_out(config, plugins())
    low, high = (float(part) for part in refused.value.args[0].split("reach: ")[1].replace("%", "").split(",")[0].split(
        " to "))
    for share in (low + 0.01, (low + high) / 2):
        one = replace(config, budget=f"{share:.2f}%")
        layout = lay_out(one, plugins())
        assert layout.whole is not None
        budget = round(share * layout.whole.unquantized / 100)
        assert layout.whole.unquantized == sum(
            4 * parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(models[kind]).parameters())
        result = run(one, plugins())
        assert result.plan is not None
        stored = json.loads((result.folder / "plan.json").read_text())
        exported = export_run(result.folder, "plain", plugins=plugins())
        assert exported.file_bytes <= stored["file_bytes"] == result.plan.file_bytes <= budget + 1
        assert exported.file_bytes > 0.95 * stored["file_bytes"]
        again = evaluate_folder(exported.folder, plugins())
        assert again.score is not None and exported.score is not None
        assert again.score.nll == pytest.approx(exported.score.nll, rel=1e-6)
    with pytest.raises(ImpqError, match="bug of format 'greedy'"):
        export_run(result.folder, "greedy", plugins=plugins())
    assert not (result.folder / "greedy").exists()


def test_a_file_of_llama_cpp_takes_the_bytes_that_were_promised(config: RunConfig, models: dict[str, Path]) -> None:
    pytest.importorskip("xllamacpp")
    config = replace(config, model=str(models["gemma3"]), backend="gguf", estimator="random", granularity="group",
                     bits=("Q4_0", "Q5_0", "Q8_0"), whole=True, budget="90000B", options={})
    result = run(config)
    assert result.plan is not None and result.plan.widths()["model.embed_tokens"] is not None
    assert export_run(result.folder, "gguf").file_bytes == result.plan.file_bytes
    assert result.plan.file_bytes is not None and 88_000 < result.plan.file_bytes <= 90_000


@pytest.mark.parametrize(("backend", "options"), [("gptq", {}), ("gptq", {"symmetric": True}), ("hqq", {})])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_planted_budgets_of_a_file_are_met_by_every_format(backend: str, options: dict[str, Any], dtype: str,
                                                           tiny_config: RunConfig, tmp_path: Path) -> None:
    config = replace(tiny_config, backend=backend, estimator="random", granularity="linear", tracking_uri="none",
                     whole=True, budget="0.1MB", bits=("2", "3", "4"), dtype=dtype, options={"backend": options})
    with pytest.raises(UsageError) as refused:
        lay_out(config, Plugins())
    smallest = refused.value.args[0].split("reach: ")[1].split(" to ")[0]
    for budget, fits in ((f"{round(1e6 * float(smallest[:-2])) - 1}B", False), (smallest, True)):
        if not fits:
            with pytest.raises(UsageError, match="whole file"):
                lay_out(replace(config, budget=budget), Plugins())
            continue
        layout = lay_out(replace(config, budget=budget), Plugins())
        assert layout.whole is not None and layout.budget_bytes == layout.space.low_bytes
        most = layout.whole.account.fixed
        rng = np.random.default_rng(0)
        for _ in range(20):
            pick = rng.integers(0, 3, len(layout.space))
            plan = Plan(layout.space, pick, layout.space.bytes_of(pick))
            assert layout.whole.promise(plan) <= plan.nbytes + most


def test_other_plans_of_a_run_keep_to_the_file(tiny_config: RunConfig) -> None:
    config = replace(tiny_config, estimator="random", granularity="group", budget="30%", whole=True, options={},
                     tracking_uri="none")
    result = run(config)
    [planned] = allocate_run(result.folder, ["31%"])
    layout = lay_out(replace(config, budget="31%", plan=str(planned.file)), Plugins())
    assert layout.whole is not None and layout.plan is not None
    assert layout.plan.file_bytes is not None and planned.plan.file_bytes is not None
    assert layout.plan.file_bytes <= planned.plan.file_bytes <= 0.31 * layout.whole.unquantized
    with pytest.raises(UsageError, match="whole"):
        allocate_run(result.folder, ["3bits"])


@pytest.mark.parametrize("given", [["--whole"], ["--whole", "--budget", "3bits"], ["--whole", "--budget", "3.5bpw"],
                                   ["--whole", "--budget", "5MB"], ["--whole", "--budget", "120%"]])
def test_budgets_that_bound_no_file_are_refused(given: list[str], capsys: pytest.CaptureFixture[str],
                                                config: RunConfig, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "impq.toml").write_text(config.to_toml())
    with pytest.raises(SystemExit) as stopped:
        main(["run", "--dry-run", *given])
    message = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and message.startswith("impq: ") and "whole" in message


def test_both_accounts_are_shown(tiny_config: RunConfig, capsys: pytest.CaptureFixture[str], tmp_path: Path,
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "impq.toml").write_text(replace(tiny_config, budget="220000B", whole=True).to_toml())
    main(["run", "--dry-run", "--json"])
    [search] = json.loads(capsys.readouterr().out)["result"]["searches"]
    [size] = search["budgets"]
    assert size["file_bytes"] == 220_000 and size["bytes"] < 220_000
    assert search["smallest"]["file_bytes"] - search["smallest"]["bytes"] == 220_000 - size["bytes"]
