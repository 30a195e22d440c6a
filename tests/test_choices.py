"""Choices by name, menus in the order of bytes, and stand-ins for shapes that a choice does not exist for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from impq_gptq.backend import Gptq
from impq_gptq.backend import Options as GptqOptions
from impq_hqq.backend import Hqq
from impq_hqq.backend import Options as HqqOptions

from impq_core.config import RunConfig
from impq_core.errors import ImpqError, UsageError
from impq_core.exports.export import evaluate_folder, export_run
from impq_core.interfaces import Backend, Statistics, Variant
from impq_core.model.bank import Bank
from impq_core.model.blockwise import BlockwiseModel
from impq_core.model.layers import by_size, further_choices, layers_of, search_space
from impq_core.model.quantize import fill_bank
from impq_core.parts import Parts
from impq_core.plugins import Plugins
from impq_core.results import RunResult
from impq_core.runs.pipeline import run
from impq_core.space import Choice, LayerSpec, LinearSpec, SearchSpace, in_bits
from impq_core.terminal import plan_lines
from impq_core.testing.tiny import _random_model
from impq_core.types import Plan

SPEC = LinearSpec("blocks.0.linear", 64, 128)


class Formats(Backend):
    """Named forms: ``WIDE``, 8 bits, for any row; ``THIN``, 2 bits, for rows of 128 only, in place of which ``PLAIN``,
    4 bits, is stored. Each call of ``quantize`` is noted."""

    default_bits = ("WIDE", "THIN")
    forms = (Choice(8.0, 0, "WIDE"), Choice(4.0, 0, "PLAIN"), Choice(2.0, 128, "THIN"))

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[tuple[int, ...], str]] = []

    def choices(self) -> tuple[Choice, ...]:
        return self.forms

    def stand_in(self, linear: LinearSpec, choice: Choice) -> Choice:
        return self.forms[1] if choice.name == "THIN" and linear.columns % 128 else choice

    def check(self, linear: LinearSpec, choice: Choice) -> None:
        if choice.name == "THIN" and linear.columns % 128:
            raise ImpqError(f"{linear.name} has rows of {linear.columns}")

    def nbytes(self, linear: LinearSpec, choice: Choice) -> int:
        return linear.parameters * int(choice.bits) // 8

    def quantize(self, weight: torch.Tensor, choice: Choice, statistics: Statistics | None) -> Variant:
        self.made.append((tuple(weight.shape), choice.name))
        return Variant(choice, {"codes": torch.full((weight.numel() * int(choice.bits) // 8,), int(choice.bits),
                                                    dtype=torch.uint8)})

    def dequantize(self, variant: Variant, linear: LinearSpec) -> torch.Tensor:
        return torch.full((linear.rows, linear.columns), float(variant.choice.bits))


def _formats(granularity: str = "linear") -> tuple[Bank, SearchSpace, Formats]:
    """A tiny model whose down_proj alone has rows of 128."""
    model, backend = _random_model("llama", 2, 0).eval().requires_grad_(False), Formats()
    layers = layers_of(model, granularity)
    choices = by_size(layers, backend, (backend.forms[2], backend.forms[0]), ())
    space = search_space(layers, backend, choices)
    runner = BlockwiseModel(model)
    bank = Bank(runner, space.everyone, backend)
    menus = [[*choices, backend.forms[1]]] * len(space)
    fill_bank(bank, runner, None, menus, lambda done, total: None)
    return bank, space, backend


def test_what_is_stored_decides_bytes_bits_and_weights() -> None:
    bank, space, _ = _formats()
    assert [choice.name for choice in space.choices] == ["WIDE", "THIN"]
    for layer, (wide, thin), bits in zip(space.layers, space.nbytes, space.bits, strict=True):
        long = layer.name.endswith("down_proj")
        assert (wide, thin) == (layer.parameters, layer.parameters // (4 if long else 2))
        assert bits.tolist() == [8.0, 2.0 if long else 4.0]
    thin = space.bytes_of(space.uniform(1))
    assert space.nominal_bits(thin) == pytest.approx(space.bits_per_weight(thin))  # bits of the forms are their bytes
    for layer in space.layers:
        [linear] = layer.linears
        expected = 2.0 if layer.name.endswith("down_proj") else 4.0
        assert bank.variant(linear, space.choices[1]).unique().tolist() == [expected]
        assert bank.stored(linear, space.choices[1]).choice.bits == expected


def test_a_stand_in_is_made_once_and_is_the_choice_itself() -> None:
    bank, space, backend = _formats()
    thin, plain = backend.forms[2], backend.forms[1]
    short = [layer for layer in space.layers if not layer.name.endswith("down_proj")]
    assert len(backend.made) == 2 * len(short) + 3 * (len(space) - len(short))
    assert all(bank.stored(layer.linears[0], thin) is bank.stored(layer.linears[0], plain) for layer in short)


def test_scores_without_measurements_count_what_is_stored() -> None:
    _, space, _ = _formats()
    [same] = search_space(space.layers[:1], Formats(), (Formats.forms[1], Formats.forms[2])).rounding_errors
    assert same.tolist() == [0.0, 0.0]  # both are stored as PLAIN
    assert (space.rounding_errors[:, 0] == 0).all() and (space.rounding_errors[:, 1] == 1).all()


def test_more_scales_count_as_wider() -> None:
    layer = LayerSpec("blocks.0", 0, (SPEC,))
    gptq = Gptq()
    choices = tuple(choice for name in ("2", "4", "2@32", "3@128", "3") if (choice := gptq.choice(name)))
    menu = by_size([layer], gptq, choices, ())
    assert [choice.name for choice in menu] == ["4", "3", "3@128", "2@32", "2"]
    errors = search_space((layer,), gptq, menu).rounding_errors[0]
    assert errors[0] == 0 and errors[-1] == 1 and (np.diff(errors) > 0).all()


def test_choices_that_are_stored_alike_everywhere_are_one() -> None:
    _, space, backend = _formats()
    short = [layer for layer in space.layers if not layer.name.endswith("down_proj")]
    menu = (backend.forms[2], backend.forms[0], backend.forms[1])
    assert [choice.name for choice in by_size(short, backend, menu, ())] == ["WIDE", "PLAIN"]
    assert [choice.name for choice in by_size(space.layers, backend, menu, ())] == ["WIDE", "PLAIN", "THIN"]
    wide, plain, thin = backend.forms
    assert further_choices(short, backend, [wide], [wide, plain, thin], ()) == [plain]
    assert further_choices(short, backend, [wide, thin], [plain], ()) == []
    assert further_choices(space.layers, backend, [wide], [plain, thin], ()) == [plain, thin]


@pytest.mark.parametrize(("backend", "columns", "stored"), [
    (Gptq, 576, {"2@128": "2", "2": "2", "3@1024": "3", "4@32": "4@32"}), (Gptq, 96, {"2@128": "2@32", "3@64": "3"}),
    (Gptq, 1536, {"2@128": "2@128", "2@1024": "2@512"}),
    (Hqq, 576, {"2@128": "2@96", "3@200": "3@192", "4@32": "4@32", "3@48": "3@48"}), (Hqq, 1536, {"2@128": "2@128"})])
def test_a_named_group_size_that_does_not_divide_a_row_has_the_next_smaller_for_a_stand_in(
        backend: type[Backend], columns: int, stored: dict[str, str]) -> None:
    quantizer, linear = backend(), LinearSpec("blocks.0.linear", 64, columns)
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(64, columns, generator=generator), torch.randn(64, columns, generator=generator)
    for name, expected in stored.items():
        choice = quantizer.choice(name)
        assert choice is not None
        found = quantizer.stand_in(linear, choice)
        assert found == quantizer.choice(expected)
        if columns % found.group_size:  # the option's, which has no stand-in
            with pytest.raises(ImpqError, match="group size 64 does not divide the 96"):
                quantizer.check(linear, found)
            continue
        quantizer.check(linear, found)
        variant = quantizer.quantize(weight, found, Statistics(inputs.T @ inputs, 64))
        assert variant.nbytes == quantizer.nbytes(linear, found) and columns % found.group_size == 0


@pytest.mark.parametrize(("backend", "bits"), [
    ("gptq", ("2@128", "2", "3@128", "3", "4")), ("hqq", ("2@128", "2", "4@128", "4", "8"))])
def test_a_menu_of_group_sizes_has_its_bytes_linear_by_linear(
        backend: str, bits: tuple[str, ...], tiny_config: RunConfig, tmp_path: Path) -> None:
    """128 divides the rows of down_proj only; elsewhere two names are one form."""
    config = replace(tiny_config, backend=backend, bits=bits, granularity="linear",
                     budget="60%", estimator="random", options={})
    result = run(config)
    assert result.config.bits == bits[::-1]
    for layer, sizes in zip(result.plan.space.layers, result.plan.space.nbytes, strict=True):
        alike = [sizes[1] == sizes[2], sizes[3] == sizes[4]]
        assert alike == ([False, False] if layer.name.endswith("down_proj") else [True, True])
    data = json.loads((result.folder / "plan.json").read_text())["layers"]
    for name in data:
        data[name] = {"bits": 2 if "mlp" in name else float(bits[2][0]), "group_size": 128}
    (tmp_path / "plan.json").write_text(json.dumps({"layers": data}))
    given = run(replace(config, plan=str(tmp_path / "plan.json"), budget=""))
    export = export_run(given.folder, backend, tmp_path / "export")
    assert export.score is not None and evaluate_folder(export.folder).score.nll == export.score.nll
    if backend == "gptq":
        settings = json.loads((export.folder / "config.json").read_text())["quantization_config"]
        groups = {(found["bits"], found["group_size"]) for found in settings["dynamic"].values()}
        assert groups | {(settings["bits"], settings["group_size"])} == {(2, 64), (2, 128), (3, 64)}
    with pytest.raises(UsageError, match=r"budget 8\.5bits is outside"):
        Parts.build(replace(config, budget="8.5bits"), Plugins())


def test_orders_that_differ_between_layers_are_refused() -> None:
    layers = [LayerSpec(name, 0, (LinearSpec(name, 64, columns),)) for name, columns in (("a", 128), ("b", 64))]
    choices = (Choice(3.0, 0, "EVEN"), Choice(2.0, 128, "ODD"))
    with pytest.raises(ImpqError, match=r"EVEN .* ODD .* b: leave one of the two out of --bits"):
        SearchSpace(tuple(layers), choices, np.array([[900, 100], [100, 200]]))


@pytest.mark.parametrize(("backend", "options"), [(Gptq, GptqOptions), (Hqq, HqqOptions)])
def test_a_group_size_by_name_is_that_of_the_option(backend: type[Backend], options: type) -> None:
    default, wide = backend(options(group_size=64)), backend(options(group_size=128))
    named = default.choice("3@128")
    assert named == Choice(3.0, 128, "3@128") and wide.choice("3") == Choice(3.0, 128, "3")
    assert default.choice("3@64") == default.choice("3") and default.choice("3@7") is None
    assert default.choice("3@") is None and default.choice("3.5@64") is None
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(64, 128, generator=generator), torch.randn(512, 128, generator=generator)
    statistics = Statistics(inputs.T @ inputs, 512)
    wanted = [(SPEC, choice) for choice in (*default.choices(), named) if choice]
    together = dict(zip([choice for _, choice in wanted],
                        [variant for _, variant in default.quantize_together({SPEC: weight}, wanted, statistics)],
                        strict=True))
    expected = wide.quantize(weight, Choice(3.0, 128), statistics)
    for choice, variant in together.items():
        alone = default.quantize(weight, choice, statistics) if choice != named else expected
        assert all(torch.equal(variant.tensors[name], alone.tensors[name]) for name in alone.tensors)
        assert default.nbytes(SPEC, choice) == variant.nbytes


def test_a_plan_with_groups_is_run_exported_and_applied_again(tiny_config: RunConfig, tmp_path: Path) -> None:
    config = replace(tiny_config, backend="hqq", bits=("2@32", "2", "4@32", 4.0), budget="", granularity="group",
                     estimator="random", pins={"*.0.self_attn.o_proj": "3@16"}, options={})
    result = run(config)
    assert result.config.bits == ("4@32", "4", "2@32", "2") and result.evaluation is not None
    names = [row.name for row in result.evaluation.rows]
    assert {"uniform 4@32", "uniform 2", "uniform 3"} <= set(names)
    data = json.loads((result.folder / "plan.json").read_text())
    assert data["layers"]["model.layers.0.self_attn.o_proj"] == {"bits": 3.0, "group_size": 16}
    again = run(replace(config, plan=str(result.folder / "plan.json")))
    assert again.evaluation.plan.nll == result.evaluation.plan.nll
    regrouped = replace(config, bits=("2", "2@64", "4", "4@64"), options={"backend": {"group_size": 32}},
                        plan=str(result.folder / "plan.json"))
    assert run(regrouped).evaluation.plan.nll == result.evaluation.plan.nll  # other names of the same widths


def test_plans_of_before_have_no_names(tmp_path: Path) -> None:
    space = SearchSpace((LayerSpec("a", 0, (SPEC,)),), (Choice(4.0, 64), Choice(3.0, 128, "3@128")),
                        np.array([[500, 400]]))
    (tmp_path / "plan.json").write_text(json.dumps({"layers": {"a": {"bits": 3, "group_size": 128}}}))
    assert Plan.load(tmp_path / "plan.json", space).pick.tolist() == [1]
    old = space.to_dict()
    del old["bits"]
    for choice in old["choices"]:
        del choice["name"]
    assert [choice.name for choice in SearchSpace.from_dict(old).choices] == ["4", "3"]
    typed = SearchSpace(space.layers, (Choice(4.5, 32, "Q4_0"), Choice(4.5, 32, "IQ4_NL")), np.array([[400, 400]]))
    plan = Plan(typed, np.array([1]), 400)
    plan.save(tmp_path / "typed.json")
    assert Plan.load(tmp_path / "typed.json", typed).pick.tolist() == [1]
    with pytest.raises(ImpqError, match="IQ4_NL"):
        Plan.load(tmp_path / "typed.json", space)


@pytest.mark.parametrize(("change", "reason"), [
    ({"bits": ("2", "3@48")}, "no 3@48 bits"), ({"bits": ("2", "Q4_K")}, "no Q4_K"), ({"bits": ("2", "2@64")}, "twice"),
    ({"bits": ("2", "2.0")}, "twice"), ({"bits": ("2", " ")}, "positive number"), ({"bits": ("4", "5")}, "no 5 bits"),
    ({"pins": {"*": ""}}, "positive number")])
def test_names_that_stand_for_nothing(change: dict[str, object], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        Parts.build(RunConfig(**change), Plugins())  # type: ignore[arg-type]


def test_names_have_a_unit_if_all_are_widths() -> None:
    assert in_bits("2", "3@128", "4") == "2/3@128/4 bits" and in_bits("IQ2_XS", "Q4_K") == "IQ2_XS/Q4_K"
    space = SearchSpace((LayerSpec("a", 0, (SPEC,)),), (Choice(4.0, 64), Choice(2.0, 64)), np.array([[500, 300]]))
    plan = Plan(space, np.array([1]), 300)
    [line, *_] = plan_lines(RunResult(Path(), RunConfig(), plan, None, None, None, None, 0.0, 0, {}, {}))
    assert line.startswith("plan: 0 at 4, 1 at 2 bits (this is uniform 2); ")


def test_a_name_is_part_of_a_file_name() -> None:
    with pytest.raises(ValueError, match="letters, digits"):
        Choice(4.0, 64, "../4")


def test_a_name_with_another_group_size_is_no_width(tmp_path: Path) -> None:
    """A plan keeps such a name, and what it contradicts is refused."""
    odd, plain = Choice(3.0, 128, "3@64"), Choice(3.0, 128, "3@128")
    assert not odd.is_width and plain.is_width and not odd.replaces(plain)
    assert Choice.of(odd.to_plan()) == odd
    assert Choice(4.5, 256, "q4_k").replaces(Choice(4.5, 256, "Q4_K"))
    assert not Choice(4.5, 256, "Q4_K").replaces(Choice(4.5, 256, "Q5_K"))
