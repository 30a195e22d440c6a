"""The format ``impq``: the tensors of any backend's variants in a safetensors file, and the loader that unpacks them.

Nothing in such a folder is code or pickled. The backend named in config.json is taken from the installed plugins.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from impq_core.errors import ImpqError, one_line
from impq_core.exports.checkpoint import module_names, open_model
from impq_core.interfaces import Backend, Checkpoint, InputFile, Variant
from impq_core.plugins import Plugins, build_options
from impq_core.space import Choice, LinearSpec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

METHOD = "impq"
"""``quant_method`` of the format."""

FORMAT = "impq-weights/1"
"""Version of the format."""

WEIGHTS = "impq.safetensors"
"""The file that holds every tensor."""

MOST_TENSORS, LONGEST_NAME = 10, 16
"""Number of tensors of a variant, and of characters of their names, that the size of the file is promised for."""


def quantization_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The ``quantization_config`` of the format: backend, options, and the choice and shape of every quantized linear
    by its name in the file. Options that name files are left out: unpacking reads none."""
    modules = module_names(checkpoint)
    linears = {}
    for name, choice in checkpoint.widths.items():
        if choice is not None:
            spec = checkpoint.specs[name]
            linears[name] = {"bits": choice.bits, "group_size": choice.group_size, "name": choice.name,
                             "rows": spec.rows, "columns": spec.columns, "module": modules[name]}
    options = {key: value for key, value in checkpoint.options.items() if not isinstance(value, InputFile)}
    return {"quant_method": METHOD, "format": FORMAT, "backend": checkpoint.backend, "options": options,
            "linears": linears}


def tensors_of(name: str, variant: Variant) -> dict[str, torch.Tensor]:
    """The tensors of a linear's variant by their names in the file."""
    return {f"{name}.weight.{part}": tensor for part, tensor in variant.tensors.items()}


def variants_of(file: Any, choices: Mapping[str, Choice]) -> dict[str, Variant]:
    """The variants in an open file.

    Args:
        file: an open safetensors file.
        choices: the choice of every quantized linear by its name in the file.

    Raises:
        ImpqError: the file has no tensor of a linear.
    """
    found: dict[str, dict[str, torch.Tensor]] = {name: {} for name in choices}
    for key in file.keys():  # noqa: SIM118
        linear, marked, part = key.rpartition(".weight.")
        if marked and linear in found:
            found[linear][part] = file.get_tensor(key)
    for name, tensors in found.items():
        if not tensors:
            raise ImpqError(f"{WEIGHTS} has no tensors of {name}: export the run again")
    return {name: Variant(choices[name], tensors) for name, tensors in found.items()}


def load_quantized(folder: str | Path, plugins: Plugins | None = None,
                   dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of a folder of format ``impq``, for inference on the processor: an ordinary model of transformers with
    the quantized values as its weights.

    Args:
        folder: as ``impq export RUN impq`` wrote it.
        plugins: the source of the backend; the installed plugins by default.
        dtype: of the weights; that of config.json by default.

    Raises:
        ImpqError: the folder is of another format or damaged, or its backend is not installed.
    """
    import torch
    from transformers import AutoConfig, GenerationConfig
    from transformers.pytorch_utils import Conv1D

    from impq_core.model.classes import loader_of
    from impq_core.model.dequantize import forget

    folder = Path(folder)
    backend, linears = _described(folder, plugins or Plugins())
    try:
        config = AutoConfig.from_pretrained(folder)
        forget(config)
        with torch.device("meta"):
            outline = loader_of(config).from_config(config)
    except Exception as error:  # a configuration can be wrong in any way
        raise ImpqError(f"{folder / 'config.json'} is of no model that transformers can load: "
                        f"{one_line(error)}") from error
    dtype = dtype or outline.dtype
    transposed = {name for name, module in outline.named_modules() if isinstance(module, Conv1D)}
    state = {}
    with open_model(folder, WEIGHTS) as file:
        variants = variants_of(file, {name: choice for name, (_, choice, _) in linears.items()})
        for name, variant in variants.items():
            spec, _, module = linears[name]
            weight = _unpacked(backend, spec, variant, folder).to(dtype)
            state[f"{name}.weight"] = weight.T.contiguous() if module in transposed else weight
        packed = {key for name, variant in variants.items() for key in tensors_of(name, variant)}
        state |= {key: file.get_tensor(key) for key in file.keys() if key not in packed}  # noqa: SIM118
    try:
        model, report = type(outline).from_pretrained(None, config=config, state_dict=state, dtype=dtype,
                                                      output_loading_info=True, ignore_mismatched_sizes=True)
    except Exception as error:  # transformers raises its own
        raise ImpqError(f"{folder / WEIGHTS} cannot be loaded: {one_line(error)}") from error
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if names := sorted(str(key) for key in report[problem]):
            raise ImpqError(f"{folder / WEIGHTS} does not fit config.json: {problem.partition('_')[0]} tensors, "
                            f"{len(names)} of them (first: {names[0]})")
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    loaded: PreTrainedModel = model.eval().requires_grad_(False)
    return loaded


def _described(folder: Path, plugins: Plugins) -> tuple[Backend, dict[str, tuple[LinearSpec, Choice, str]]]:
    """The backend of a folder, and shape, choice and module of every quantized linear by its name in the file."""
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("quantization_config") or {}
        method, version = found.get("quant_method"), found.get("format")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ImpqError(f"{path} is missing or damaged: {one_line(error)}") from error
    if method != METHOD:
        raise ImpqError(f"{folder} is not of format 'impq': its config.json has "
                        + (f"quant_method '{method}'" if method else "no quantization_config"))
    if version != FORMAT:
        raise ImpqError(f"{folder} is of format {version}; this impq reads {FORMAT}")
    try:
        linears = dict(_linears(found["linears"]))
        name, options = str(found["backend"]), dict(found["options"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ImpqError(f"{path}: its quantization_config is damaged: {one_line(error)}") from error
    kind = plugins.load("backend", name, Backend)
    return kind(build_options(kind, "backend", name, options)), linears


def _linears(data: Mapping[str, Any]) -> Iterator[tuple[str, tuple[LinearSpec, Choice, str]]]:
    for name, linear in data.items():
        rows, columns = linear["rows"], linear["columns"]
        if not (type(rows) is type(columns) is int and rows > 0 and columns > 0):
            raise ValueError(f"{name} is {rows} x {columns}")
        yield name, (LinearSpec(str(linear["module"]), rows, columns), Choice.of(linear), str(linear["module"]))


def _unpacked(backend: Backend, spec: LinearSpec, variant: Variant, folder: Path) -> torch.Tensor:
    try:
        whole = variant.nbytes == backend.nbytes(spec, variant.choice)
        weight = backend.dequantize(variant, spec) if whole else None
    except Exception as error:  # tensors that are missing or of other shapes make a backend fail in any way
        raise ImpqError(f"{folder / WEIGHTS}: {spec.name} cannot be unpacked: {one_line(error)}") from error
    if weight is None or weight.shape != (spec.rows, spec.columns):
        raise ImpqError(f"{folder / WEIGHTS}: the tensors of {spec.name} are not those of {spec.rows} x {spec.columns} "
                        f"weights at {variant.choice}: export the run again")
    return weight
