"""Plans from files that other software made."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from impq_core.errors import ImpqError
from impq_core.interfaces import Backend
from impq_core.model.ends import end_layers
from impq_core.model.layers import by_size, layers_of, search_space
from impq_core.model.source import locate_model
from impq_core.parts import named_choice
from impq_core.plugins import Plugins
from impq_core.trust import NO_TRUST, Trust
from impq_core.types import Plan


def import_plan(file: Path, model: str, backend: str, plugins: Plugins, trust: Trust = NO_TRUST,
                embeddings: bool = False) -> Plan:
    """The choices that a file of other software has for the linears of a model, as a plan of single linears.

    Args:
        file: a file in a format that the backend reads.
        model: the unquantized model: demo, a folder or a hub name.
        backend: name of the backend whose choices they are.
        plugins: the source of the backend.
        trust: the permissions of the command line.
        embeddings: whether embedding and head are in the plan, too.

    Raises:
        ImpqError: the backend reads no files, or the file cannot be read, or is of another model.
    """
    part: Backend = plugins.load("backend", backend, Backend)()
    if type(part).read_types is Backend.read_types:
        raise ImpqError(f"backend '{backend}' reads no plans from files of other software")
    skeleton = locate_model(model, trust.remote_code).skeleton()
    layers = layers_of(skeleton, "linear") + (end_layers(skeleton) if embeddings else ())
    names = part.read_types(file, [linear for layer in layers for linear in layer.linears])
    choices = {linear: named_choice(part, backend, name) for linear, name in names.items()}
    space = search_space(layers, part, by_size(layers, part, list(dict.fromkeys(choices.values())), ()))
    pick = np.array([space.choices.index(choices[layer.name]) for layer in space.layers], dtype=np.int64)
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return Plan(space, pick, space.bytes_of(pick), method=f"imported from {file.name}",
                provenance={"file": file.name, "sha256": digest, "backend": backend, "model": model})
