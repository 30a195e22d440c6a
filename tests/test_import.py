"""Plans from files of other software: ``impq import``, and runs of a given plan without its menu and granularity."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGUFWriter
from gguf_files import linears_of, write_gguf
from impq_gguf.importer import read_types
from impq_gguf.mixes import deal
from impq_gguf.types import TYPES, stored_as

from impq_core.cli import main
from impq_core.compare.read import gather
from impq_core.config import RunConfig
from impq_core.errors import ImpqError, UsageError
from impq_core.parts import Parts
from impq_core.plugins import Plugins
from impq_core.runs.importing import import_plan
from impq_core.runs.pipeline import run
from impq_core.space import LinearSpec
from impq_core.testing import tiny_model


@pytest.fixture
def linears(tiny_llama: Path) -> list[LinearSpec]:
    """Those of the blocks."""
    return linears_of(tiny_llama)[:-2]


@pytest.fixture
def types(linears: list[LinearSpec]) -> dict[str, str]:
    """Q4_K_M as llama-quantize stores it for rows of 64 and 128: Q5_0 and Q8_0."""
    dealt = deal("Q4_K_M", linears)
    return {linear.name: stored_as(dealt[linear.name], linear.columns).name for linear in linears}


def test_an_imported_plan_is_measured_and_compared_beside_others(
        tiny_config: RunConfig, tiny_llama: Path, linears: list[LinearSpec], types: dict[str, str], tmp_path: Path,
        capsys: pytest.CaptureFixture[str]) -> None:
    file, plan = write_gguf(tmp_path / "theirs.gguf", linears, types), tmp_path / "theirs.json"
    main(["import", str(file), "--model", str(tiny_llama), "--to", str(plan)])
    assert "Q5_0" in capsys.readouterr().out
    stored = json.loads(plan.read_text())
    assert {name: choice["name"] for name, choice in stored["layers"].items()} == types
    assert stored["provenance"]["file"] == "theirs.gguf" and len(stored["provenance"]["sha256"]) == 64

    config = replace(tiny_config, backend="gguf", bits=(), granularity="auto", options={})
    theirs = run(replace(config, plan=str(plan)))
    assert theirs.plan and theirs.evaluation and theirs.config.granularity == "linear"
    assert {name: str(choice) for name, choice in theirs.plan.widths().items()} == types
    mix = theirs.evaluation.row("mix Q4_K_M")  # the same file, by llama.cpp's rules
    assert mix.nbytes == theirs.plan.nbytes == stored["bytes"]
    assert (mix.window_nll == theirs.evaluation.rows[0].window_nll).all()

    ours = run(replace(config, bits=("Q8_0", "Q5_0"), budget=f"{theirs.plan.nbytes}B", estimator="zscore",
                       allocator="greedy"))
    [contest], notes = gather([theirs.folder, ours.folder])
    assert not notes and {contest.label(each).partition(",")[0] for each in contest.contestants} == {
        "given theirs.json", "zscore"}


def test_embedding_and_head_are_read_on_demand_and_are_those_of_the_mix(tiny_config: RunConfig, tiny_llama: Path,
                                                                        tmp_path: Path) -> None:
    linears = linears_of(tiny_llama)
    dealt = deal("Q4_K_M", linears)
    types = {linear.name: stored_as(dealt[linear.name], linear.columns).name for linear in linears}
    assert types["model.embed_tokens"] == "Q5_0" and types["lm_head"] == "Q8_0"
    file = write_gguf(tmp_path / "whole.gguf", linears, types)
    inside = import_plan(file, str(tiny_llama), "gguf", Plugins())
    whole = import_plan(file, str(tiny_llama), "gguf", Plugins(), embeddings=True)
    assert {name: str(choice) for name, choice in whole.widths().items()} == types
    assert whole.nbytes == inside.nbytes + sum(linear.parameters * (8.5 if linear.name == "lm_head" else 5.5) / 8
                                               for linear in linears[-2:])
    whole.save(tmp_path / "whole.json")
    result = run(replace(tiny_config, backend="gguf", bits=(), granularity="auto", options={},
                         plan=str(tmp_path / "whole.json")))
    assert result.plan and result.evaluation and result.plan.nbytes == whole.nbytes
    mix = result.evaluation.row("mix Q4_K_M")
    assert mix.nbytes == whole.nbytes and (mix.window_nll == result.evaluation.rows[0].window_nll).all()


def test_experts_have_the_type_of_their_tensor(tmp_path: Path) -> None:
    experts = [LinearSpec(f"model.layers.{block}.mlp.experts.{number}.down_proj", 64, 128)
               for block in range(2) for number in range(3)]
    writer = GGUFWriter(tmp_path / "mixture.gguf", "qwen3moe")
    writer.add_block_count(2)
    for block, kind in enumerate((gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0)):
        size = TYPES[kind.name].nbytes * 128 // 32
        writer.add_tensor(f"blk.{block}.ffn_down_exps.weight", np.zeros((3, 64, size), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    types = read_types(tmp_path / "mixture.gguf", experts)
    assert [types[linear.name] for linear in experts] == ["Q4_0"] * 3 + ["Q8_0"] * 3
    with pytest.raises(ImpqError, match="another model"):
        read_types(tmp_path / "mixture.gguf", [*experts, replace(experts[-1], name=experts[-1].name.replace("2", "3"))])


def test_parts_of_a_split_file_are_read_together(linears: list[LinearSpec], types: dict[str, str],
                                                 tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "m-00001-of-00002.gguf", linears[:10], types)
    with pytest.raises(ImpqError, match="00002-of-00002"):
        read_types(first, linears)
    second = write_gguf(tmp_path / "m-00002-of-00002.gguf", linears[10:], types)
    assert read_types(first, linears) == read_types(second, linears) == types


def truncated(file: Path, linears: list[LinearSpec]) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def truncated_early(file: Path, linears: list[LinearSpec]) -> None:
    file.write_bytes(file.read_bytes()[:300])


def empty(file: Path, linears: list[LinearSpec]) -> None:
    file.write_bytes(b"")


def no_gguf(file: Path, linears: list[LinearSpec]) -> None:
    file.write_bytes(b"PK" + bytes(1000))


def other_width(file: Path, linears: list[LinearSpec]) -> None:
    wider = [replace(linear, rows=2 * linear.rows) for linear in linears]
    write_gguf(file, wider, {linear.name: "Q8_0" for linear in linears})


def other_depth(file: Path, linears: list[LinearSpec]) -> None:
    write_gguf(file, linears, {linear.name: "Q8_0" for linear in linears}, blocks=5)


def lacks_a_tensor(file: Path, linears: list[LinearSpec]) -> None:
    write_gguf(file, linears[1:], {linear.name: "Q8_0" for linear in linears})


def other_architecture(file: Path, linears: list[LinearSpec]) -> None:
    write_gguf(file, linears, {linear.name: "Q8_0" for linear in linears}, architecture="phi3")


def unknown_architecture(file: Path, linears: list[LinearSpec]) -> None:
    write_gguf(file, linears, {linear.name: "Q8_0" for linear in linears}, architecture="nothing-of-that-name")


@pytest.mark.parametrize(("damage", "named"), [
    (truncated, "truncated"), (truncated_early, "truncated"), (empty, "no GGUF"), (no_gguf, "no GGUF"),
    (other_width, "128 x 64"), (other_depth, "5 blocks"), (lacks_a_tensor, "blk.0.attn_q.weight"),
    (other_architecture, "phi3"), (unknown_architecture, "nothing-of-that-name")])
def test_files_that_cannot_be_used_are_refused_in_one_line(
        damage: Callable[[Path, list[LinearSpec]], None], named: str, tiny_llama: Path, linears: list[LinearSpec],
        types: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_gguf(tmp_path / "file.gguf", linears, types)
    damage(file, linears)
    with pytest.raises(SystemExit) as stopped:
        main(["import", str(file), "--model", str(tiny_llama), "--to", str(tmp_path / "plan.json")])
    [line] = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 1 and named in line and "this is a bug" not in line
    assert not (tmp_path / "plan.json").exists()


def test_a_width_of_a_plan_that_the_backend_lacks_is_said_to_be_the_plans(tiny_config: RunConfig,
                                                                            tmp_path: Path) -> None:
    plan = tmp_path / "odd.json"
    plan.write_text(json.dumps({"layers": {"model.layers.0": {"bits": 4.5, "group_size": 256, "name": "Q9_K"}}}))
    with pytest.raises(UsageError, match=r"odd\.json.* Q9_K"):
        Parts.build(replace(tiny_config, backend="gguf", bits=(), plan=str(plan), options={}), Plugins())


def test_backends_without_common_widths_are_named(tiny_config: RunConfig) -> None:
    with pytest.raises(UsageError, match="'gguf' and 'hqq'"):
        Parts.build(replace(tiny_config, backend="gguf", estimate_with="hqq", bits=(), options={}), Plugins())


def test_missing_files_other_backends_and_taken_names_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ImpqError, match=r"none\.gguf"):
        import_plan(tmp_path / "none.gguf", str(tiny_llama), "gguf", Plugins())
    (tmp_path / "some.gguf").touch()
    with pytest.raises(ImpqError, match="'gptq'"):
        import_plan(tmp_path / "some.gguf", str(tiny_llama), "gptq", Plugins())
    (tmp_path / "plan.json").touch()
    with pytest.raises(SystemExit):
        main(["import", "some.gguf", "--model", str(tiny_llama), "--to", str(tmp_path / "plan.json")])


def test_a_file_of_one_type_is_a_plan(tiny_config: RunConfig, tiny_llama: Path, linears: list[LinearSpec],
                                      tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "uniform.gguf", linears, {linear.name: "Q4_0" for linear in linears})
    plan = import_plan(file, str(tiny_llama), "gguf", Plugins())
    plan.save(tmp_path / "plan.json")
    assert plan.nbytes == sum(linear.parameters for linear in linears) * 4.5 / 8
    result = run(replace(tiny_config, backend="gguf", bits=(), granularity="auto", options={},
                         plan=str(tmp_path / "plan.json")))
    assert result.evaluation and result.plan
    assert (result.evaluation.row("uniform Q4_0").window_nll == result.evaluation.rows[0].window_nll).all()


@pytest.mark.parametrize("granularity", ["block", "group", "linear"])
def test_a_given_plan_decides_the_granularity_and_keeps_the_default_menu(granularity: str, tiny_config: RunConfig,
                                                                         tmp_path: Path) -> None:
    config = replace(tiny_config, backend="hqq", bits=(), estimator="zscore", allocator="greedy", options={})
    first = run(replace(config, granularity=granularity))
    assert first.plan
    again = run(replace(config, estimator="spqe", granularity="auto", plan=str(first.folder / "plan.json")))
    assert again.plan and again.config.granularity == granularity and again.plan.widths() == first.plan.widths()
    assert again.config.bits == first.config.bits == ("4", "3", "2")


def test_a_model_of_another_shape_has_another_plan(tmp_path: Path, linears: list[LinearSpec],
                                                   types: dict[str, str]) -> None:
    file = write_gguf(tmp_path / "file.gguf", linears, types)
    with pytest.raises(ImpqError, match="4 blocks, the model has 3"):
        import_plan(file, str(tiny_model(tmp_path / "model", "qwen3", blocks=3)), "gguf", Plugins())
