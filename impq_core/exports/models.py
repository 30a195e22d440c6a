"""The models of a run or of an exported folder as whole models of transformers in memory, one at a time.

The models of a run are made as an export makes them, quantized block after block, so that what is measured on them is
what the exported files give.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from impq_core.budget import parse_bytes
from impq_core.config import from_data, override
from impq_core.errors import ImpqError, UsageError, nearest
from impq_core.evaluate import allocations_of
from impq_core.exports.export import put_export
from impq_core.exports.manifest import MANIFEST, folder_of, read_manifest
from impq_core.interfaces import Exporter
from impq_core.keys import ModelKey, digest_of
from impq_core.machine import free_device_memory
from impq_core.model.bank import Assignment, Bank
from impq_core.model.quantize import quantize_in_sequence
from impq_core.parts import load_exporter
from impq_core.plugins import Plugins
from impq_core.results import Evaluation
from impq_core.runs.folder import RunFolder
from impq_core.runs.prepare import Prepared, prepare
from impq_core.runs.session import Session
from impq_core.trust import NO_TRUST, Trust

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UNQUANTIZED, PLAN = "unquantized", "plan"
"""Names of the models that a run and an exported folder both have."""


class Models(ABC):
    """The models of a folder. Their weights are loaded when the first of them is asked for.

    Args:
        folder: a run, or an exported folder.
        prepared: its run.
        plugins: the observers of the progress.

    Attributes:
        names: the models, the unquantized one first.
    """

    names: tuple[str, ...] = (UNQUANTIZED, PLAN)

    def __init__(self, folder: Path, prepared: Prepared, plugins: Plugins) -> None:
        self.folder, self.prepared, self.plugins = folder, prepared, plugins
        assert prepared.plan is not None
        self.plan = prepared.plan

    @abstractmethod
    def nbytes(self, name: str) -> int | None:
        """Stored bytes of a model's quantizable weights; None for the unquantized model."""

    @abstractmethod
    def key(self, name: str) -> ModelKey:
        """The identity of a model."""

    @abstractmethod
    def _make(self, name: str) -> Session:
        """A session whose placement has the weights of a model."""

    @contextmanager
    def model(self, name: str) -> Iterator[PreTrainedModel]:
        """A model, for as long as the context lasts; raises ImpqError if its weights cannot be loaded or quantized."""
        session = self._make(name)
        try:
            with session.runner.whole(at_once=_room(session)) as model:
                yield model
        finally:
            session.bank.apply([None] * len(session.bank.layers))

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the models."""
        return self.prepared.source.tokenizer()

    def _facts(self, assignment: Assignment) -> str:
        layers = self.prepared.space.everyone
        return digest_of([[layer.name, str(choice), choice.group_size if choice else 0]
                          for layer, choice in zip(layers, assignment, strict=True)])


class RunModels(Models):
    """The models of a run.

    Args:
        run: a finished run.
        names: those of its table; by default the unquantized model, the plan, and the references of its size.
        plugins: backends and observers.
        trust: what the caller permits.
        device: where blocks compute; the run's device by default.
        memory: what this may take; what the run might by default.

    Raises:
        ImpqError: an error that the user can correct.
        UsageError: a name that is not in the table.
    """

    def __init__(self, run: str | Path, names: Sequence[str], plugins: Plugins, trust: Trust = NO_TRUST,
                 device: str | None = None, memory: str | None = None) -> None:
        folder = RunFolder.open(run, "plan.json", "evaluation.json")
        evaluation = folder.read_evaluation()
        self.names = choose(evaluation, names)
        config = override(folder.read_config(), plan=str(folder.plan), device=device, memory=memory)
        prepared = prepare(config, plugins, trust)
        super().__init__(folder.path, prepared, plugins)
        self._bytes: dict[str, int | None] = {}
        self._layers: dict[str, Assignment] = {}
        self._linears: dict[str, Assignment] = {}
        for name, nbytes, assignment in allocations_of(self.plan, prepared.between, prepared.config.seed):
            self._bytes[name], self._layers[name] = nbytes, assignment
        linears = [linear.name for layer in prepared.space.everyone for linear in layer.linears]
        for mix in prepared.mixes:
            self._bytes[f"mix {mix.name}"] = mix.nbytes
            self._linears[f"mix {mix.name}"] = [mix.choices[linear] for linear in linears]
        if lost := [name for name in self.names if name not in self._bytes]:
            raise ImpqError(f"{run}: its table has a row '{lost[0]}' that this version of impq does not make: leave it "
                            "out with --rows")
        self._session: Session | None = None

    def nbytes(self, name: str) -> int | None:
        """See ``Models``."""
        return self._bytes[name]

    def key(self, name: str) -> ModelKey:
        """See ``Models``."""
        assignment = self._layers.get(name)
        choices = digest_of([str(choice) for choice in self._linears[name]]) if assignment is None else (
            self._facts(assignment))
        return ModelKey(self.prepared.deployed_key, choices,
                        digest_of(asdict(self.prepared.parts.backend.options)) if name != UNQUANTIZED else "")

    def _make(self, name: str) -> Session:
        session = self._session = self._session or Session(self.prepared, self.plugins)
        if name == UNQUANTIZED:
            return session
        bank: Bank = session.bank if name in self._layers else session.bank.of_linears(session.runner)
        bank, backend = bank.without_variants(session.runner), self.prepared.parts.backend
        ids = self.prepared.calibration.ids if backend.needs and self.prepared.calibration else None
        quantize_in_sequence(bank, session.runner, ids, self._layers.get(name) or self._linears[name],
                             session.report("quantize"))
        return session


class ExportedModels(Models):
    """The model of an exported folder, named as the plan that it was made from, and the unquantized model.

    Args:
        folder: as ``impq export`` wrote it.
        plugins: exporters, backends and observers.
        trust: what the caller permits.
        device: where blocks compute.
        memory: what this may take; empty for what is free.

    Raises:
        ImpqError: impq did not write the folder, its format holds no weights, or its model cannot be found.
    """

    def __init__(self, folder: str | Path, plugins: Plugins, trust: Trust = NO_TRUST, device: str = "auto",
                 memory: str = "") -> None:
        folder = Path(folder)
        manifest = read_manifest(folder)
        config = override(from_data(manifest["run"], str(folder / MANIFEST)), plan=str(folder / "plan.json"),
                          device=device, memory=memory)
        self._exporter: Exporter = load_exporter(manifest["exporter"], config.backend,
                                                 config.options.get("backend", {}), plugins)
        if not self._exporter.backends:
            raise ImpqError(f"{folder} is of format '{manifest['exporter']}', which holds no weights: give the run, or "
                            "a folder of another format")
        super().__init__(folder, prepare(config, plugins, trust, calibrate=False), plugins)
        self._session: Session | None = None
        self._replaced = False

    def nbytes(self, name: str) -> int | None:
        """See ``Models``."""
        return None if name == UNQUANTIZED else self.plan.nbytes

    def key(self, name: str) -> ModelKey:
        """See ``Models``."""
        assignment = [None] * len(self.prepared.space.everyone) if name == UNQUANTIZED else (
            self.prepared.space.assignment(self.plan.pick))
        return ModelKey(self.prepared.deployed_key, self._facts(assignment),
                        files="" if name == UNQUANTIZED else self._files)

    @cached_property
    def _files(self) -> str:
        digest = hashlib.sha256()
        for file in sorted(self._exporter.files(self.folder)):
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()[:20]

    def _make(self, name: str) -> Session:
        if self._session is None or (self._replaced and name == UNQUANTIZED):
            self._session, self._replaced = None, False  # the memory of the one before ends first
            self._session = Session(self.prepared, self.plugins)
        session = self._session
        if name != UNQUANTIZED:
            if not self._replaced:
                self._assignment = put_export(session, self._exporter, self.plan, self.folder)
                self._replaced = True
            session.bank.apply(self._assignment)
        return session


def models_of(path: str | Path, names: Sequence[str], plugins: Plugins, trust: Trust = NO_TRUST,
              device: str | None = None, memory: str | None = None) -> Models:
    """The models of a run, or of an exported folder or its file.

    Args:
        path: a run folder, an exported folder, or a file in one.
        names: of the models; those of ``Models`` by default.
        plugins: parts and observers.
        trust: what the caller permits.
        device: where blocks compute; the run's, or ``auto`` for an exported folder, by default.
        memory: what this may take.

    Raises:
        ImpqError: the path is none of these, or an error in it that the user can correct.
        UsageError: a name that the path does not have.
    """
    folder = folder_of(path)
    if not (folder / MANIFEST).is_file():
        return RunModels(folder, names, plugins, trust, device, memory)
    models = ExportedModels(folder, plugins, trust, device or "auto", memory or "")
    for name in names:
        _require(name, models.names)
    models.names = tuple(dict.fromkeys(names)) or models.names
    return models


def choose(evaluation: Evaluation, names: Sequence[str]) -> tuple[str, ...]:
    """Rows of a run's table, the unquantized model and the plan first.

    Args:
        evaluation: the table.
        names: the rows; empty for those that a plan of its size is compared with: the uniform models next to it in
            size, first/last high, the best random plan, and the mix next to it in size.

    Raises:
        UsageError: a name that the table does not have.
    """
    measured = [row for row in evaluation.rows if row.score is not None]
    wanted = list(dict.fromkeys(names))
    for name in wanted:
        _require(name, [row.name for row in measured])
    if wanted:
        return tuple(sorted(wanted, key=lambda name: [UNQUANTIZED, PLAN, name].index(name)))
    size = measured[0].nbytes
    assert size is not None
    sizes = {row.name: row.nbytes for row in measured if row.nbytes is not None}
    uniform = [name for name in sizes if name.startswith("uniform ")]
    below = sorted((name for name in uniform if sizes[name] <= size), key=lambda name: -sizes[name])
    above = sorted((name for name in uniform if sizes[name] >= size), key=lambda name: sizes[name])
    random = sorted((row for row in measured if row.kind == "random"), key=lambda row: row.nll)
    mixes = sorted((name for name in sizes if name.startswith("mix ")), key=lambda name: abs(sizes[name] - size))
    others = [*above[:1], *below[:1], *mixes[:1], *(name for name in sizes if name == "first/last high"),
              *(row.name for row in random[:1])]
    return (UNQUANTIZED, PLAN, *dict.fromkeys(others))


def _require(name: str, names: Sequence[str]) -> None:
    if name not in names:
        raise UsageError(f"no row is named '{name}'{nearest(name, names)}")


def _room(session: Session) -> bool:
    """Whether the weights of all blocks can be unpacked at once: half of the memory that is free is left."""
    runner = session.runner
    if runner.placement.streamed:
        return False
    config = session.prepared.config
    blocks: Mapping[Any, None] = dict.fromkeys(parameter for block in runner.blocks for parameter in block.parameters())
    once = sum(parameter.numel() * parameter.element_size() for parameter in blocks)
    free = free_device_memory(session.device)
    if config.memory:
        given = parse_bytes(config.memory, "memory") - once
        free = given if free is None else min(free, given)
    return free is None or once <= free // 2
