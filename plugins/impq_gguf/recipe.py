"""The recipe for llama-quantize: a type for every tensor, no weights."""

from __future__ import annotations

import re
from pathlib import Path

from impq_core.errors import ImpqError
from impq_core.files import write_text
from impq_core.interfaces import Checkpoint, Exporter
from impq_gguf.layout import one_type
from impq_gguf.names import architecture_of, gguf_places, text_config, text_name


class LlamaCppRecipe(Exporter):
    """Lines ``tensor=type`` for ``llama-quantize --tensor-type-file``, of a plan of backend ``gguf``.

    The types are those that the plan has in impq, stand-ins for rows of other lengths included. llama-quantize makes
    the weights again, from its own importance matrix and the unquantized prefix.
    """

    def export(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Write tensor-types.txt.

        Raises:
            ImpqError: the plan is of another backend, llama.cpp does not know the architecture or a linear, or the
                experts of a block have several types.
        """
        if checkpoint.backend != "gguf":
            raise ImpqError(f"recipe-llama.cpp needs llama.cpp's types, and the plan is one of backend "
                            f"{checkpoint.backend}: run with --backend gguf")
        settings = text_config(checkpoint.config)
        architecture, wrapped = architecture_of(settings), settings is not checkpoint.config
        types = {(text_name(f"{name}.weight") if wrapped else None) or f"{name}.weight":
                 choice.name if choice else "F16" for name, choice in checkpoint.widths.items()}
        tensors: dict[str, set[str]] = {}
        for name, place in gguf_places(architecture.name, int(settings["num_hidden_layers"]), types).items():
            tensors.setdefault(place.name, set()).add(types[name])
        lines = [f"^{re.escape(name)}$={one_type(name, kinds).lower()}" for name, kinds in tensors.items()]
        write_text(folder / "tensor-types.txt", "\n".join(lines) + "\n")
