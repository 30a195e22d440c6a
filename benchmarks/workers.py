"""Work shared by Ray's workers: one permutation's picks, quantizing, gradients and a sweep, with none, one and two.

The model is random, with the shapes of a small real one, so that five repetitions of each take minutes. Workers are
warm: they have loaded the model; what that costs is in a table of its own, and in the sweep.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from common import command, heading, table, write
from impq_ray.crew import Ray
from impq_spqe.sampler import demotions

from impq_core.config import RunConfig, TextConfig
from impq_core.ledger import MeasurementLog
from impq_core.plugins import Plugins
from impq_core.runs.grid import Sweep
from impq_core.runs.orders import order_of
from impq_core.runs.prepare import prepare
from impq_core.runs.session import Session
from impq_core.runs.sweep import run_sweep
from impq_core.testing import made_text
from impq_core.testing.tiny import byte_tokenizer
from impq_core.trust import NO_TRUST

SETTINGS = (("none, 2 threads", 0, 2), ("none, 1 thread", 0, 1), ("1 worker of 1 thread", 1, 1),
            ("2 workers of 1 thread", 2, 1))


def random_model(folder: Path, blocks: int) -> Path:
    """A model with blocks of 1.8 million weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=4096, hidden_size=384, intermediate_size=1024, num_hidden_layers=blocks,
                         num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=512)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def configure(folder: Path, blocks: int, windows: int) -> RunConfig:
    for seed, name in enumerate(("calibration.txt", "evaluation.txt")):
        (folder / name).write_text(made_text(seed, 200_000))
    return RunConfig(model=str(random_model(folder / "model", blocks)), backend="gptq", bits=("2", "4"),
                     estimator="isolated", granularity="group", game_windows=8,
                     calibration=TextConfig(str(folder / "calibration.txt"), windows),
                     evaluation=TextConfig(str(folder / "evaluation.txt"), 8), dtype="float32", device="cpu",
                     prefix="unquantized", tracking_uri="none", output=str(folder / "runs"),
                     options={"backend": {"grid": "min-max"}})


@contextmanager
def session_with(config: RunConfig, workers: int, threads: int, start: dict[int, list[float]]) -> Iterator[Session]:
    """A session with warm workers; the seconds until Ray is there and until the first answer go into ``start``."""
    torch.set_num_threads(threads)
    plugins = Plugins()
    prepared = prepare(replace(config, threads=threads), plugins)
    if not workers:
        yield Session(prepared, plugins)
        return
    crew, began = Ray(), time.monotonic()
    crew.open(str(workers), threads, accelerated=False)
    opened = time.monotonic() - began
    try:
        order, space = order_of(prepared, plugins, NO_TRUST), prepared.game_space
        Session(prepared, plugins).quantize_for_game()
        began = time.monotonic()
        tasks = [{"kind": "losses", "game": "estimate", "set": 0, "picks": space.uniform(k % 2)[None].tolist()}
                 for k in range(workers)]
        list(crew.carry_out(order, tasks))
        start[workers] += [opened, time.monotonic() - began]
        yield Session(prepared, plugins, share=lambda prepared: partial(crew.carry_out, order_of(
            prepared, plugins, NO_TRUST)))
    finally:
        crew.close()


def quantize(session: Session, _number: int) -> None:
    """Every block at both widths."""
    session.quantize_for_game()


def forget_variants(folder: Path) -> None:
    for file in folder.glob("cache/variants/*/*.safetensors"):
        file.unlink()


def permutation(session: Session, number: int, folder: Path) -> None:
    """The losses of one random order of demotions, another one each time."""
    space, prepared = session.prepared.game_space, session.prepared
    path = demotions(space, np.random.default_rng(number).permutation(len(space)))
    log = MeasurementLog(folder / f"{time.monotonic_ns()}.jsonl", prepared.losses_key(space, prepared.game_windows))
    game = session.game(log)
    game.losses(np.concatenate([path, 1 - path]))


def gradients(session: Session, number: int, folder: Path) -> None:
    """One reading of slopes, at other shares each time."""
    from impq_core.ledger import Ledger

    log = Ledger(folder / f"{time.monotonic_ns()}.jsonl", "impq-gradients/2", session.prepared.slopes_key)
    session.probe(log).slopes(np.array([0.5 + number / 64, 0.5 - number / 64]))


def timed(work: Callable[[int], None], repeats: int, before: Callable[[], None] = lambda: None) -> float:
    """The median of seconds, after one that does not count."""
    seconds = []
    for number in range(repeats + 1):
        before()
        began = time.monotonic()
        work(number)
        seconds.append(time.monotonic() - began)
    return statistics.median(seconds[1:])


def sweep(config: RunConfig, workers: int, threads: int, _number: int) -> None:
    """Two estimators and three budgets from the variants in the cache, from start to end."""
    torch.set_num_threads(threads)
    base = replace(config, workers=str(workers), threads=threads)
    run_sweep(Sweep(base, {"estimator": ("isolated", "aumann-shapley"), "budget": ("2.5bits", "3bits", "3.5bits")}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--blocks", type=int, default=4, help="of the model [4]")
    parser.add_argument("--windows", type=int, default=32, help="calibration windows, at least 16 [32]")
    given = parser.parse_args()
    repeats = given.repeats
    seconds: dict[str, dict[str, float]] = {}
    start: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["IMPQ_CACHE"] = str(folder / "cache")
        config = configure(folder, given.blocks, given.windows)
        for name, workers, threads in SETTINGS:
            with session_with(config, workers, threads, start) as session, torch.no_grad():
                seconds.setdefault("quantize (GPTQ)", {})[name] = timed(
                    partial(quantize, session), repeats, partial(forget_variants, folder))
                seconds.setdefault("one permutation and its complement", {})[name] = timed(
                    lambda number, session=session: permutation(session, number, folder), repeats)
                with torch.enable_grad():
                    seconds.setdefault(f"slopes of {given.windows} windows", {})[name] = timed(
                        lambda number, session=session: gradients(session, number, folder), repeats)
                print(name, {work: round(found[name], 2) for work, found in seconds.items()}, flush=True)
        for name, workers, threads in SETTINGS:  # each starts Ray anew
            forget_scores(folder)
            seconds.setdefault("sweep, Ray's start included", {})[name] = timed(
                partial(sweep, config, workers, threads), repeats, partial(forget_scores, folder))
            print(name, round(seconds["sweep, Ray's start included"][name], 2), flush=True)
    lines = heading("Work shared by workers", command())
    lines += [f"Seconds, medians of {repeats}, with ray {version('ray')}; a random model of {given.blocks} blocks with "
              "1.8 million weights each, groups of linears at widths 2 and 4, `--prefix unquantized`. The last columns "
              "are ratios to two workers: above 1, these are faster.", ""]
    rows = [[work, *(f"{found[name]:.2f}" for name, *_ in SETTINGS),
             f"{found['none, 1 thread'] / found['2 workers of 1 thread']:.2f}",
             f"{found['1 worker of 1 thread'] / found['2 workers of 1 thread']:.2f}",
             f"{found['none, 2 threads'] / found['2 workers of 1 thread']:.2f}"] for work, found in seconds.items()]
    lines += table(["work", *(name for name, *_ in SETTINGS), "to none, 1 thread", "to 1 worker", "to none, 2 threads"],
                   rows)
    lines += table(["workers", "Ray is there after, s", "first answers of all after, s"],
                   [[str(workers), f"{opened:.1f}", f"{first:.1f}"] for workers, (opened, first) in start.items()])
    write("workers.md", lines)


def forget_scores(folder: Path) -> None:
    """Forget the scores in the cache."""
    for file in folder.glob("cache/variants/*/score-*.json"):
        file.unlink()


if __name__ == "__main__":
    main()
