"""The GPTQ backend on single linears; gptqmodel's solver, packing and unpacking are the reference."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from impq_gptq import grid, solver
from impq_gptq.backend import TENSORS, Gptq, Options
from impq_gptq.packing import pack, unpack
from impq_gptq.solver import Job, NotPositiveDefinite, Settings, Solution, sweep
from torch.utils._python_dispatch import TorchDispatchMode

from impq_core.errors import ImpqError
from impq_core.interfaces import Statistics, Variant
from impq_core.space import Choice, LinearSpec

torch.manual_seed(0)
WEIGHT = torch.randn(96, 128) * 0.05
INPUTS = torch.randn(2000, 128) @ torch.randn(128, 128) * 0.2
STATISTICS = Statistics(INPUTS.T @ INPUTS, len(INPUTS))
SPEC = LinearSpec("block.linear", 96, 128)


def _data(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the gram of 2,000 inputs whose columns have different sizes; two of them are always zero."""
    generator = torch.Generator().manual_seed(rows + columns)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(2000, columns, generator=generator) @ mix * torch.logspace(0, -1, columns)
    inputs[:, [3, columns - 7]] = 0
    return weight, inputs.T @ inputs


def _settings(**options: Any) -> Settings:
    given = {"group_size": 64, "symmetric": False, "group_aware": True, "grid": "weight-error", "damping": 0.05}
    return Settings(**{**given, **options})


def _gptqmodel(weight: torch.Tensor, bits: int, gram: torch.Tensor, tokens: int, settings: Settings) -> Solution:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        from gptqmodel.quantization.config import QuantizeConfig
        from gptqmodel.quantization.gptq import GPTQ
    config = QuantizeConfig(
        bits=bits, group_size=settings.group_size, sym=settings.symmetric, desc_act=False,
        act_group_aware=settings.group_aware, mse=2.0 if settings.grid == "weight-error" else 0.0,
        damp_percent=settings.damping, device="cpu", offload_to_disk=False)
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    task = GPTQ(linear, qcfg=config)
    task.quantizer.configure(perchannel=True)
    task.H, task.nsamples = gram * (2 / tokens), tokens
    quantized, scales, zeros, index, _, loss, damping, _ = task.quantize()
    codes = (quantized / scales[:, index.long()]).round() + zeros[:, index.long()]
    return Solution(codes.T, scales.T, zeros.T, loss, damping)


def _linear(choice: Choice, shape: tuple[int, int]) -> Any:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    return TorchLinear(bits=int(choice.bits), group_size=choice.group_size, sym=False, desc_act=False,
                       in_features=shape[1], out_features=shape[0], bias=False).eval()


def _weight(solution: Solution, size: int) -> torch.Tensor:
    groups = torch.arange(len(solution.codes)) // size
    return ((solution.codes.float() - solution.zeros[groups]) * solution.scales[groups]).T


@pytest.mark.parametrize("options", [
    {}, {"symmetric": True}, {"grid": "min-max"}, {"group_aware": False, "group_size": 32}, {"damping": 0.3},
    {"group_size": 16, "grid": "min-max", "symmetric": True}], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_and_grids_are_those_of_gptqmodel(bits: int, options: dict[str, Any]) -> None:
    weight, gram = _data(64, 320)
    settings = _settings(**options)
    ours, theirs = sweep([Job(weight, bits)], gram, 2000, settings)[0], _gptqmodel(weight, bits, gram, 2000, settings)
    assert (ours.codes != theirs.codes).float().mean() < 2e-3  # of which a tie in an early column causes many
    assert (ours.zeros != theirs.zeros).float().mean() < 2e-3
    assert ((ours.scales / theirs.scales - 1).abs() > 1e-4).float().mean() < 5e-3
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-3) and ours.damping == theirs.damping
    changes = [_weight(solution, settings.group_size) - weight for solution in (ours, theirs)]
    losses = [float(((change @ gram) * change).sum()) for change in changes]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("size", [256, 512])
def test_groups_longer_than_a_block_are_those_of_gptqmodel(size: int) -> None:
    weight, gram = _data(32, 512)
    settings = _settings(group_size=size)
    ours, theirs = sweep([Job(weight, 3)], gram, 2000, settings)[0], _gptqmodel(weight, 3, gram, 2000, settings)
    assert (ours.codes != theirs.codes).float().mean() < 2e-3 and torch.allclose(ours.scales, theirs.scales, rtol=1e-4)


@pytest.mark.parametrize("size", [16, 64, 1024])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packing_and_unpacking_are_those_of_gptqmodel(bits: int, size: int) -> None:
    rows, columns, choice = 96, 1024, Choice(float(bits), size)
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator)
    zeros = torch.randint(0, 2**bits, (rows, columns // size), generator=generator)
    scales = torch.rand(rows, columns // size, generator=generator) + 0.5
    index = torch.arange(columns, dtype=torch.int32) // size
    linear = torch.nn.Linear(columns, rows, bias=False)
    linear.weight.data = (codes - zeros[:, index.long()]) * scales[:, index.long()]
    reference = _linear(choice, (rows, columns))
    reference.pack_original(linear, scales, zeros.float(), index)
    stored = {name: getattr(reference, name) for name in TENSORS}
    assert torch.equal(pack(codes.to(torch.uint8), bits).T, stored["qweight"])
    assert torch.equal(pack(zeros.T.to(torch.uint8), bits), stored["qzeros"])
    assert torch.equal(unpack(stored["qweight"].T.contiguous(), bits), codes)
    restored = Gptq(Options(group_size=size)).dequantize(Variant(choice, stored), LinearSpec("a", rows, columns))
    assert torch.equal(restored, reference.dequantize_weight().T.float())


def test_a_variant_of_gptqmodel_comes_back_as_gptqmodel_computes_it() -> None:
    for choice in Gptq().choices():
        variant, reference = Gptq().quantize(WEIGHT, choice, STATISTICS), _linear(choice, (96, 128))
        for name, tensor in variant.tensors.items():
            setattr(reference, name, tensor)
        assert torch.equal(Gptq().dequantize(variant, SPEC), reference.dequantize_weight().T.float())


def test_a_stored_order_of_columns_is_refused() -> None:
    variant = Gptq().quantize(WEIGHT, Gptq().choices()[1], STATISTICS)
    shuffled = replace(variant, tensors={**variant.tensors, "g_idx": variant.tensors["g_idx"].flip(0)})
    with pytest.raises(ImpqError, match=r"block\.linear"):
        Gptq().dequantize(shuffled, SPEC)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("chunk", [2**13, solver.CPU_CHUNK])
def test_bits_do_not_depend_on_what_else_is_in_the_sweep(chunk: int, symmetric: bool,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    settings = _settings(symmetric=symmetric)
    _, gram = _data(32, 320)
    jobs = [Job(_data(rows, 320)[0], bits) for rows in (32, 160, 96, 288) for bits in (4, 2, 3)]
    alone = [sweep([job], gram, 2000, settings)[0] for job in jobs]
    monkeypatch.setattr(solver, "CPU_CHUNK", chunk)
    for chosen in (range(len(jobs)), reversed(range(len(jobs))), (7, 0, 4)):
        numbers = list(chosen)
        for number, found in zip(numbers, sweep([jobs[i] for i in numbers], gram, 2000, settings), strict=True):
            expected = alone[number]
            assert torch.equal(found.codes, expected.codes) and found.loss == expected.loss
            assert torch.equal(found.scales, expected.scales) and torch.equal(found.zeros, expected.zeros)


def test_nothing_waits_for_the_device_inside_the_loop_over_columns() -> None:
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return function(*args, **(kwargs or {}))

    counts = []
    for columns in (128, 640):
        weight, gram = _data(32, columns)
        with Reads() as reads:
            sweep([Job(weight, 2), Job(weight, 3)], gram, 2000, _settings())
        counts.append(reads.count)
    assert counts[0] == counts[1] and counts[0] > 0


def test_gptq_beats_rounding_where_inputs_are_correlated() -> None:
    backend = Gptq(Options(grid="min-max"))
    errors = []
    for statistics in (STATISTICS, Statistics(torch.eye(128), 1)):
        weight = backend.dequantize(backend.quantize(WEIGHT, backend.choices()[2], statistics), SPEC)
        errors.append(float(((weight - WEIGHT) @ INPUTS.T).norm()))
    assert errors[0] < 0.8 * errors[1]


def test_a_linear_that_no_token_reached_is_rounded_to_nearest() -> None:
    nowhere = Statistics(torch.zeros(128, 128), 0)
    variant = Gptq(Options(grid="min-max")).quantize(WEIGHT, Choice(3.0, 64), nowhere)
    assert variant.record["unreached"] == 1
    assert "unreached" not in Gptq().quantize(WEIGHT, Choice(3.0, 64), STATISTICS).record
    groups = WEIGHT.view(96, 2, 64)
    low, high = groups.amin(2, keepdim=True).clamp(max=0), groups.amax(2, keepdim=True).clamp(min=0)
    scale = (high - low) / 7
    zero = (-low / scale).round()
    nearest = ((groups / scale).round() + zero).clamp(0, 7) - zero
    codes = unpack(variant.tensors["qweight"].T.contiguous(), 3).view(96, 2, 64)
    assert torch.equal(codes - zero, nearest)


def test_a_column_that_no_input_reaches_is_zero() -> None:
    gram = STATISTICS.gram.clone()
    gram[5], gram[:, 5] = 0, 0
    restored = Gptq().dequantize(Gptq().quantize(WEIGHT, Choice(4.0, 64), Statistics(gram, 2000)), SPEC)
    assert not restored[:, 5].any() and restored[:, 6].any()


def test_damping_is_raised_as_gptqmodel_raises_it_until_the_hessian_can_be_factored() -> None:
    few = INPUTS[:4]
    variant = Gptq().quantize(WEIGHT, Gptq().choices()[1], Statistics(few.T @ few, 4))
    assert variant.record["damping"] == 0.05
    spectrum = torch.linspace(0.1, 4, 128)
    spectrum[0] = -0.471  # of a mean of 2.05
    basis = torch.linalg.qr(torch.randn(128, 128, generator=torch.Generator().manual_seed(1))).Q
    gram = basis @ torch.diag(spectrum) @ basis.T
    gram = (gram + gram.T) / 2
    ours, theirs = sweep([Job(WEIGHT, 4)], gram, 7, _settings())[0], _gptqmodel(WEIGHT, 4, gram, 7, _settings())
    assert ours.damping == pytest.approx(theirs.damping) and ours.damping == pytest.approx(0.24)
    with pytest.raises(NotPositiveDefinite):
        sweep([Job(WEIGHT, 4)], gram - 4 * torch.eye(128), 7, _settings())


def test_errors_name_the_linear() -> None:
    wanted = [(SPEC, Choice(4.0, 64))]
    negative, broken = Statistics(-STATISTICS.gram, 5), Statistics(STATISTICS.gram * torch.nan, 5)
    for statistics in (None, negative, broken):
        with pytest.raises(ImpqError, match=r"^block\.linear: "):
            list(Gptq().quantize_together({SPEC: WEIGHT}, wanted, statistics))


def test_awkward_shapes_are_refused_by_name() -> None:
    choice = Gptq().choices()[0]
    with pytest.raises(ImpqError, match=r"group size 64 does not divide the 96 inputs of a\.b; -o group_size=32 does"):
        Gptq().check(LinearSpec("a.b", 64, 96), choice)
    with pytest.raises(ImpqError, match=r"a\.b is 33 x 128"):
        Gptq().check(LinearSpec("a.b", 33, 128), choice)
    with pytest.raises(ValueError, match="group_size"):
        Options(group_size=17)


def _objective(weight: torch.Tensor, importance: torch.Tensor, grid: torch.Tensor, top: float) -> torch.Tensor:
    """The sum of importance times squared error (groups, rows) of weights (groups, size, rows) on a grid."""
    scales, zeros = grid[0][:, None], grid[1][:, None]
    codes = torch.minimum(torch.maximum((weight / scales).round(), -zeros), top - zeros)
    return ((codes * scales - weight).square() * importance).sum(1)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_planted_grid_is_found(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    top = 2**bits - 1
    zeros = torch.randint(0, top + 1, (4, 1, 24), generator=generator).float()
    scales = torch.rand(4, 1, 24, generator=generator) * 0.1 + 0.01
    codes = torch.randint(0, top + 1, (4, 64, 24), generator=generator).float()
    codes[:, :2] = torch.tensor([0.0, top])[None, :, None]
    weights = (codes - zeros) * scales
    importance = torch.rand(4, 64, 1, generator=generator) + 0.1
    found = grid.hessian_error(weights, importance, torch.full((24,), float(top)), symmetric=False)
    assert torch.allclose(found[0], scales[:, 0], rtol=1e-4) and torch.equal(found[1], zeros[:, 0])


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_grid_is_near_the_best_of_all(bits: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    weights = torch.randn(2, 32, 16, generator=generator)
    weights[:, 0] *= 4
    importance = torch.rand(2, 32, 1, generator=generator).pow(4) + 1e-3
    top, tops = float(2**bits - 1), torch.full((16,), 2.0**bits - 1)
    span = (weights.amax(1).clamp(min=0) - weights.amin(1).clamp(max=0)) / top
    best = torch.full((2, 16), torch.inf)
    for share in torch.linspace(0.1, 2.5, 200):
        for zero in (range(2**bits) if not symmetric else [2 ** (bits - 1)]):
            candidate = torch.stack([share * span, torch.full_like(span, float(zero))])
            best = torch.minimum(best, _objective(weights, importance, candidate, top))
    found = _objective(weights, importance, grid.hessian_error(weights, importance, tops, symmetric), top)
    plain = _objective(weights, importance, grid.weight_error(weights, tops, symmetric, bits == 2), top)
    assert float((found / best).mean()) < (1.1 if bits < 4 else 1.15)
    assert float(found.sum()) < float(plain.sum())
