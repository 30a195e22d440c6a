"""The source of a model: the demo, a folder, or a hub name. torch is imported only to read weights."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from impq_core.errors import ImpqError, one_line
from impq_core.model.demo import demo_model, demo_path

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from impq_core.model.placement import Stored

MAPPED = 2**27
"""Bytes of a file of weights that are mapped at a time while it is checked."""

UNQUANTIZED = "impq starts from unquantized weights: give the model that it was made from"
"""The way out for a model that is quantized already."""


@dataclass(frozen=True)
class ModelSource:
    """The files of a model and the name that the user gave it. What is found by reading the weights is kept, so one
    source that is shared between runs reads them once.

    Args:
        name: as the user gave it.
        location: a folder or a hub name; empty for the demo model, which is fetched on first use.
        trust_remote_code: let transformers run code that comes with the model.
    """

    name: str
    location: str
    trust_remote_code: bool = False

    @cached_property
    def _files(self) -> str:
        return self.location or str(demo_model())

    @property
    def at_hand(self) -> bool:
        """Whether the model's configuration can be read without making files in impq's cache."""
        return bool(self.location) or demo_path().is_dir()

    @property
    def file_bytes(self) -> int | None:
        """Bytes of a folder's weights on disk; None for a hub's model, whose weights may not be fetched yet."""
        folder = Path(self._files)
        return sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else None

    @cached_property
    def digest(self) -> str:
        """Hex digest of a folder's configuration, weights and code (``*.py``), or the name of a hub model's commit.

        Raises:
            ImpqError: as ``check_weights``, which reads the files in the same pass.
        """
        folder = Path(self._files)
        if not folder.is_dir():
            config = self._config()
            return str(getattr(config, "_commit_hash", None) or "unknown")
        whole = hashlib.sha256()
        for file in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
            whole.update(self._read(file) if file.suffix == ".safetensors" else _digest(file))
        for file in sorted(folder.rglob("*.py")):
            whole.update(str(file.relative_to(folder)).encode() + _digest(file))
        return whole.hexdigest()[:16]

    def _read(self, file: Path) -> bytes:
        """SHA-256 of a file of weights; every tensor is checked while it is read. Raises ImpqError."""
        import torch
        from safetensors import SafetensorError, safe_open

        found = hashlib.sha256()
        try:
            with file.open("rb") as stream:
                size = stream.read(8)
                found.update(size + stream.read(int.from_bytes(size, "little")))
            with safe_open(file, framework="pt") as stored:
                names = stored.offset_keys()  # in the order of the file
            while names:  # what is mapped takes memory until its file is closed
                with safe_open(file, framework="pt") as stored:
                    mapped = 0
                    while names and mapped < MAPPED:
                        tensor = stored.get_tensor(name := names.pop(0))
                        found.update(tensor.flatten().view(torch.uint8).numpy())
                        self._check_tensor(name, tensor)
                        mapped += tensor.numel() * tensor.element_size()
                    del tensor
        except (OSError, SafetensorError) as error:
            raise ImpqError(f"model {self.name}: {file.name} is damaged or cut short ({error}); fetch or save it "
                            "again") from error
        return found.digest()

    def _check_tensor(self, name: str, tensor: torch.Tensor) -> None:
        import torch

        if name.endswith("weight") and (tensor.dtype.itemsize == 1 or not tensor.is_floating_point()):
            raise ImpqError(f"model {self.name}: its weight {name} holds {str(tensor.dtype).removeprefix('torch.')} "
                            f"codes, so the model is quantized already; {UNQUANTIZED}")
        if (tensor.is_floating_point() and tensor.dtype.itemsize > 1 and tensor.numel()
                and not torch.isfinite(torch.stack(tensor.aminmax())).all()):
            raise ImpqError(f"model {self.name}: its weight {name} holds NaN or infinity; take a sound copy of the "
                            "model")

    def _config(self) -> Any:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self._files, trust_remote_code=self.trust_remote_code)

    def skeleton(self) -> PreTrainedModel:
        """The model on the meta device, as ``load`` returns it: shapes and names, no weights.

        Raises:
            ImpqError: transformers does not know the architecture or cannot read the configuration, or the
                configuration says that the weights are quantized already.
        """
        import torch
        from transformers import AutoModelForCausalLM

        from impq_core.model.linears import to_linears

        try:
            config = self._config()
            method = _quantized(config)
            if not method:
                with torch.device("meta"):
                    return to_linears(AutoModelForCausalLM.from_config(
                        config, trust_remote_code=self.trust_remote_code))
        except ImpqError:  # of the folder that the demo model is unpacked into
            raise
        except Exception as error:  # a configuration can be wrong in any way
            if "trust_remote_code" in str(error) and not self.trust_remote_code:
                raise ImpqError(f"model {self.name} comes with its own code, which runs only if the command line "
                                "permits it: give --trust-remote-code if the code is trusted") from error
            raise ImpqError(f"model {self.name} is no causal language model that transformers can load: "
                            f"{one_line(error, 260)}") from error
        raise ImpqError(f"model {self.name} is quantized already (its config.json has a quantization_config of method "
                        f"{method}); {UNQUANTIZED}")

    def check_weights(self) -> None:
        """Check the weights of a folder before a run begins: names and shapes against the configuration, and every
        number. A hub's weights are not fetched for this; their names and shapes are checked when they are loaded.

        Raises:
            ImpqError: a file is damaged, a tensor is missing, left over or of another shape, a number is not finite, or
                a weight is stored as codes.
        """
        if Path(self._files).is_dir():
            _ = self.digest
            self._from_files(device_map="meta")

    def load(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model with its weights, on the CPU, ready for inference; all that holds a weight matrix in it is a linear
        (``to_linears``).

        Raises:
            ImpqError: the weights cannot be read, or they are not those of the configuration: some are missing, left
                over or of another shape.
        """
        from impq_core.model.linears import to_linears

        model = self._from_files(dtype=dtype)
        self._check_head(model)
        return to_linears(model.eval().requires_grad_(False))

    def _check_head(self, model: PreTrainedModel) -> None:
        head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
        if (head is not None and getattr(model.config.get_text_config(), "tie_word_embeddings", False)
                and head.weight is not embeddings.weight):
            raise ImpqError(f"model {self.name}: config.json ties the head to the embeddings, but the file holds "
                            "another tensor for it; set tie_word_embeddings to false, or save the model again")

    def load_streamed(self, dtype: torch.dtype, device: torch.device,
                      scratch: Path) -> tuple[PreTrainedModel, Mapping[nn.Parameter, Stored]]:
        """The model as ``load`` returns it, on a device, but for the parameters of its blocks, which stay on disk.

        Args:
            dtype: of the parameters.
            device: of all but the blocks.
            scratch: a folder for the tensors that transformers merges of several in the files, as the experts of most
                mixtures; they are read from there.

        Returns:
            The model, and where each parameter is that stays on disk.

        Raises:
            ImpqError: as ``load``.
        """
        from impq_core.model.streaming import device_map, stored_parameters

        model = self._from_files(dtype=dtype, device_map=device_map(self.skeleton(), device),
                                 offload_folder=str(scratch))
        self._check_head(model)
        return model, stored_parameters(model)

    def _from_files(self, **options: Any) -> PreTrainedModel:
        from transformers import AutoModelForCausalLM

        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                self._files, trust_remote_code=self.trust_remote_code, use_safetensors=True, output_loading_info=True,
                ignore_mismatched_sizes=True, **options)
        except Exception as error:  # safetensors, the hub and transformers each raise their own
            raise ImpqError(f"the weights of model {self.name} cannot be loaded: {one_line(error, 260)}") from error
        if missing := sorted(report["missing_keys"]):
            raise ImpqError(f"the weights of model {self.name} lack {len(missing)} tensors (first: {missing[0]}); "
                            "they would be random; fetch or save it again")
        if other := sorted(report["mismatched_keys"]):
            name, stored, wanted = other[0]
            raise ImpqError(f"{len(other)} tensors of model {self.name} have another shape than its config.json says "
                            f"(first: {name} is {_shape(stored)}, not {_shape(wanted)}); fetch or save it again")
        config = self._config()
        wrapped = config.get_text_config() is not config
        if unused := sorted(key for key in report["unexpected_keys"] if not (wrapped and _is_another_part(key, model))):
            raise ImpqError(f"the weights of model {self.name} hold {len(unused)} tensors that the architecture in its "
                            f"config.json has no place for (first: {unused[0]}); correct config.json, or fetch or save "
                            "the model again")
        loaded: PreTrainedModel = model
        return loaded

    @cached_property
    def folder(self) -> Path:
        """The folder with the model's files; of a hub's model, the local copy.

        Raises:
            ImpqError: a hub's model has not been fetched.
        """
        if Path(self._files).is_dir():
            return Path(self._files)
        from transformers.utils import cached_file

        config = cached_file(self._files, "config.json", local_files_only=True)
        if config is None:
            raise ImpqError(f"model {self.name} has no local copy")
        return Path(config).parent

    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return json.loads((self.folder / "config.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the safetensors files by its name there, mapped from the disk."""
        from safetensors import safe_open

        for file in sorted(self.folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118
                    yield name, stored.get_tensor(name)

    def copy_files(self, folder: Path) -> None:
        """Copy every file of the model but its weights: tokenizer, generation settings, code, licence ..."""
        for file in sorted(self.folder.iterdir()):
            if file.is_file() and not file.name.startswith(".") and not file.name.endswith(WEIGHT_SUFFIXES):
                shutil.copyfile(file, folder / file.name)

    def tokenizer(self) -> Any:
        """The model's tokenizer; raises ImpqError if there is none."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self._files, trust_remote_code=self.trust_remote_code)
        except Exception as error:
            raise ImpqError(f"model {self.name} has no tokenizer that can be loaded: {one_line(error, 260)}") from error


WEIGHT_SUFFIXES = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack")
"""Endings of the names of files that hold weights, or say where weights are."""


def locate_model(name: str, trust_remote_code: bool = False) -> ModelSource:
    """Resolve ``demo``, a folder or a hub name; a folder's files are looked at, not read.

    Raises:
        ImpqError: the folder is missing, or has no configuration, no weights, or only pickled ones.
    """
    if name == "demo":
        return ModelSource(name, "", trust_remote_code)
    folder = Path(name).expanduser()
    if not folder.exists():
        if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
            return ModelSource(name, name, trust_remote_code)
        raise ImpqError(f"model {name}: no such folder (a hub name has the form owner/name; 'demo' is built in)")
    if not (folder / "config.json").is_file():
        raise ImpqError(f"model {name} has no config.json")
    if not any(folder.glob("*.safetensors")):
        if any(file.suffix in (".bin", ".pt", ".pth", ".ckpt") for file in folder.iterdir()):
            raise ImpqError(f"model {name} has only pickled weights, which impq does not read; "
                            "save it with save_pretrained(..., safe_serialization=True)")
        raise ImpqError(f"model {name} has no .safetensors weights")
    return ModelSource(name, str(folder), trust_remote_code)


def _digest(file: Path) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def _quantized(config: Any) -> str:
    """The method of the quantization that a configuration, or that of its text model, speaks of; empty for none."""
    for part in (config, config.get_text_config()):
        for name in ("quantization_config", "compression_config"):
            if found := getattr(part, name, None):
                data = found if isinstance(found, dict) else found.to_dict()
                return str(data.get("quant_method", "unknown"))
    return ""


def _is_another_part(key: str, model: PreTrainedModel) -> bool:
    """Whether a tensor of a wrapper's file belongs to a part (such as a vision tower) beside the language model: to a
    module that the model lacks, next to its blocks or further out."""
    from impq_core.model.layers import blocks_of

    modules = {name for name, _ in model.named_modules()}
    names = key.split(".")
    depth = max(count for count in range(len(names)) if ".".join(names[:count]) in modules)
    blocks = blocks_of(model)[0][0].split(".")[:-2]
    return depth <= len(blocks) and names[:depth] == blocks[:depth] and len(names) - depth > 1


def _shape(shape: Any) -> str:
    return " x ".join(map(str, shape))
