"""Plans quantized in sequence: the drift of the quantized prefix, stages inside a block, and tables of such models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from impq_gptq.backend import Gptq, Options
from impq_gptq.solver import Job, Settings, sweep
from torch import nn

from impq_core.config import RunConfig
from impq_core.errors import UsageError
from impq_core.evaluate import ScoreLog
from impq_core.exports.export import export_run
from impq_core.interfaces import Statistics, Variant
from impq_core.model.bank import Bank
from impq_core.model.blockwise import Batch, BlockwiseModel
from impq_core.model.cost import ForwardCost
from impq_core.model.layers import layers_of, search_space
from impq_core.model.quantize import quantize_in_sequence
from impq_core.model.source import locate_model
from impq_core.plugins import Plugins
from impq_core.runs.pipeline import resume, run
from impq_core.runs.prepare import prepare
from impq_core.runs.session import Session
from impq_core.runs.work import in_sequence, references, sequence_forwards, work_forwards, work_of
from impq_core.space import Choice, LinearSpec
from impq_core.testing import tiny_model
from impq_core.types import Plan

IDS = np.random.default_rng(0).integers(0, 256, (3, 24))
FINE = Settings(32, symmetric=False, group_aware=True, grid="hessian", damping=0.05)


class Recording(Gptq):
    """GPTQ that keeps the statistics it is given, by linear."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.seen: dict[str, Statistics] = {}

    def quantize_together(self, weights: Mapping[LinearSpec, torch.Tensor],
                          wanted: Sequence[tuple[LinearSpec, Choice]],
                          statistics: Statistics | None) -> Iterator[tuple[LinearSpec, Variant]]:
        assert statistics is not None
        self.seen |= {linear.name: statistics for linear, _ in wanted}
        return super().quantize_together(weights, wanted, statistics)


@pytest.fixture
def model(tmp_path: Path) -> nn.Module:
    return locate_model(str(tiny_model(tmp_path / "model"))).load(torch.float32)


def _inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """The input (tokens, columns) of every linear, by a plain forward."""
    found: dict[str, torch.Tensor] = {}
    hooks = [module.register_forward_pre_hook(
        lambda _module, args, name=name: found.update({name: args[0].reshape(-1, args[0].shape[-1])}))
        for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    with torch.no_grad():
        model(input_ids=torch.from_numpy(IDS))
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("stages", [False, True])
def test_statistics_are_those_behind_the_quantized_linears(model: nn.Module, stages: bool) -> None:
    backend = Recording(Options(group_size=32, true_sequential=stages))
    exact = _inputs(model)
    runner = BlockwiseModel(model)
    space = search_space(layers_of(model, "linear"), backend, backend.choices()[2:])
    bank = Bank(runner, space.everyone, backend)
    quantize_in_sequence(bank, runner, IDS, [Choice(2.0, 32)] * len(bank.layers), lambda done, total: None)
    weights = {linear.name: bank.variant(linear, Choice(2.0, 32)) for layer in bank.layers for linear in layer.linears}
    bank.apply([None] * len(bank.layers))
    order = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    modules, compared = dict(model.named_modules()), set[str]()
    for block in range(3):
        for stage in (order[:3], order[3:4], order[4:6], order[6:]) if stages else (order,):
            behind = _inputs(model)
            for name, statistics in backend.seen.items():
                if f"layers.{block}." in name and name.rpartition(".")[2] in stage:
                    x = behind[name]
                    assert torch.allclose(statistics.gram, x.T @ x, atol=1e-3)
                    assert statistics.drift is not None
                    assert torch.allclose(statistics.drift, (exact[name] - x).T @ x, atol=1e-3)
                    first = block == 0 and stage[0] == "q_proj" and (stages or name.endswith(("q_proj", "v_proj")))
                    assert not first or not statistics.drift.any()
                    compared.add(name)
            for name, weight in weights.items():
                if f"layers.{block}." in name and name.rpartition(".")[2] in stage:
                    modules[name].weight.data = weight  # type: ignore[union-attr,assignment]
    assert compared == set(weights)


def test_an_unquantized_prefix_has_no_drift(model: nn.Module) -> None:
    backend, runner = Recording(Options(group_size=32, true_sequential=False)), BlockwiseModel(model)
    space = search_space(layers_of(model, "block"), backend, backend.choices()[2:])
    bank = Bank(runner, space.everyone, backend)
    quantize_in_sequence(bank, runner, IDS, [None, None, Choice(2.0, 32)], lambda done, total: None)
    assert len(backend.seen) == 7
    assert all(s.drift is not None and not s.drift.any() for s in backend.seen.values())


def test_without_drift_there_is_no_second_model(model: nn.Module) -> None:
    backend, runner = Recording(Options(group_size=32, drift="none")), BlockwiseModel(model)
    space = search_space(layers_of(model, "block"), backend, backend.choices()[2:])
    bank = Bank(runner, space.everyone, backend)
    quantize_in_sequence(bank, runner, IDS, [Choice(2.0, 32)] * 3, lambda done, total: None)
    assert all(s.drift is None for s in backend.seen.values())


def _drifted(tokens: int = 3000) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight (64, 160), inputs, and inputs of the unquantized model, of which the drift is partly predictable."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(160, 160, generator=generator) / 12
    exact = torch.randn(tokens, 160, generator=generator) @ mix * torch.logspace(0, -1, 160)
    inputs = exact + 0.3 * exact @ torch.randn(160, 160, generator=generator) / 12
    return torch.randn(64, 160, generator=generator) * 0.05, inputs, exact


def _plain_gptaq(weight: torch.Tensor, gram: torch.Tensor, drift: torch.Tensor, tokens: int, scales: torch.Tensor,
                 zeros: torch.Tensor, top: int, strength: float) -> torch.Tensor:
    """GPTAQ column by column in the order of the weight, in float64, with grids (groups of 32, rows) that are given."""
    hessian, asymmetric = gram.double() * 2 / tokens, drift.double() * 2 / tokens
    hessian.diagonal().add_(0.05 * hessian.diagonal().mean())
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    pull = strength * (asymmetric @ upper.T).triu(1) @ upper
    weight, quantized = weight.double().clone(), torch.empty_like(weight, dtype=torch.float64)
    for j in range(weight.shape[1]):
        scale, zero, column = scales[j // 32].double(), zeros[j // 32].double(), weight[:, j].clone()
        quantized[:, j] = scale * ((column / scale).round().clamp(-zero, top - zero))
        weight[:, j + 1:] -= torch.outer((column - quantized[:, j]) / upper[j, j], upper[j, j + 1:])
        weight[:, j + 1:] += torch.outer(column, pull[j, j + 1:])
    return quantized


def test_gptaq_is_the_papers_recursion() -> None:
    weight, inputs, exact = _drifted()
    gram, drift = inputs.T @ inputs, (exact - inputs).T @ inputs
    settings = replace(FINE, group_aware=False, grid="min-max", correction="gptaq", strength=0.25)
    found = sweep([Job(weight, 8)], gram, len(inputs), settings, drift)[0]
    index = torch.arange(160) // 32
    ours = ((found.codes.float() - found.zeros[index]) * found.scales[index]).T
    reference = _plain_gptaq(weight, gram, drift, len(inputs), found.scales, found.zeros, 255, 0.25)
    assert float((ours - reference).abs().max()) < 1.1 * float(found.scales.max())  # ties of roundings
    assert float((ours - reference).abs().mean()) < 0.02 * float(found.scales.mean())
    plain = sweep([Job(weight, 8)], gram, len(inputs), replace(settings, correction="none"), drift)[0]
    uncorrected = ((plain.codes.float() - plain.zeros[index]) * plain.scales[index]).T
    assert float((ours - uncorrected).abs().mean()) > 0.5 * float(found.scales.mean())


def test_qep_moves_the_weight_by_its_closed_form() -> None:
    weight, inputs, exact = _drifted()
    gram, drift = inputs.T @ inputs, (exact - inputs).T @ inputs
    settings = replace(FINE, correction="qep", strength=0.5)
    found = sweep([Job(weight, 3)], gram, len(inputs), settings, drift)[0]
    ridged = gram.double() + gram.diagonal().double().mean() * torch.eye(160, dtype=torch.float64)
    moved = weight.double() + 0.5 * weight.double() @ drift.double() @ torch.linalg.inv(ridged)
    expected = sweep([Job(moved.float(), 3)], gram, len(inputs), FINE)[0]
    assert (found.codes != expected.codes).float().mean() < 2e-3


@pytest.mark.parametrize("correction", ["gptaq", "qep"])
def test_a_correction_brings_the_outputs_nearer_to_the_unquantized_models(correction: str) -> None:
    weight, inputs, exact = _drifted()
    gram, drift = inputs.T @ inputs, (exact - inputs).T @ inputs
    errors = []
    for settings in (FINE, replace(FINE, correction=correction, strength=0.5)):
        found = sweep([Job(weight, 4)], gram, len(inputs), settings, drift)[0]
        index = torch.arange(160) // 32
        quantized = ((found.codes.float() - found.zeros[index]) * found.scales[index]).T
        errors.append(float((exact @ weight.T - inputs @ quantized.T).square().mean()))
    assert errors[1] < 0.9 * errors[0]


def test_the_same_bits_whatever_else_is_in_the_sweep_of_drifted_linears() -> None:
    weight, inputs, exact = _drifted()
    gram, drift = inputs.T @ inputs, (exact - inputs).T @ inputs
    for correction in ("gptaq", "qep"):
        settings = replace(FINE, correction=correction, strength=0.25)
        alone = sweep([Job(weight, 3)], gram, len(inputs), settings, drift)[0]
        beside = sweep([Job(weight[:32], 2), Job(weight, 3)], gram, len(inputs), settings, drift)[1]
        assert torch.equal(alone.codes, beside.codes) and torch.equal(alone.scales, beside.scales)


def test_token_weights_change_the_gram_as_their_definition_says(model: nn.Module) -> None:
    backend = Recording(Options(group_size=32, drift="none", hessian="guided", row_groups=2))
    inputs, runner = _inputs(model), BlockwiseModel(model)
    modules = {name: module for name, module in model.named_modules() if "layers.1." in name
               and isinstance(module, nn.Linear)}
    gradients: dict[str, torch.Tensor] = {}
    ids = torch.from_numpy(IDS)
    for parameter in model.parameters():
        parameter.requires_grad_(True)  # so that outputs have gradients
    hooks = [module.register_full_backward_hook(
        lambda _module, _inputs, outputs, name=name: gradients.update({name: outputs[0].flatten(0, 1)}))
        for name, module in modules.items()]
    model(input_ids=ids, labels=ids).loss.mul(ids[:, 1:].numel()).backward()
    for hook in hooks:
        hook.remove()
    model.requires_grad_(False)
    space = search_space(layers_of(model, "block"), backend, backend.choices()[2:])
    bank = Bank(runner, space.everyone, backend)
    quantize_in_sequence(bank, runner, IDS, [None, Choice(2.0, 32), None], lambda done, total: None)
    name = "model.layers.1.self_attn.q_proj"
    found = backend.seen[name].guided
    assert found is not None and found.shape[0] == 2
    for group, gradient in enumerate(gradients[name].tensor_split(2, dim=1)):
        weight = gradient.square().mean(dim=1)
        expected = (inputs[name] * (weight / weight.mean())[:, None]).T @ inputs[name]
        cosine = torch.cosine_similarity(found[group].flatten(), expected.flatten(), dim=0)
        assert cosine > 0.999  # the largest weight is cut off
    assert backend.seen[name] is not backend.seen["model.layers.1.self_attn.k_proj"]


def test_weights_of_tokens_change_the_choice_of_codes() -> None:
    weight, inputs, _ = _drifted()
    loud = inputs.clone()
    loud[:1500] *= 3  # the same as a weight of 9 for half of the tokens
    weights = torch.ones(len(inputs)).index_fill(0, torch.arange(1500), 9.0)
    guided = (inputs * weights[:, None]).T @ inputs
    spec, options = LinearSpec("a", 64, 160), Options(group_size=32, drift="none", hessian="guided")
    plain = Statistics(inputs.T @ inputs, len(inputs))
    choice = Choice(3.0, 32)
    ours = Gptq(options).quantize(weight, choice, replace(plain, guided=guided[None]))
    expected = Gptq(Options(group_size=32)).quantize(weight, choice, Statistics(loud.T @ loud, len(inputs)))
    other = Gptq(Options(group_size=32)).quantize(weight, choice, plain)
    unpacked = [Gptq(options).dequantize(variant, spec) for variant in (ours, expected, other)]
    assert float((unpacked[0] - unpacked[1]).abs().mean()) < 0.05 * float((unpacked[0] - unpacked[2]).abs().mean())


@pytest.fixture
def config(tiny_config: RunConfig) -> RunConfig:
    return replace(tiny_config, estimator="random", allocator="greedy", sequential="yes", bits=("2", "4"),
                   budget="3bits", options={"backend": {"group_size": 32}})


def test_a_table_in_sequence_is_that_of_the_exports(config: RunConfig) -> None:
    result = run(config)
    assert result.evaluation is not None and result.evaluation.sequential
    exported = export_run(result.folder, "gptq")
    assert exported.score is not None
    assert exported.score.window_nll.tolist() == result.evaluation.plan.window_nll.tolist()
    other = run(replace(config, sequential="no")).evaluation
    assert other is not None and not other.sequential
    assert other.row("unquantized").window_nll.tolist() == (
        result.evaluation.row("unquantized").window_nll.tolist())
    assert other.row("uniform 2").window_nll.tolist() != result.evaluation.row("uniform 2").window_nll.tolist()
    uniform = run(replace(config, budget="2bits"))
    assert uniform.evaluation is not None
    assert uniform.evaluation.plan.window_nll.tolist() == (
        result.evaluation.row("uniform 2").window_nll.tolist())


def test_a_run_in_sequence_resumes_bit_for_bit(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(config, cache=False)
    whole = run(config).evaluation
    add, left = ScoreLog.add, [2]

    def interrupted(log: ScoreLog, widths: str, score: object) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        add(log, widths, score)  # type: ignore[arg-type]

    monkeypatch.setattr(ScoreLog, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(replace(config, output=f"{config.output}2"))
    monkeypatch.setattr(ScoreLog, "add", add)
    [folder] = Path(f"{config.output}2").iterdir()
    again = resume(folder).evaluation
    assert whole is not None and again is not None
    assert [row.window_nll.tolist() for row in again.rows] == [row.window_nll.tolist() for row in whole.rows]


def test_a_backend_without_activations_has_no_sequence(config: RunConfig) -> None:
    evaluation = run(replace(config, backend="quanto", options={})).evaluation
    assert evaluation is not None and not evaluation.sequential


def test_the_value_of_sequential_is_checked() -> None:
    with pytest.raises(UsageError, match="sequential"):
        RunConfig(sequential="often")


def test_a_sequence_costs_what_is_forecast(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that run over windows; the last block is not run once more, and stages are found on one batch."""
    for stages, most in ((False, 1.0), (True, 1.2)):
        options = {"group_size": 32, "true_sequential": stages}
        prepared = prepare(replace(config, options={"backend": options}), Plugins())
        session = Session(prepared, Plugins())
        runner = session.runner
        assert prepared.calibration is not None
        cost, run_batch, done = runner.cost(prepared.calibration.ids), BlockwiseModel.run_batch, [0]

        def counted(self: BlockwiseModel, index: int, batch: Batch, done: list[int] = done, cost: ForwardCost = cost,
                    run_batch: Callable[[BlockwiseModel, int, Batch], Batch] = run_batch) -> Batch:
            done[0] += len(batch.ids) * cost.blocks[index]
            return run_batch(self, index, batch)

        with monkeypatch.context() as patch:
            patch.setattr(BlockwiseModel, "run_batch", counted)
            session.quantize_plan(Plan(prepared.space, prepared.space.uniform(1), prepared.budget_bytes))
        forecast = sequence_forwards(prepared) * prepared.config.game_windows * cost.total
        assert 0.8 * forecast < done[0] <= most * forecast


def test_a_run_is_in_sequence_by_itself_if_that_costs_no_more_than_the_search(config: RunConfig) -> None:
    cheap = replace(config, sequential="auto")
    dear = replace(cheap, estimator="spqe", options={**config.options, "estimator": {"permutations": 400}})
    assert not in_sequence(prepare(cheap, Plugins()))
    prepared = prepare(dear, Plugins())
    assert in_sequence(prepared)
    work = work_of(prepared)
    assert work is not None
    search = work_forwards(work, prepared.shapes, prepared.config, prepared.game_space)
    assert (1 + references(prepared)) * sequence_forwards(prepared) <= search
    assert not in_sequence(prepare(replace(dear, sequential="no"), Plugins()))
