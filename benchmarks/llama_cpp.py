"""Plans of llama.cpp's types beside llama.cpp's own mixes, uniform types, and plans by tensor error, at equal bytes.

The demo model, the same model widened, and any model folder that is named. Rows of SmolLM2 (576) and Gemma-3-270M (640)
are no multiple of 256, so that all their linears but down_proj are stored in llama.cpp's stand-ins, of 4.5 bits and
more. The widened model computes what SmolLM2 computes, with rows of 768 weights, which are no longer on the grid of the
4-bit file that the demo was made from.
(A file named gguf.py would hide the library of that name.)
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import Bench, command, heading, model_name, page_of, plus_minus, table, write
from torch.nn.functional import pad

from impq_core.config import RunConfig, TextConfig
from impq_core.model.calibration import input_statistics
from impq_core.model.demo import cache_folder
from impq_core.model.source import locate_model
from impq_core.parts import Parts
from impq_core.plugins import Plugins
from impq_core.results import Score
from impq_core.space import Choice
from impq_core.types import Plan, SensitivityEstimate

MENU = ("Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S")
MIXES = "Q4_K_M,IQ3_M,Q3_K_M,IQ3_XXS,Q2_K,IQ2_M"
BASE = RunConfig(tracking_uri="none", backend="gguf", bits=MENU, granularity="linear", estimator="aumann-shapley",
                 options={"backend": {"mixes": MIXES}}, evaluation=TextConfig(windows=64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", default=[],
                        help="A model folder, demo or widened; may be repeated [demo, widened].")
    parser.add_argument("--windows", type=int, default=64, help="Windows of calibration.")
    parser.add_argument("--probe-windows", type=int, default=64, help="Of those, windows that slopes are read on.")
    parser.add_argument("--evaluation-windows", type=int, default=64, help="Windows of evaluation.")
    parser.add_argument("--values", default="nll,kl", help="Losses whose slopes make plans.")
    parser.add_argument("--at", default="mix,uniform", help="Kinds of references at whose bytes plans are made.")
    parser.add_argument("--output", help="Name of the page in benchmarks/results; by default of the first model.")
    given = parser.parse_args()
    lines = heading("Types of llama.cpp: plans beside its own mixes", command())
    models = given.model or ["demo", "widened"]
    for model in models:
        folder = cache_folder() / "benchmarks" / "smollm2-768"
        if model == "widened" and not (folder / "config.json").exists():
            widen(locate_model("demo").folder, folder)
        config = replace(BASE, model=str(folder) if model == "widened" else model, probe_windows=given.probe_windows,
                         calibration=TextConfig(windows=given.windows),
                         evaluation=TextConfig(windows=given.evaluation_windows))
        title = "SmolLM2-135M, widened to 768 and rotated" if model == "widened" else model_name(model)
        lines += report(config, title, given.values.split(","), given.at.split(","))
        write(given.output or page_of("llama_cpp.md", models[0]), lines)


def report(config: RunConfig, title: str, values: Sequence[str], kinds: Sequence[str]) -> list[str]:
    """The section of one model.

    Args:
        config: of the model and its texts.
        title: of the section.
        values: losses whose slopes make plans.
        kinds: kinds of references at whose bytes plans are made.
    """
    backend = Parts.build(config, Plugins()).backend
    bench = Bench.build(config)
    prepared, space = bench.prepared, bench.prepared.space
    linears = [linear for layer in space.layers for linear in layer.linears]
    estimates = [(bench.estimate(replace(config, value=value))[0], "qp") for value in values]
    estimates.append((tensor_errors(bench), "greedy"))
    references = [*_mixes(bench), *_uniforms(bench)]
    plans = {(name, number): _plan(config, estimate, allocator, nbytes) for name, nbytes, _ in references
             for number, (estimate, allocator) in enumerate(estimates)
             if space.low_bytes < nbytes < space.high_bytes and name.split()[0] in kinds}
    allocations = [[None] * len(space.everyone), *(choices for *_, choices in references),
                   *(space.assignment(plan.pick) for plan in plans.values())]
    unquantized, *scores = bench.evaluator.scores(
        allocations, lambda done, total: print(f"score: {done} of {total}", flush=True))
    planned = dict(zip(plans, scores[len(references):], strict=True))
    rows: list[list[str]] = []
    for (name, nbytes, _), reference in zip(references, scores, strict=False):
        cells = [name, f"{nbytes / 1e6:.2f}", f"{space.bits_per_weight(nbytes):.3f}", _shown(reference),
                 f"{reference.kl:.3f}"]
        for score in (planned.get((name, number)) for number in range(len(estimates))):
            cells += ["", "", ""] if score is None else [
                _shown(score), plus_minus(*score.minus(reference), sign=True), f"{score.kl:.3f}"]
        rows.append(cells)
    stored = {(backend.stand_in(linear, choice).name, choice.name) for linear in linears for choice in space.choices}
    standing = ", ".join(f"{choice} as {found}" for found, choice in sorted(stored) if found != choice)
    names = [*(f"plan by {value}" for value in values), "by tensor error"]
    header = ["at the bytes of", "MB", "bits stored", "its NLL", "KL",
              *(cell for name in names for cell in (name, "minus it", "KL"))]
    return [f"## {title}", "",
            f"Held-out NLL, nats per token, on {prepared.evaluation}, {prepared.evaluation.scored_tokens} scored "
            f"tokens; unquantized {_shown(unquantized)}. {len(space)} linears, {space.parameters / 1e6:.1f} M "
            f"weights; embeddings and head at 16 bits in all rows. Menu {', '.join(config.bits)}"
            + (f"; stand-ins: {standing}" if standing else "") + f". Plans: {estimates[0][0].method} of the loss "
            f"({', '.join(values)}) on {config.probe_windows} windows, qp. By tensor error: squared error of the "
            "weights, weighted by the mean squares of the inputs; greedy. Differences are paired over windows.",
            "", *table(header, rows)]


def widen(source: Path, target: Path, width: int = 768) -> None:
    """Write a Llama model that computes what another does, with wider hidden states and more heads.

    The gains of norms are multiplied into the linears behind them. Hidden states get zeros as further components and
    are rotated by a random orthogonal matrix, so that all weights of a row matter. Further heads are zero.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    old = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config = copy.deepcopy(old.config)
    narrow, size = config.hidden_size, config.head_dim
    share, heads = narrow / width, width // size
    config.num_key_value_heads = heads * config.num_key_value_heads // config.num_attention_heads
    config.hidden_size, config.num_attention_heads, config.tie_word_embeddings = width, heads, False
    config.rms_norm_eps *= share  # of the mean square over more components
    config.dtype = torch.bfloat16
    rotation = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0)).double()).Q.float()

    def reader(weight: torch.Tensor, gain: torch.Tensor, rows: int) -> torch.Tensor:
        return pad(weight * gain, (0, width - narrow, 0, rows - len(weight))) @ rotation.T

    def writer(weight: torch.Tensor, columns: int) -> torch.Tensor:
        return rotation @ pad(weight, (0, columns - weight.shape[1], 0, width - narrow))

    new = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        new.model.embed_tokens.weight.copy_(pad(old.model.embed_tokens.weight, (0, width - narrow)) @ rotation.T)
        new.lm_head.weight.copy_(reader(old.lm_head.weight, old.model.norm.weight, config.vocab_size))
        new.model.norm.weight.fill_(share**0.5)
        for there, here in zip(new.model.layers, old.model.layers, strict=True):
            for name in ("q_proj", "k_proj", "v_proj"):
                into = getattr(there.self_attn, name).weight
                into.copy_(reader(getattr(here.self_attn, name).weight, here.input_layernorm.weight, len(into)))
            for name in ("gate_proj", "up_proj"):
                into = getattr(there.mlp, name).weight
                into.copy_(reader(getattr(here.mlp, name).weight, here.post_attention_layernorm.weight, len(into)))
            there.self_attn.o_proj.weight.copy_(writer(here.self_attn.o_proj.weight, width))
            there.mlp.down_proj.weight.copy_(writer(here.mlp.down_proj.weight, config.intermediate_size))
            there.input_layernorm.weight.fill_(share**0.5)
            there.post_attention_layernorm.weight.fill_(share**0.5)
        ids = torch.arange(1000, 1064)[None]
        difference = (new(ids).logits - old(ids).logits).abs().max() / old(ids).logits.abs().max()
        assert difference < 1e-4, f"the widened model computes other logits: {difference}"
    new.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


def tensor_errors(bench: Bench) -> SensitivityEstimate:
    """The squared error of each linear's weight at each choice, weighted by the mean squares of its inputs."""
    session, space = bench.session, bench.prepared.space
    bank, runner = session.bank, session.runner
    assert bench.prepared.calibration is not None
    bank.apply([None] * len(bank.layers))
    hidden = runner.embed(bench.prepared.calibration.ids)
    errors = np.zeros(space.nbytes.shape)
    for index in range(len(runner)):
        inside = [i for i, layer in enumerate(space.layers) if layer.block == index]
        seen = input_statistics(runner, index, hidden, {bank.module(space.layers[i].linears[0]) for i in inside})
        for i in inside:
            [linear] = space.layers[i].linears
            statistics = seen[bank.module(linear)]
            squares, weight = statistics.gram.diagonal() / statistics.tokens, bank.original(linear)
            for k, choice in enumerate(space.choices):
                errors[i, k] = float(((bank.variant(linear, choice) - weight).square() * squares).sum())
        hidden = runner.run(index, hidden)
    return SensitivityEstimate(space, errors - errors[:, :1], method="tensor error", forwards=1.0, is_loss=False)


def _plan(config: RunConfig, estimate: SensitivityEstimate, allocator: str, nbytes: int) -> Plan:
    return Parts.build(replace(config, allocator=allocator), Plugins()).allocator.allocate(estimate, nbytes)


def _mixes(bench: Bench) -> list[tuple[str, int, list[Choice]]]:
    names = [layer.name for layer in bench.prepared.space.layers]
    return sorted([(f"mix {mix.name}", mix.nbytes, [mix.choices[name] for name in names])
                   for mix in bench.prepared.mixes], key=lambda row: -row[1])


def _uniforms(bench: Bench) -> list[tuple[str, int, list[Choice]]]:
    space = bench.prepared.space
    return [(f"uniform {choice}", space.bytes_of(space.uniform(k)), [choice] * len(space))
            for k, choice in enumerate(space.choices)]


def _shown(score: Score) -> str:
    return plus_minus(score.nll, score.stderr)


if __name__ == "__main__":
    main()
