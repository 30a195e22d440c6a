"""Plans of llama.cpp's types beside llama.cpp's own mixes, uniform types, and plans by tensor error, at equal bytes.

The demo model, and any model folder that is named. Rows of SmolLM2 (576) and Gemma-3-270M (640) are no multiple of 256,
so that all their linears but down_proj are stored in llama.cpp's stand-ins, of 4.5 bits and more.
(A file named gguf.py would hide the library of that name.)
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
from common import Bench, heading, plus_minus, table, write

from impq_core.config import RunConfig, TextConfig
from impq_core.model.calibration import input_statistics
from impq_core.parts import Parts
from impq_core.plugins import Plugins
from impq_core.results import Score
from impq_core.space import Choice
from impq_core.types import Plan, SensitivityEstimate

MENU = ("Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS")
MIXES = "Q4_K_M,Q4_K_S,IQ4_XS,IQ3_M,Q3_K_M,Q3_K_S,IQ3_XS,IQ3_XXS,Q2_K,IQ2_M"
BASE = RunConfig(tracking_uri="none", backend="gguf", bits=MENU, granularity="linear", estimator="aumann-shapley",
                 options={"backend": {"mixes": MIXES}}, evaluation=TextConfig(windows=64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", default=[], help="A model folder; may be repeated.")
    parser.add_argument("--windows", type=int, default=64, help="Windows of calibration, and of evaluation.")
    parser.add_argument("--output", default="llama_cpp.md", help="Name of the file in benchmarks/results.")
    given = parser.parse_args()
    lines = heading("Types of llama.cpp: plans beside its own mixes", "python benchmarks/llama_cpp.py")
    for model in ("demo", *given.model):
        text = TextConfig(windows=given.windows)
        lines += report(replace(BASE, model=model, calibration=text, evaluation=text))
        write(given.output, lines)


def report(config: RunConfig) -> list[str]:
    """The section of one model."""
    backend = Parts.build(config, Plugins()).backend
    bench = Bench.build(config)
    prepared, space = bench.prepared, bench.prepared.space
    linears = [linear for layer in space.layers for linear in layer.linears]
    estimate, _ = bench.estimate(config)
    tensors = tensor_errors(bench)
    rows: list[list[str]] = []
    for name, nbytes, choices in [*_mixes(bench), *_uniforms(bench)]:
        reference = bench.evaluator.score(choices)
        cells = [name, f"{nbytes / 1e6:.2f}", f"{space.bits_per_weight(nbytes):.3f}", _shown(reference),
                 f"{reference.kl:.3f}"]
        if space.low_bytes <= nbytes < space.high_bytes:
            for made, allocator in ((estimate, "qp"), (tensors, "greedy")):
                plan = _plan(config, made, allocator, nbytes)
                score = bench.score(plan)
                cells += [_shown(score), plus_minus(*score.minus(reference), sign=True), f"{score.kl:.3f}"]
        rows.append([*cells, *[""] * (11 - len(cells))])
    unquantized = bench.evaluator.score([None] * len(space.everyone))
    stored = {(backend.stand_in(linear, choice).name, choice.name) for linear in linears for choice in space.choices}
    standing = ", ".join(f"{choice} as {found}" for found, choice in sorted(stored) if found != choice)
    header = ["at the bytes of", "MB", "bits stored", "its NLL", "KL", "plan", "minus it", "KL", "by tensor error",
              "minus it", "KL"]
    return [f"## {config.model if config.model == 'demo' else prepared.source.name}", "",
            f"Held-out NLL, nats per token, on {prepared.evaluation}, {prepared.evaluation.scored_tokens} scored "
            f"tokens; unquantized {_shown(unquantized)}. {len(space)} linears, {space.parameters / 1e6:.1f} M "
            f"weights; embeddings and head at 16 bits in all rows. Menu {', '.join(config.bits)}"
            + (f"; stand-ins: {standing}" if standing else "") + f". Plan: {estimate.method}, "
            f"{estimate.forwards:.1f} forwards, qp. By tensor error: squared error of the weights, weighted by the "
            "mean squares of the inputs; greedy. Differences are paired over windows.", "", *table(header, rows)]


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
