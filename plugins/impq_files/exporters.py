"""The formats ``impq`` and ``dense``, which hold the plans of every backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from impq_core.errors import ImpqError
from impq_core.exports.checkpoint import SafetensorsExporter, open_model, write_model
from impq_core.exports.packed import LONGEST_NAME, MOST_TENSORS, WEIGHTS, quantization_config, tensors_of, variants_of
from impq_core.interfaces import EVERY_BACKEND, Checkpoint, Variant
from impq_core.space import Choice

if TYPE_CHECKING:
    import torch


class ImpqExporter(SafetensorsExporter):
    """The tensors of every variant as its backend made them, in ``impq.safetensors``: codes, codebooks, indices,
    outliers ..., byte for byte what the plan counts. ``impq_core.load_quantized`` makes a model of transformers of it.

    A tensor ``codes`` of the linear ``model.layers.0.mlp.up_proj`` is ``model.layers.0.mlp.up_proj.weight.codes``.
    config.json has the backend with its options, and the choice and shape of every linear. The file has a name that
    other software does not look for, because transformers would load a model of random weights in place of these.
    """

    backends = EVERY_BACKEND
    holds_ends = True
    weights = WEIGHTS

    def parts(self, choice: Choice) -> Mapping[str, str]:
        """Names as many and as long as a variant's may be: they are known when it has been quantized."""
        return {str(number): f"weight.{number:0{LONGEST_NAME}}" for number in range(MOST_TENSORS)}

    def export(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Write impq.safetensors and config.json."""
        tensors = dict(checkpoint.dense)
        for name, variant in checkpoint.variants.items():
            tensors |= tensors_of(name, variant)
        write_model(folder, tensors, {**checkpoint.config, "quantization_config": quantization_config(checkpoint)},
                    self.weights)

    def restore(self, folder: Path, checkpoint: Checkpoint) -> Mapping[str, Variant]:
        """Read the packed linears; raises ImpqError if the file lacks one."""
        choices = {name: choice for name, choice in checkpoint.widths.items() if choice is not None}
        with open_model(folder, self.weights) as file:
            return variants_of(file, choices)


class DenseExporter(SafetensorsExporter):
    """The model's own form with the quantized values at 16 bits, which everything loads that loads the model.

    Such a file is as large as that of the unquantized model: it shows what a plan does, in any software, and takes no
    less memory there. Values are stored in the dtype of the run, or that of the model's files if it is the narrower
    one, or in float16 if both are float32.
    """

    backends = EVERY_BACKEND
    packed = False
    holds_ends = True

    def parts(self, choice: Choice) -> Mapping[str, str]:
        """None: quantized linears are among the dense tensors."""
        return {}

    def variant_bytes(self, checkpoint: Checkpoint) -> int:
        """0: quantized linears are among the dense tensors."""
        return 0

    def export(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Write model.safetensors and config.json."""
        write_model(folder, checkpoint.dense, checkpoint.config)

    def restore(self, folder: Path, checkpoint: Checkpoint) -> Mapping[str, Variant]:
        """None."""
        return {}

    def dense(self, folder: Path, checkpoint: Checkpoint) -> Mapping[str, Callable[[], torch.Tensor]]:
        """Functions that map a tensor of the file; raises ImpqError also if the file lacks the weight of a quantized
        linear."""
        found = super().dense(folder, checkpoint)
        for name, choice in checkpoint.widths.items():
            if choice is not None and f"{name}.weight" not in found:
                raise ImpqError(f"{folder / self.weights} has no tensor {name}.weight: export the run again")
        return found
