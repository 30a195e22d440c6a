"""The meter of llama.cpp's kernels: milliseconds of a generated token on this processor."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from impq_core.errors import UsageError
from impq_core.interfaces import Form, Meter, Readings, Stored
from impq_core.space import Choice
from impq_gguf.types import TYPES

DENSE = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""The types of matrices that are not quantized, by the dtype of the run."""


@dataclass(frozen=True)
class Options:
    """Options of the meter of llama.cpp's kernels.

    Args:
        threads: of llama.cpp; 0 for as many as torch uses here.
        repeats: repetitions, of which the median counts.
        rest: milliseconds of a token that are no product with a weight: attention, norms, sampling.
    """

    threads: int = 0
    repeats: int = 20
    rest: float = 0.0

    def __post_init__(self) -> None:
        if self.threads < 0 or self.repeats < 3 or self.rest < 0:
            raise ValueError("threads and rest must not be negative, and repeats must be at least 3")


class LlamaCpp(Meter):
    """The time of llama.cpp's own kernels for the shapes and types of a model, on this processor: the products with one
    token's hidden state, as in generation.

    The time of a plan is the sum of its products; a routed expert counts by the share of tokens that choose it. Kernels
    are measured one after the other, so what the threads lose between them in a real graph is not in the sum.
    """

    Options = Options
    cost = "latency"
    unit = "ms"

    def check(self, choices: Sequence[Choice]) -> None:
        """Raises UsageError if a choice is no type of llama.cpp."""
        for choice in choices:
            if choice.name not in TYPES:
                raise UsageError(f"meter llamacpp times the types of llama.cpp, and {choice} is none: take it with "
                                 "--backend gguf")

    def read(self, forms: Sequence[Form], dtype: str, progress: Callable[[int, int], None]) -> Readings:
        """The time of each form, and its standard error as if all errors had one sign."""
        from impq_gguf.kernels import Kernel, time_kernels

        def kernel(stored: Stored) -> Kernel:
            name = stored.choice.name if stored.choice else DENSE[dtype]
            return Kernel(stored.linear.rows, stored.linear.columns, name)

        kernels = list(dict.fromkeys(kernel(stored) for form in forms for stored in form.linears))
        threads = self.options.threads or _threads()
        times = time_kernels(kernels, threads, self.options.repeats, _model_bytes(forms), progress)
        at = {each: number for number, each in enumerate(kernels)}
        weights = np.zeros((len(forms), len(kernels)))
        for row, form in enumerate(forms):
            for stored in form.linears:
                weights[row, at[kernel(stored)]] += stored.reads
        rest = "" if self.options.rest else ", without attention, norms and sampling (option rest)"
        note = (f"medians of {self.options.repeats} runs of llama.cpp's kernels, {threads} "
                f"thread{'s' * (threads > 1)} on {platform.processor() or platform.machine()}{rest}")
        return Readings(weights @ times.medians, weights @ times.stderr, self.options.rest, notes=(note,))


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _model_bytes(forms: Sequence[Form]) -> int:
    """Bytes that a token reads of a model in the middle of the menu."""
    sizes: dict[str, list[float]] = {}
    for form in forms:
        if form.choice is not None or len(form.linears) == 1:
            sizes.setdefault(form.layer.name, []).append(sum(each.nbytes * each.reads for each in form.linears))
    return round(sum(sum(each) / len(each) for each in sizes.values()))
