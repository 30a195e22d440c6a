"""Model folders with weights that contradict their configuration, or that are no weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from impq_core.errors import ImpqError
from impq_core.model.source import ModelSource, locate_model
from impq_core.testing import tiny_model

Edit = Callable[[dict[str, torch.Tensor]], object]
Q = "model.layers.1.self_attn.q_proj"


def edited(folder: Path, edit: Edit = lambda tensors: None, architecture: str = "llama", **config: Any) -> ModelSource:
    """A tiny model with three blocks, its tensors changed by ``edit`` and its configuration by ``config``."""
    tiny_model(folder, architecture)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return locate_model(str(folder))


def put(name: str, value: float, *shape: int) -> Edit:
    """Adds or replaces a tensor."""
    return lambda tensors: tensors.update({name: torch.full(shape, value)})


def spoil(name: str) -> Edit:
    """Writes a NaN into a tensor."""
    return lambda tensors: tensors[name].view(-1)[-1:].fill_(float("nan"))


def codes(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q}.weight"] = tensors[f"{Q}.weight"].to(torch.float8_e4m3fn)


REFUSED: list[tuple[Edit, dict[str, Any], str]] = [
    (put(f"{Q}.bias", 0.1, 64), {}, rf"hold 1 tensors .* no place for \(first: {Q}\.bias\)"),
    (put("model.visual.tower.weight", 0.1, 4), {}, r"no place for \(first: model\.visual\.tower\.weight\)"),
    (lambda tensors: None, {"num_hidden_layers": 2}, r"no place for \(first: model\.layers\.2\."),
    (lambda tensors: None, {"num_hidden_layers": 4}, r"lack 9 tensors \(first: model\.layers\.3\."),
    (lambda tensors: None, {"attention_bias": True}, r"lack 12 tensors \(first: model\.layers\.0\.self_attn\.k"),
    (lambda tensors: None, {"vocab_size": 300}, r"another shape .*lm_head\.weight is 259 x 64, not 300 x 64"),
    (lambda tensors: tensors.pop("lm_head.weight"), {}, r"lack 1 tensors \(first: lm_head\.weight\)"),
    (spoil("model.norm.weight"), {}, r"weight model\.norm\.weight holds NaN"),
    (put(f"{Q}.bias", float("nan"), 64), {}, rf"weight {Q}\.bias holds NaN"),
    (codes, {}, rf"weight {Q}\.weight holds float8_e4m3fn codes.*quantized already"),
    (put(f"{Q}.weight_scale", 0.1, 1), {}, rf"no place for \(first: {Q}\.weight_scale\)"),
]


@pytest.mark.parametrize(("edit", "config", "says"), REFUSED)
def test_weights_that_are_not_the_configurations_are_refused_by_name(tmp_path: Path, edit: Edit, config: dict[str, Any],
                                                                     says: str) -> None:
    source = edited(tmp_path / "m", edit, **config)
    source.skeleton()
    with pytest.raises(ImpqError, match=says):
        source.check_weights()


@pytest.mark.parametrize("says", ["lack", "no place", "another shape"])
def test_weights_of_a_hub_are_held_to_the_same_when_they_are_loaded(tmp_path: Path, says: str) -> None:
    config = {"lack": {"num_hidden_layers": 4}, "no place": {"num_hidden_layers": 2},
              "another shape": {"vocab_size": 300}}
    with pytest.raises(ImpqError, match=says):
        edited(tmp_path / "m", **config[says]).load(torch.float32)


def test_a_head_that_the_configuration_ties_and_the_file_does_not(tmp_path: Path) -> None:
    with pytest.raises(ImpqError, match=r"ties the head .* tie_word_embeddings"):
        edited(tmp_path / "other", tie_word_embeddings=True).load(torch.float32)
    same = edited(tmp_path / "same", lambda tensors: tensors.update(
        {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}), tie_word_embeddings=True)
    same.check_weights()
    model = same.load(torch.float32)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_tensors_that_older_versions_stored_are_no_weights(tmp_path: Path) -> None:
    source = edited(tmp_path / "m", put("model.layers.0.self_attn.rotary_emb.inv_freq", 1.0, 8))
    source.check_weights()
    source.load(torch.float32)


def test_weights_are_read_once_for_the_check_and_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors

    opened: list[Path] = []
    plain = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", lambda file, **more: opened.append(file) or plain(file, **more))
    source = edited(tmp_path / "m")
    source.check_weights()
    first = list(opened)
    assert set(first) == {tmp_path / "m" / "model.safetensors"}
    source.check_weights()
    assert len(source.digest) == 16 and opened == first


def test_the_digest_covers_configuration_weights_and_code(tmp_path: Path) -> None:
    digests = [edited(tmp_path / "a").digest, edited(tmp_path / "b").digest]
    assert digests[0] == digests[1]
    digests = digests[:1]
    digests.append(edited(tmp_path / "c", rope_theta=20_000.0).digest)
    digests.append(edited(tmp_path / "d", lambda tensors: tensors[f"{Q}.weight"].mul_(2)).digest)
    for text in ("x = 1\n", "x = 2\n"):
        folder = tmp_path / "a" / "code"
        folder.mkdir(exist_ok=True)
        (folder / "modeling_own.py").write_text(text)
        digests.append(locate_model(str(tmp_path / "a")).digest)
    assert len(set(digests)) == 5
