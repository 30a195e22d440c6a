"""Keys: the facts that decide a variant, a loss, a slope, an evaluation score or a run, one dataclass each.

Two results may be compared, reused or continued only if their keys are equal. A key is stored as JSON with its result;
``diff`` names the facts that have changed since.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from impq_core.errors import ImpqError
from impq_core.interfaces import InputFile, Part

LIBRARIES = ("torch", "transformers", "numpy")
"""Libraries that every number depends on."""

MAKES_VARIANTS = ("interfaces", "space.py", "model")
"""Modules and packages of ``impq_core`` whose source decides a variant, beside the backend's own package."""

LABEL = "label"
"""The field that describes a key to a reader; it is no part of digest and diff."""

OPAQUE = ("options", "parts")
"""Fields whose inner names are chosen by plugins: there, a field named ``LABEL`` is an option and is compared."""


@dataclass(frozen=True)
class Change:
    """A fact that differs between two keys: its name, and both values as JSON."""

    name: str
    before: str
    now: str

    @property
    def is_digest(self) -> bool:
        """Whether the values are hex digests."""
        return bool(re.fullmatch('"[0-9a-f]{16,}"', self.now))


@dataclass(frozen=True)
class Key:
    """Base class of the keys. Fields are plain data or keys."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    @property
    def digest(self) -> str:
        """Hex digest of all fields but the label."""
        return digest_of(_unlabelled(self.to_dict()))

    def diff(self, stored: Mapping[str, Any]) -> list[Change]:
        """The facts in which a stored key (``to_dict``'s data) differs from this one; labels are not compared."""
        changes = _changes(_unlabelled(stored), _unlabelled(self.to_dict()))
        # A fact such as the code is in several nested keys; it is named once.
        return list({(change.name.rpartition(".")[2], change.before, change.now): change
                     for change in reversed(list(changes))}.values())[::-1]

    def require(self, stored: Mapping[str, Any], where: str) -> None:
        """Raises ImpqError, which names the first fact that changed, if a stored key differs from this one."""
        if changes := sorted(self.diff(stored), key=lambda change: change.is_digest):  # readable facts first
            first, more = changes[0], f" (and {len(changes) - 1} more)" if len(changes) > 1 else ""
            raise ImpqError(f"{where} cannot be continued: {first.name} was {first.before[:80]} and is now "
                            f"{first.now[:80]}{more}; start a new run, or restore the earlier state")


@dataclass(frozen=True)
class TextKey(Key):
    """Token windows.

    Args:
        tokens: digest of the token ids.
        label: how the text was read.
    """

    tokens: str
    label: str = ""


@dataclass(frozen=True)
class VariantsKey(Key):
    """The variants of one model by one backend.

    Args:
        model_digest: of configuration, weights and code of the model.
        dtype: of the forwards.
        device: hardware of the forwards: sums on different hardware differ in their last bits.
        backend: module of the backend.
        options: of the backend.
        versions: of impq and of the libraries that the variants depend on.
        code: digest of the source that makes variants.
        calibration: text of the statistics; None for a backend that needs none.
        prefix: digest of the choices of all linears with which statistics are collected; empty for such a backend.
        label: the model's name.
    """

    model_digest: str
    dtype: str
    device: str
    backend: str
    options: Mapping[str, Any]
    versions: Mapping[str, str]
    code: str
    calibration: TextKey | None = None
    prefix: str = ""
    label: str = ""


@dataclass(frozen=True)
class LossesKey(Key):
    """Losses of picks in a game.

    Args:
        variants: those that are measured.
        space: fingerprint of the search space that picks index.
        value: ``nll`` or ``kl``.
        code: digest of impq's source.
        calibration: all windows, from which further sets of windows are drawn.
        game: the windows of the first set.
    """

    variants: VariantsKey
    space: str
    value: str
    code: str
    calibration: TextKey | None = None
    game: TextKey | None = None


@dataclass(frozen=True)
class SlopesKey(Key):
    """Gradients of a game's loss: ``losses`` as in the game, and ``probe``, the windows on which gradients are read."""

    losses: LossesKey
    probe: TextKey | None = None


@dataclass(frozen=True)
class ScoresKey(Key):
    """Evaluation scores of allocations: the deployed ``variants``, the ``evaluation`` windows, the names of the
    ``layers``, in the order of an allocation's choices, and how they are quantized in ``sequence``, if they are."""

    variants: VariantsKey
    evaluation: TextKey
    layers: tuple[str, ...]
    sequence: str = ""


@dataclass(frozen=True)
class ModelKey(Key):
    """A whole model, as it answers questions.

    Args:
        variants: the deployed ones; of an exported folder, without calibration.
        choices: digest of the choice of each layer, by its name.
        sequence: identity of how the model is quantized in sequence; empty for an exported folder.
        files: digest of the files of an exported folder; empty for a run.
    """

    variants: VariantsKey
    choices: str
    sequence: str = ""
    files: str = ""


@dataclass(frozen=True)
class TaskKey(Key):
    """Scores of a model on a task.

    Args:
        model: that was measured.
        task: digest of the task: its definition and its documents.
        limit: number of documents; None for all.
        fewshot: number of examples in a prompt; None for what the task says.
        chat: whether prompts went through the model's chat template.
        batch_size: of the forwards.
        versions: of the software that measured.
    """

    model: ModelKey
    task: str
    limit: int | None
    fewshot: int | None
    chat: bool
    batch_size: int
    versions: Mapping[str, str]


@dataclass(frozen=True)
class AnswerKey(Key):
    """An answer of two models to a prompt: the ``models``, the token ids of the ``prompt`` as a digest, and the most
    ``tokens`` of an answer."""

    models: tuple[ModelKey, ...]
    prompt: str
    tokens: int


@dataclass(frozen=True)
class RunKey(Key):
    """A run: every fact that decides its estimate, plan and table.

    Args:
        losses: of the game that the estimator plays.
        deployed: variants of which the plan is made.
        evaluation: the evaluation windows.
        space: fingerprint of the deployed search space.
        budget_bytes: of the plan.
        parts: name, options and digests of the input files of each part, by slot.
        code: digest of the source of impq and of the parts.
        seed: of every random draw but those of the texts.
        refine: full-model forwards of the refiner.
        held_back: number of calibration windows on which the plan is tested against a uniform model; 0 for no test.
        plan_given: digest of the pick of ``--plan``; empty if the run makes its own plan.
        limits: of the costs of meters, as the user wrote them.
        meterings: digest of what the meters found; empty without meters.
    """

    losses: LossesKey
    deployed: VariantsKey
    evaluation: TextKey
    space: str
    budget_bytes: int
    parts: Mapping[str, Any]
    code: str
    seed: int
    refine: int
    held_back: int
    plan_given: str
    limits: Mapping[str, str]
    meterings: str


@dataclass(frozen=True)
class SweepKey(Key):
    """A sweep: the names of its ``runs``, in order."""

    runs: tuple[str, ...]


def part_facts(name: str, part: Part) -> dict[str, Any]:
    """Name and options of a part, and the digest of each file that an option names.

    Raises:
        ImpqError: such a file cannot be read.
    """
    options, files = asdict(part.options), {}
    for option, value in options.items():
        if isinstance(value, InputFile) and value:
            try:
                files[option] = hashlib.sha256(Path(value).read_bytes()).hexdigest()[:16]
            except OSError as error:
                raise ImpqError(f"option {option} of '{name}': {value} cannot be read: {error.strerror}") from error
    return {"name": name, "options": {key: value for key, value in options.items() if key not in files}, "files": files}


def versions(libraries: Iterable[str] = ()) -> dict[str, str]:
    """Versions of impq, of ``LIBRARIES`` and of further libraries, by their import names."""
    return {name: _version(name) for name in ("impq", *LIBRARIES, *sorted(libraries))}


def code_digest(*parts: Part | None, core: Iterable[str] = (".",)) -> str:
    """Hex digest of impq's source and of the source of the packages that define the parts.

    Args:
        parts: None is skipped.
        core: files and packages of ``impq_core``; all by default.

    Raises:
        ImpqError: the source of a part cannot be found.
    """
    found = hashlib.sha256()
    for place in core:
        _add_source(found, Path(__file__).parent / place)
    for package in sorted({type(part).__module__.partition(".")[0] for part in parts if part} - {"impq_core"}):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ImpqError(f"the source of the package '{package}' cannot be found")
        file = Path(spec.origin)
        _add_source(found, file.parent if file.name == "__init__.py" else file)
    return found.hexdigest()[:16]


def _add_source(digest: Any, place: Path) -> None:
    for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
        digest.update(file.name.encode() + file.read_bytes())


def digest_of(data: Any) -> str:
    """Hex digest of plain data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:20]


def _unlabelled(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {name: value if name in OPAQUE else _unlabelled(value) for name, value in data.items() if name != LABEL}
    return data


def _changes(before: Any, now: Any, name: str = "") -> Iterator[Change]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in {**before, **now}:
            yield from _changes(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))
    elif before != now:
        yield Change(name.replace("_", " "), json.dumps(before), json.dumps(now))


@functools.cache  # a process keeps the libraries that it has loaded; every key asks again
def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:  # installed under another name, or not at all
        names = importlib.metadata.packages_distributions().get(library.partition(".")[0], [""])
        return importlib.metadata.version(names[0]) if names[0] else "unknown"
