"""Architectures of transformers as tiny models: share of quantized weights, losses, slopes."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import pytest
import wrappers
from architectures import KINDS, line_of, survey, tiny
from impq_hqq.backend import Hqq, Options
from impq_quanto.backend import Quanto

PAGE = Path(__file__).parent.parent / "docs" / "models.md"

TEXT = """# Models

Language models of transformers {version}, tried as tiny random models of {count} configurations (`tox -e models` writes
this page). **Share** is the share of the weights in a model's blocks that are quantized, by `hqq` with groups of
16. The rest stays at 16 bits: routers, gates, convolutions, and weights of a tiny model that are smaller than a group.
For each model, the test compared losses with those of the plain forward, with all layers at 8 and at 2 bits and for
forwards that begin in the middle, and slopes with differences of losses.

**Forwards** are `partial` if a forward can begin at a block, so that two plans that differ behind it cost less. They
are `whole` if the blocks hand a state to each other (shared keys and values, indices of tokens): such a model is
measured as well, but every evaluation runs all its blocks, and calibration runs the blocks in front of each block once
more.

Not in the tables are encoders, encoder-decoder models, and models that need an image or a sound.

| model type | share | forwards |
|---|---|---|
{rows}

## Multimodal models

A multimodal model is loaded whole. Its language model runs on text alone, and the blocks are those of that language
model; encoders of images and audio and projectors stay as they are. The share is of the weights in the language model's
blocks. Image, video and audio inputs are neither measured nor used for calibration.

| model type | share | forwards |
|---|---|---|
{multimodal}

## Models that do not run

| model type | why |
|---|---|
{refused}

For these no tiny configuration was found, so they were not tried: {untried}.
"""

SOME = ("ctrl", "gpt2", "gpt_neox", "falcon", "bloom", "phi", "granite", "cohere2", "mixtral", "qwen3_moe", "gpt_oss",
        "lfm2", "qwen3_5_text", "gemma3_text", "gemma3n_text", "glm_moe_dsa")


@pytest.mark.parametrize("kind", SOME)
def test_an_architecture_is_quantized_and_measured(kind: str) -> None:
    row = survey(tiny(kind), Hqq(Options(group_size=16)))
    assert row.share > 0.98
    assert row.partial == (kind != "glm_moe_dsa")


def test_experts_are_quantized_by_a_backend_that_stores_most_shapes() -> None:
    assert survey(tiny("mixtral"), Quanto()).share > 0.99


def rows_of(lines: Mapping[str, str]) -> str:
    """Rows of a table of the models that ran."""
    return "\n".join(f"| {kind} | {line.partition(',')[0]} | {'whole' if 'whole' in line else 'partial'} |"
                     for kind, line in lines.items() if line[0].isdigit())


@pytest.mark.models
def test_every_architecture() -> None:
    backend = Hqq(Options(group_size=16))
    text = {kind: line_of(kind, backend) for kind in KINDS}
    multimodal = {kind: line_of(kind, backend, wrappers.tiny) for kind in wrappers.KINDS}
    lines = {**text, **multimodal}
    ran = {kind for kind, line in lines.items() if line[0].isdigit()}
    refused = {kind: line.partition(": ")[2] for kind, line in lines.items() if line.startswith("refused")}
    untried = [kind for kind, line in lines.items() if line.startswith("no tiny model")]
    PAGE.write_text(TEXT.format(
        version=version("transformers"), count=len(ran) + len(refused), rows=rows_of(text),
        multimodal=rows_of(multimodal), refused="\n".join(f"| {kind} | {line} |" for kind, line in refused.items()),
        untried=", ".join(untried)))
    assert ran | set(refused) | set(untried) == set(lines)
    assert len(ran & set(text)) >= 100 and len(ran & set(multimodal)) >= 50 and not set(refused) & set(SOME)
