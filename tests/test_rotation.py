"""Rotated models: the mathematics, the same logits in many architectures, and folders that are used as other models."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import architectures
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from wrappers import tiny as tiny_multimodal

from impq_core.cli import main
from impq_core.config import RunConfig
from impq_core.errors import ImpqError, UsageError
from impq_core.exports import rotated
from impq_core.exports.export import evaluate_folder, export_run
from impq_core.exports.rotated import rotate_model
from impq_core.model import rotation
from impq_core.model.hadamard import hadamard, rotate_columns, rotate_rows
from impq_core.model.linears import to_linears
from impq_core.model.rotation import rotate
from impq_core.model.source import locate_model
from impq_core.runs.pipeline import run
from impq_core.testing.tiny import byte_tokenizer, tiny_model

IDS = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(1))


def random_model(kind: str, make: Callable[[str], PreTrainedModel] = architectures.tiny,
                 settings: Callable[[PreTrainedModel], None] = lambda model: None) -> PreTrainedModel:
    """A tiny model whose gains and biases are random, too."""
    model = make(kind)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    settings(model)
    return to_linears(model)


def logits(model: PreTrainedModel, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids).logits


def require_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """All logits are equal, but for those of the windows behind an expert that rounding has chosen."""
    apart = (ours - theirs).flatten(1).abs().amax(dim=1)
    assert apart.median() < 1e-4 * theirs.abs().max(), apart


@pytest.mark.parametrize("order", ["sequency", "sylvester"])
@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_a_hadamard_matrix_is_orthonormal_and_its_own_inverse(size: int, order: str) -> None:
    matrix = hadamard(size, order)
    torch.testing.assert_close(matrix @ matrix, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, size**-0.5))
    if order == "sequency":
        changes = (matrix[:, 1:] * matrix[:, :-1] < 0).sum(dim=1)
        assert changes.tolist() == list(range(size))


@pytest.mark.parametrize("size", [0, -4, 3, 48])
def test_a_hadamard_block_is_a_power_of_two(size: int) -> None:
    with pytest.raises(UsageError, match=str(size)):
        hadamard(size)


def test_rows_and_columns_are_rotated_as_by_a_dense_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("impq_core.model.hadamard._AT_A_TIME", 100)  # several parts
    generator = torch.Generator().manual_seed(0)
    block, gain = hadamard(8), torch.randn(24, generator=generator)
    dense = torch.block_diag(*[block] * 3)
    rows, columns = torch.randn(7, 24, generator=generator), torch.randn(24, 7, generator=generator)
    read, written = rows.clone(), columns.clone()
    rotate_rows(read, block, gain)
    rotate_columns(written, block)
    torch.testing.assert_close(read, (rows.double() * gain.double() @ dense).float())
    torch.testing.assert_close(written, (dense.T @ columns.double()).float())


@pytest.mark.parametrize("kind", [
    "llama", "qwen2", "qwen3", "gemma", "phi3", "granite", "minicpm3", "gpt_oss", "mixtral", "qwen3_moe", "llama4_text",
    "nemotron_h", "jamba"])
def test_a_rotated_model_gives_the_same_logits(kind: str) -> None:
    model = random_model(kind)
    before, weights = logits(model), {name: value.clone() for name, value in model.named_parameters()}
    done = rotate(model, 32)
    require_same(logits(model), before)
    wide = {name for name, value in weights.items() if value.dim() == 2 and 64 in value.shape
            and not name.endswith(("q_b_proj.weight", "kv_b_proj.weight"))}
    now = dict(model.named_parameters())
    inner = {name for name in wide if torch.equal(now[name], weights[name])}
    assert done.attentions and len(inner) < len(wide) / 4, inner  # those inside of mixers stay


def listed() -> list[str]:
    """The types that the page on rotation lists."""
    page = (Path(__file__).parents[1] / "docs" / "rotation.md").read_text()
    paragraph = page[page.index("Hidden states of tiny random models"):].split("\n\n")[0]
    return re.findall(r"`(\w+)`", paragraph)


@pytest.mark.models
@pytest.mark.parametrize("kind", listed())
def test_the_types_on_the_page_are_rotated(kind: str) -> None:
    model = random_model(kind)
    before = logits(model)
    assert rotate(model, 32).block == 32
    require_same(logits(model), before)


def test_every_expert_is_rotated_whether_a_token_reaches_it_or_not() -> None:
    model = random_model("qwen3_moe")
    before = {name: value.clone() for name, value in model.named_parameters() if ".experts." in name}
    rotate(model, 32, values=False)
    now = dict(model.named_parameters())
    assert before and not any(torch.equal(now[name], value) for name, value in before.items())


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_head_gets_weights_of_its_own(tied: bool) -> None:
    def make(kind: str) -> PreTrainedModel:
        config = architectures.config_of(kind)
        config.tie_word_embeddings = tied
        return architectures.with_large_weights(AutoModelForCausalLM, config)

    model = random_model("llama", make)
    before = logits(model)
    done = rotate(model, 32)
    require_same(logits(model), before)
    assert done.untied == (259 * 64 if tied else 0)
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight


def test_gains_are_one_afterwards() -> None:
    llama, gemma = random_model("llama"), random_model("gemma")
    for model, unit in ((llama, 1.0), (gemma, 0.0)):
        rotate(model, 32)
        norms = [value for name, value in model.named_parameters() if "norm" in name]
        assert norms and all((value == unit).all() for value in norms)


@pytest.mark.parametrize(("kind", "reason"), [
    ("gpt2", "transformer.h.0.ln_1"), ("olmo", "model.layers.0.input_layernorm"),
    ("stablelm", "model.layers.0.input_layernorm"), ("gemma2", "model.layers.0.post_attention_layernorm"),
    ("gemma3_text", "model.layers.0.post_attention_layernorm"), ("olmo2", "post_attention_layernorm")])
def test_values_are_rotated_where_hidden_states_cannot_be(kind: str, reason: str) -> None:
    model = random_model(kind)
    before = logits(model)
    with pytest.raises(ImpqError, match=f"{reason}.*--no-residual"):
        rotate(model, 32)
    assert torch.equal(logits(model), before)
    done = rotate(model, 32, residual=False)
    require_same(logits(model), before)
    assert (done.block, done.attentions, done.untied) == (0, done.blocks, 0)


def test_a_model_that_also_sees_is_refused_but_for_its_values() -> None:
    model = random_model("mistral3", tiny_multimodal)
    before = logits(model, IDS[:, :16])
    with pytest.raises(ImpqError, match="forward of text"):
        rotate(model, 32)
    assert rotate(model, 32, residual=False).attentions
    require_same(logits(model, IDS[:, :16]), before)


def test_every_linear_that_reads_values_is_rotated() -> None:
    model = random_model("doge")  # whose mask is made of values, too
    before = logits(model)
    assert rotate(model, 32, residual=False).attentions == 4
    require_same(logits(model), before)


def test_an_attention_whose_values_pass_a_gate_is_left_alone() -> None:
    model = random_model("qwen3_next")
    before = logits(model)
    assert rotate(model, 32).attentions == 0
    require_same(logits(model), before)
    with pytest.raises(ImpqError, match="Qwen3NextForCausalLM"):
        rotate(model, 32, residual=False)


def test_heads_have_blocks_that_divide_them() -> None:
    def make(kind: str) -> PreTrainedModel:
        config = architectures.config_of(kind)
        config.head_dim = 24
        return architectures.with_large_weights(AutoModelForCausalLM, config)

    model = random_model("llama", make)
    before, weight = logits(model), model.model.layers[0].self_attn.v_proj.weight.clone()
    rotate(model, 64, residual=False)
    require_same(logits(model), before)
    dense = torch.block_diag(*[hadamard(8).float()] * (len(weight) // 8))
    torch.testing.assert_close(model.model.layers[0].self_attn.v_proj.weight, dense.T @ weight)


def test_an_outlier_channel_is_spread_over_its_block() -> None:
    def plant(model: PreTrainedModel) -> None:
        for block in model.model.layers:
            block.mlp.down_proj.weight.data[5] *= 20
            block.input_layernorm.weight.data[5] = 20

    def kurtosis(values: torch.Tensor) -> float:
        centred = values - values.mean()
        return float(centred.pow(4).mean() / centred.pow(2).mean().square())

    model = random_model("llama", settings=plant)
    block = model.model.layers[1]
    before = [kurtosis(block.mlp.down_proj.weight),
              kurtosis(block.self_attn.q_proj.weight * block.input_layernorm.weight)]
    rotate(model, 32)
    after = [kurtosis(block.mlp.down_proj.weight), kurtosis(block.self_attn.q_proj.weight)]
    assert all(now < 0.5 * then for now, then in zip(after, before, strict=True)), (before, after)


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """A folder with a tied model."""
    return tiny_model(tmp_path / "tied", "gemma", blocks=2)


def saved(kind: str, folder: Path) -> Path:
    """A folder with a model of ``architectures``, whose gains are random."""
    model = architectures.tiny(kind)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_folder_holds_the_rotated_model(tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotated, "SHARD", "150KB")
    digest = locate_model(str(tied)).digest
    written = rotate_model(str(tied), tmp_path / "deep" / "turned", 32)
    assert locate_model(str(tied)).digest == digest
    assert written.dtype == "float32" and written.rounding < 1e-5 and written.difference < 1e-5
    assert written.untied_bytes == 4 * 259 * 64
    files = list(written.folder.glob("*.safetensors"))
    assert len(files) > 1 and written.file_bytes == sum(file.stat().st_size for file in files)
    there, here = (json.loads((folder / "config.json").read_text()) for folder in (tied, written.folder))
    assert here == {**there, "tie_word_embeddings": False}
    assert ({file.name for file in tied.iterdir()} - {"model.safetensors"}
            <= {file.name for file in written.folder.iterdir()})
    loaded = AutoModelForCausalLM.from_pretrained(written.folder, dtype=torch.float32).eval()
    require_same(logits(loaded), logits(AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32).eval()))


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "mamba"])
def test_a_folder_has_the_form_in_which_transformers_saves_a_model(kind: str, tmp_path: Path) -> None:
    folder = saved(kind, tmp_path / "model")
    written = rotate_model(str(folder), tmp_path / "turned", 32)
    shapes = [{name: tuple(tensor.shape) for name, tensor in locate_model(str(path)).tensors()}
              for path in (folder, written.folder)]
    assert shapes[0].items() <= shapes[1].items()  # mamba's head was tied
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
              for path in (folder, written.folder)]
    require_same(*map(logits, models))


def test_the_dtype_is_that_of_the_model_or_the_one_asked_for(tied: Path, tmp_path: Path) -> None:
    half = rotate_model(str(tied), tmp_path / "half", 32, dtype="bfloat16")
    assert half.dtype == "bfloat16" and 1e-7 < half.rounding < 1e-2
    assert json.loads((half.folder / "config.json").read_text())["dtype"] == "bfloat16"
    again, exact = (rotate_model(str(half.folder), tmp_path / dtype, 32, dtype=dtype) for dtype in ("auto", "float32"))
    assert [again.dtype, exact.dtype] == ["bfloat16", "float32"] and abs(exact.rounding) < 0.3 * again.rounding
    assert again.untied_bytes == 0 and again.file_bytes < 0.6 * exact.file_bytes


def test_values_alone_leave_a_tied_head_tied(tied: Path, tmp_path: Path) -> None:
    written = rotate_model(str(tied), tmp_path / "turned", residual=False)
    assert written.untied_bytes == 0
    assert json.loads((written.folder / "config.json").read_text()) == json.loads((tied / "config.json").read_text())
    assert {name for name, _ in locate_model(str(tied)).tensors()} == {
        name for name, _ in locate_model(str(written.folder)).tensors()}


def test_nothing_is_written_if_the_logits_differ(tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    observe = rotation.observe

    def forgetful(model: PreTrainedModel) -> object:
        found, heads = observe(model)
        return replace(found, writers=found.writers[1:]), heads

    monkeypatch.setattr(rotation, "observe", forgetful)
    with pytest.raises(ImpqError, match="other logits"):
        rotate_model(str(tied), tmp_path / "turned", 32)
    assert not (tmp_path / "turned").exists() and not list(tmp_path.glob(".*"))


def test_a_rotated_model_is_run_and_exported(tied: Path, tmp_path: Path, tiny_config: RunConfig) -> None:
    written = rotate_model(str(tied), tmp_path / "turned", 32)
    config = replace(tiny_config, model=str(written.folder), backend="hqq", budget="3bits",
                     tracking_uri="none", options={"estimator": {"permutations": 4}})
    result = run(config)
    plain = run(replace(config, model=str(tied)))
    assert result.evaluation.row("unquantized").nll == pytest.approx(
        plain.evaluation.row("unquantized").nll, abs=1e-4)
    exported = export_run(result.folder, "hqq")
    assert evaluate_folder(exported.folder).score.nll == pytest.approx(exported.score.nll, abs=1e-4)


def test_the_command_says_what_it_has_done(tied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["rotate", str(tied), "--to", str(tmp_path / "turned"), "--block", "16", "--order", "sylvester"])
    said = capsys.readouterr().out
    for part in ("blocks of 16", "2 of 2", "float32", "0.07 MB", str(tmp_path / "turned")):
        assert part in said
