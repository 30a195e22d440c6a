"""The size of the file that an export writes, known from shapes before anything is quantized (``--whole``)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np
import torch

from impq_core.budget import FileAccount
from impq_core.config import RunConfig
from impq_core.errors import ImpqError, UsageError, one_line
from impq_core.interfaces import EVERY_BACKEND, Backend, Checkpoint, Exporter
from impq_core.model.outline import outline, stored_widths
from impq_core.model.source import ModelSource
from impq_core.parts import Parts, load_exporter, require_ends
from impq_core.plugins import Plugins
from impq_core.space import IntArray, SearchSpace
from impq_core.types import Plan


@dataclass(frozen=True, eq=False)
class WholeFile:
    """The files of the installed formats that are made for a run's backend, or, if none of them holds its plans, of
    those for every backend; a size is that of the largest.

    Args:
        formats: exporters by name, at least one.
        backend: of the plans.
        checkpoint: of the smallest plan, without variants and with its other tensors on the meta device.
        unquantized: bytes of the model's tensors in the dtype of the run.
    """

    formats: Mapping[str, Exporter]
    backend: Backend
    checkpoint: Checkpoint
    unquantized: int

    def promise(self, plan: Plan) -> int:
        """The most bytes of the file of a plan of the same space; raises ImpqError if a format does not hold it."""
        return self._promise(tuple(plan.pick.tolist()))

    @cached_property
    def _promise(self) -> Callable[[tuple[int, ...]], int]:
        @cache
        def promise(pick: tuple[int, ...]) -> int:
            checkpoint = self._of(_plan(self.checkpoint.plan.space, np.array(pick)))
            return max(exporter.file_bytes(checkpoint) for exporter in self.formats.values())
        return promise

    @cached_property
    def account(self) -> FileAccount:
        """What the file has beside the bytes of a plan.

        What a format adds to a plan's bytes or takes off them is largest at the same width for every layer, so the most
        of it is that of a uniform plan; but for the gaps in front of tensors, which are counted in full.
        """
        space = self.checkpoint.plan.space
        plans = [_plan(space, space.uniform(k)) for k in range(len(space.choices))]
        gaps = (max(exporter.alignment for exporter in self.formats.values()) - 1) * len(self.checkpoint.specs)
        return FileAccount(max(self.promise(plan) - plan.nbytes for plan in plans) + gaps, self.unquantized)

    def _of(self, plan: Plan) -> Checkpoint:
        widths = stored_widths(plan, self.backend)
        return replace(self.checkpoint, plan=plan,
                       widths={name: widths[spec.name] for name, spec in self.checkpoint.specs.items()})


def whole_file(config: RunConfig, parts: Parts, plugins: Plugins, source: ModelSource, space: SearchSpace,
               ends: Collection[str], dtype: torch.dtype, item: int) -> WholeFile:
    """The file of a run's plans.

    Args:
        config: of the run.
        parts: its parts.
        plugins: the source of the formats.
        source: the model's files.
        space: layers and choices of the plans.
        ends: names of the layers that are the embedding and the head.
        dtype: of the run.
        item: bytes of a number that stays unquantized.

    Raises:
        UsageError: no installed format holds the plans.
    """
    plan = _plan(space, space.uniform(len(space.choices) - 1))
    options = parts.options().get("backend", {})
    checkpoint = outline(source, source.without_weights(), plan, config.backend, parts.backend, dtype)
    own, general, reason = dict[str, Exporter](), dict[str, Exporter](), "none is of that backend"
    for name in plugins.names("exporter"):
        try:
            exporter = load_exporter(name, config.backend, options, plugins)
        except ImpqError:
            continue
        if not exporter.backends or not exporter.packed:
            continue
        try:
            for layer in ends:
                if plan.widths()[layer]:
                    require_ends(exporter, name, layer)
            exporter.file_bytes(checkpoint)
        except ImpqError as error:
            reason = one_line(error)
        else:
            (general if exporter.backends == EVERY_BACKEND else own)[name] = exporter
    formats = own or general
    if not formats:
        raise UsageError(f"--whole bounds the file of an export, and no installed format holds plans of backend "
                         f"{config.backend}: {reason}")
    planned = sum(spec.parameters for name, spec in checkpoint.specs.items() if checkpoint.widths[name])
    dense = sum(tensor.numel() * tensor.element_size() for tensor in checkpoint.dense.values())
    return WholeFile(formats, parts.backend, checkpoint, dense + item * planned)


def _plan(space: SearchSpace, pick: IntArray) -> Plan:
    return Plan(space, pick, space.bytes_of(pick))
