"""The models of a run or of an exported folder as whole models of transformers in memory, one at a time.

The models of a run are made as an export makes them, quantized block after block, so that what is measured on them is
what the exported files give.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from impq_core.budget import parse_bytes
from impq_core.config import RunConfig, from_data, override, unmetered
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
from impq_core.runs.orders import with_workers
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
        prepared: its run, with its plan.
        plugins: the observers of the progress.
        session: the model of the run, if it is loaded.

    Attributes:
        names: the models, the unquantized one first.
    """

    names: tuple[str, ...] = (UNQUANTIZED, PLAN)

    def __init__(self, folder: Path, prepared: Prepared, plugins: Plugins, session: Session | None = None) -> None:
        self.folder, self.prepared, self.plugins, self._session = folder, prepared, plugins, session
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
        folder: a finished run.
        names: those of its table; by default the unquantized model, the plan, and the references of its size.
        prepared, plugins, session: see ``Models``.

    Raises:
        ImpqError: the table has a row that this version of impq does not make.
        UsageError: a name that is not in the table.
    """

    def __init__(self, folder: Path, names: Sequence[str], prepared: Prepared, plugins: Plugins,
                 session: Session | None = None) -> None:
        super().__init__(folder, prepared, plugins, session)
        self.names = choose(RunFolder(folder).read_evaluation(), names)
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
            raise ImpqError(f"{folder}: its table has a row '{lost[0]}' that this version of impq does not make: leave "
                            "it out with --row")

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
        names: of the models; both by default.
        exporter: of its format.
        prepared, plugins, session: see ``Models``.

    Raises:
        UsageError: a name that is of neither.
    """

    def __init__(self, folder: Path, names: Sequence[str], exporter: Exporter, prepared: Prepared, plugins: Plugins,
                 session: Session | None = None) -> None:
        super().__init__(folder, prepared, plugins, session)
        for name in names:
            _require(name, self.names)
        self.names = tuple(dict.fromkeys(names)) or self.names
        self._exporter, self._replaced = exporter, False

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
              device: str | None = None, memory: str | None = None, workers: str | None = None,
              threads: int | None = None) -> Models:
    """The models of a run, or of an exported folder or its file.

    Args:
        path: a run folder, an exported folder, or a file in one.
        names: of the models; those of ``Models`` by default.
        plugins: parts and observers.
        trust: what the caller permits.
        device: where blocks compute; the run's, or ``auto`` for an exported folder, by default.
        memory: what this may take.
        workers: processes that share the work; the run's, or none for an exported folder, by default.
        threads: of the processor for each process; the run's by default.

    Raises:
        ImpqError: the path is none of these, its format holds no weights, or an error in it that the user can correct.
        UsageError: a name that the path does not have.
    """
    folder = folder_of(path)
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        config = replace(from_data(manifest["run"], str(folder / MANIFEST)), workers="", plan=str(folder / "plan.json"))
        _exporter_of(folder, config, plugins)
        device, memory, calibrate = device or "auto", memory or "", False
    else:
        config, calibrate = RunFolder(folder).read_config(), True
        config = replace(config, plan=str(RunFolder(folder).plan))
        choose(RunFolder(folder).read_evaluation(), names)
    # No variant is taken from the cache, so a run without one can have workers.
    config = override(unmetered(config), device=device, memory=memory, cache=True if workers else None)
    config = with_workers(config, workers or "", threads or 0)
    return models_in(folder.absolute(), names, prepare(config, plugins, trust, calibrate=calibrate), plugins)


def models_in(folder: Path, names: Sequence[str], prepared: Prepared, plugins: Plugins,
              session: Session | None = None) -> Models:
    """As ``models_of``, of a prepared run.

    Args:
        folder: a run folder, or an exported folder.
        names: of the models; those of ``Models`` by default.
        prepared: the run, with its plan.
        plugins: parts and observers.
        session: the model of the run, if it is loaded. An exported folder may take its weights' place.
    """
    if (folder / MANIFEST).is_file():
        return ExportedModels(folder, names, _exporter_of(folder, prepared.config, plugins), prepared, plugins, session)
    return RunModels(folder, names, prepared, plugins, session)


def _exporter_of(folder: Path, config: RunConfig, plugins: Plugins) -> Exporter:
    """The exporter of an exported folder; raises ImpqError if its format holds no weights."""
    name = read_manifest(folder)["exporter"]
    exporter = load_exporter(name, config.backend, config.options.get("backend", {}), plugins)
    if not exporter.backends:
        raise ImpqError(f"{folder} is of format '{name}', which holds no weights: give the run, or a folder of another "
                        "format")
    return exporter


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
