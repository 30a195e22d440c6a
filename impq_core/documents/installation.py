"""Documents of an installation: components, checks, the cache, files that were written."""

from __future__ import annotations

from dataclasses import dataclass

from impq_core.documents.base import Document


@dataclass(frozen=True)
class OptionDocument:
    """An option of a component.

    Args:
        name: what ``-o NAME=VALUE`` takes.
        default: its default, as text.
        description: what it does.
    """

    name: str
    default: str
    description: str


@dataclass(frozen=True)
class ComponentDocument:
    """A component that a plugin offers.

    Args:
        role: ``estimator``, ``surrogate``, ``allocator``, ``backend``, ``refiner``, ``exporter``, ``meter`` or
            ``crew``.
        name: its name.
        summary: what it is.
        origin: distribution and plugin, or the plugin file.
        remedy: what has to be installed first; null if it can be used.
        options: its options; empty without ``--options``.
    """

    role: str
    name: str
    summary: str
    origin: str
    remedy: str | None
    options: list[OptionDocument]


@dataclass(frozen=True)
class DroppedDocument:
    """A plugin or a component that is not used.

    Args:
        name: its name.
        reason: why.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class PluginsDocument(Document):
    """The components of all plugins.

    Args:
        components: by role.
        dropped: what is not used.
    """

    kind = "plugins"

    components: list[ComponentDocument]
    dropped: list[DroppedDocument]


@dataclass(frozen=True)
class FindingDocument:
    """A finding of a check.

    Args:
        state: ``ok``, ``note`` (needs no action), ``wrong`` or ``fixed``.
        what: what was found.
    """

    state: str
    what: str


@dataclass(frozen=True)
class DoctorDocument(Document):
    """The checks of an installation.

    Args:
        ok: whether nothing is wrong; if it is false, the exit code is 1.
        findings: in the order of the checks.
    """

    kind = "doctor"

    ok: bool
    findings: list[FindingDocument]


@dataclass(frozen=True)
class ShelfDocument:
    """Variants of one model by one backend in the cache.

    Args:
        folder: of their files.
        model: its name or folder.
        backend: name of the module of the backend.
        options: of the backend, by name, as text.
        variants: number of stored linears.
        scores: number of stored held-out scores.
        size_bytes: bytes on disk.
        used: time of the last use, seconds since 1970.
    """

    folder: str
    model: str
    backend: str
    options: dict[str, str]
    variants: int
    scores: int
    size_bytes: int
    used: float


@dataclass(frozen=True)
class CacheDocument(Document):
    """The variants and scores in the cache.

    Args:
        folder: of the cache.
        shelves: one for each combination of model, backend, options and texts.
    """

    kind = "cache"

    folder: str
    shelves: list[ShelfDocument]


@dataclass(frozen=True)
class PrunedDocument(Document):
    """What was deleted from the cache.

    Args:
        folders: of the variants that were deleted.
        freed_bytes: bytes that they took.
    """

    kind = "pruned"

    folders: list[str]
    freed_bytes: int


@dataclass(frozen=True)
class WrittenDocument(Document):
    """Files that a command wrote.

    Args:
        files: their paths.
    """

    kind = "written"

    files: list[str]


@dataclass(frozen=True)
class RotatedDocument(Document):
    """A rotated model in a folder.

    Args:
        folder: the folder.
        dtype: in which matrices are stored.
        block: size of the Hadamard blocks of the hidden states; 0 if they were not rotated.
        attentions: blocks whose values and outputs were rotated.
        difference: largest difference of a logit in float32, relative to the largest logit.
        rounding_nats: divergence from the original model that storing the weights in ``dtype`` costs, nats per token.
        untied_bytes: bytes of the head if it was tied; else 0.
        file_bytes: bytes of the files with the weights.
    """

    kind = "rotated"

    folder: str
    dtype: str
    block: int
    attentions: int
    difference: float | None
    rounding_nats: float | None
    untied_bytes: int
    file_bytes: int
