"""The source of a model: the demo, a folder, or a hub name. torch is imported only to read weights."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from impq_core.errors import ImpqError, one_line
from impq_core.model.demo import demo_model, demo_path
from impq_core.model.weight_files import checked_digest, file_digest

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from impq_core.model.placement import Stored


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
            whole.update(checked_digest(file, self.name, bool(self.quantization)) if file.suffix == ".safetensors"
                         else file_digest(file))
        for file in sorted(folder.rglob("*.py")):
            whole.update(str(file.relative_to(folder)).encode() + file_digest(file))
        return whole.hexdigest()[:16]

    def _config(self) -> Any:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self._files, trust_remote_code=self.trust_remote_code)

    @cached_property
    def quantization(self) -> dict[str, Any]:
        """The settings by which the files' weights are quantized; empty if they are not. The model is then the
        dequantized one. Of a hub's model, the configuration must have been fetched."""
        from impq_core.model.dequantize import quantization_of

        return quantization_of(self._content())

    def _content(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]

    def skeleton(self) -> PreTrainedModel:
        """The model on the meta device, as ``load`` returns it: shapes and names, no weights. Warns if the weights of
        the files are quantized, and will be dequantized.

        Raises:
            ImpqError: transformers does not know the architecture or cannot read the configuration, the model does not
                run on text alone, or its weights are quantized and transformers does not dequantize them.
        """
        from impq_core.model import dequantize

        model = self._on_meta()
        if self.quantization:
            dtype = str(dequantize.stored_dtype(model.config)).removeprefix("torch.")
            warnings.warn(f"model {self.name} is quantized already ({dequantize.method_of(self.quantization)}): "
                          f"transformers dequantizes its weights to {dtype}, and the dequantized model is the "
                          "reference of all losses", RuntimeWarning, stacklevel=2)
        return model

    def _on_meta(self) -> PreTrainedModel:
        import torch

        from impq_core.model import dequantize
        from impq_core.model.classes import loader_of, needed_by
        from impq_core.model.linears import to_linears

        try:
            config = self._config()
            if self.quantization:
                dequantize.check(self.name, self.quantization)
                dequantize.forget(config)
            with torch.device("meta"):
                model = to_linears(loader_of(config).from_config(config, trust_remote_code=self.trust_remote_code))
        except ImpqError:  # of the folder that the demo model is unpacked into, or of the quantization
            raise
        except Exception as error:  # a configuration can be wrong in any way
            if "trust_remote_code" in str(error) and not self.trust_remote_code:
                raise ImpqError(f"model {self.name} comes with its own code, which runs only if the command line "
                                "permits it: give --trust-remote-code if the code is trusted") from error
            if isinstance(error, ImportError):
                raise ImpqError(f"model {self.name} needs a package that is not installed: "
                                f"{one_line(error, 260)}") from error
            raise ImpqError(f"model {self.name} is no causal language model that transformers can load: "
                            f"{one_line(error, 260)}") from error
        if needed := needed_by(model):
            raise ImpqError(f"model {self.name} does not run on text alone: the forward of {type(model).__name__} "
                            f"needs {needed}")
        return model

    def check_weights(self) -> None:
        """Check the weights of a folder before a run begins: names and shapes against the configuration, and every
        number. A hub's weights are not fetched for this; their names and shapes are checked when they are loaded, and
        so are those of weights that have to be dequantized.

        Raises:
            ImpqError: a file is damaged, a tensor is missing, left over or of another shape, a number is not finite, or
                a weight is stored as codes.
        """
        if Path(self._files).is_dir():
            _ = self.digest
            if self.quantization:
                self._check_blocks()
            else:
                self._from_files(device_map="meta")

    def load(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model with its weights, dequantized where the files hold codes, on the CPU, ready for inference; all that
        holds a weight matrix in it is a linear (``to_linears``).

        Raises:
            ImpqError: the weights cannot be read, or they are not those of the configuration: some are missing, left
                over or of another shape.
        """
        from impq_core.model.linears import to_linears

        return to_linears(self.load_own(dtype))

    def load_own(self, dtype: torch.dtype | None) -> PreTrainedModel:
        """The model as ``load`` returns it, with the modules that transformers gives it.

        Args:
            dtype: of the parameters; None for that of the files, or of the dequantized weights.

        Raises:
            ImpqError: as ``load``.
        """
        model = self._from_files(dtype=dtype or self.dequantized_dtype or "auto")
        self._check_head(model)
        return model.eval().requires_grad_(False)

    def _check_head(self, model: PreTrainedModel) -> None:
        head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
        if (head is not None and getattr(model.config, "tie_word_embeddings", False)
                and head.weight is not embeddings.weight):
            raise ImpqError(f"model {self.name}: config.json ties the head to the embeddings, but the file holds "
                            "another tensor for it; set tie_word_embeddings to false, or save the model again")

    def load_streamed(self, dtype: torch.dtype, device: torch.device,
                      scratch: Path) -> tuple[PreTrainedModel, Mapping[nn.Parameter, Stored]]:
        """The model as ``load`` returns it, on a device, but for the parameters of its blocks, which stay on disk.

        Args:
            dtype: of the parameters.
            device: of all but the blocks.
            scratch: a folder for the tensors that transformers dequantizes, or merges of several in the files, as the
                experts of most mixtures; they are read from there.

        Returns:
            The model, and where each parameter is that stays on disk.

        Raises:
            ImpqError: as ``load``, or transformers does not dequantize the weights to a file of the dtype.
        """
        from impq_core.model.dequantize import writes
        from impq_core.model.streaming import device_map, stored_parameters

        if self.quantization and not writes(self.quantization, self._config(), dtype):
            raise ImpqError(f"model {self.name} is quantized already, and its weights cannot be dequantized to a file "
                            f"of {str(dtype).removeprefix('torch.')}: give it more memory, or --dtype bfloat16 (files "
                            "of compressed-tensors with several config_groups always need the memory)")
        model = self._from_files(dtype=dtype, device_map=device_map(self._on_meta(), device),
                                 offload_folder=str(scratch))
        self._check_head(model)
        return model, stored_parameters(model)

    @property
    def unquantized_files(self) -> bool:
        """Whether the weights are at hand, and are not codes."""
        return Path(self._files).is_dir() and not self.quantization

    @property
    def dequantized_dtype(self) -> torch.dtype | None:
        """The dtype in which ``tensors`` gives dequantized weights; None if the files are not quantized."""
        from impq_core.model import dequantize

        return dequantize.stored_dtype(self._config()) if self.quantization else None

    def without_weights(self) -> PreTrainedModel:
        """The model on the meta device, as ``load`` returns it. Its tensors' names in the files are known as exactly as
        the files are: those of a hub's model may not be fetched yet."""
        from transformers.conversion_mapping import get_model_conversion_mapping

        from impq_core.model.linears import to_linears

        if self.unquantized_files:
            return to_linears(self._from_files(device_map="meta"))
        model = self._on_meta()
        model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
        return model

    def _from_files(self, **options: Any) -> PreTrainedModel:
        from impq_core.model import dequantize
        from impq_core.model.classes import loader_of

        try:
            model, report = loader_of(self._config()).from_pretrained(
                self._files, trust_remote_code=self.trust_remote_code, use_safetensors=True, output_loading_info=True,
                ignore_mismatched_sizes=True, **(options | dequantize.loading(self.quantization)))
        except Exception as error:  # safetensors, the hub and transformers each raise their own
            raise ImpqError(f"the weights of model {self.name} cannot be loaded: {one_line(error, 260)}") from error
        if missing := sorted(report["missing_keys"]):
            raise ImpqError(f"the weights of model {self.name} lack {len(missing)} tensors (first: {missing[0]}); "
                            "they would be random; fetch or save it again")
        if other := sorted(report["mismatched_keys"]):
            name, stored, wanted = other[0]
            raise ImpqError(f"{len(other)} tensors of model {self.name} have another shape than its config.json says "
                            f"(first: {name} is {_shape(stored)}, not {_shape(wanted)}); fetch or save it again")
        unused = sorted(key for key in report["unexpected_keys"]
                        if not (self.quantization and key.endswith(dequantize.ACTIVATIONS)))
        if unused:
            raise ImpqError(f"the weights of model {self.name} hold {len(unused)} tensors that the architecture in its "
                            f"config.json has no place for (first: {unused[0]}); correct config.json, or fetch or save "
                            "the model again")
        if self.quantization:
            self._check_blocks()
            dequantize.finish(model, options["dtype"])
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

    def folder_with_tokenizer(self) -> Path:
        """``folder``; a hub's model has its tokenizer there afterwards."""
        if not Path(self._files).is_dir():
            self.tokenizer()
        return self.folder

    def config(self) -> dict[str, Any]:
        """The content of config.json, without the settings of a quantization."""
        from impq_core.model.dequantize import PLACES

        found = self._content()
        for part in (found, *(part for part in found.values() if isinstance(part, dict))):
            for name in PLACES:
                part.pop(name, None)
        return found

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the safetensors files by its name there, mapped from the disk. If they are quantized: every
        tensor of the dequantized model, at 16 bits, by its name in files that are not."""
        from impq_core.model import dequantize

        if self.dequantized_dtype is not None:
            yield from dequantize.tensors(self._from_files(dtype=self.dequantized_dtype))
            return
        for stored in self._opened():
            for name in stored.keys():  # noqa: SIM118
                yield name, stored.get_tensor(name)

    def _check_blocks(self) -> None:
        from impq_core.model.dequantize import check_blocks

        check_blocks(self.name, self.quantization, {
            name: tuple(stored.get_slice(name).get_shape()) for stored in self._opened()
            for name in stored.keys()})  # noqa: SIM118

    def _opened(self) -> Iterator[Any]:
        """The safetensors files, each open until the next is asked for."""
        from safetensors import safe_open

        for file in sorted(self.folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as stored:
                yield stored

    def copy_files(self, folder: Path, patterns: Sequence[str] = ("*",)) -> None:
        """Copy the files of the model whose names match, but not its weights: tokenizer, generation settings, code,
        licence ... Descriptions of a quantization are left out, if its weights are dequantized."""
        from impq_core.model.dequantize import STALE

        for file in sorted(self.folder.iterdir()):
            if self.quantization and file.name in STALE:
                continue
            if (file.is_file() and not file.name.startswith(".") and not file.name.endswith(WEIGHT_SUFFIXES)
                    and any(fnmatchcase(file.name, pattern) for pattern in patterns)):
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


def _shape(shape: Any) -> str:
    return " x ".join(map(str, shape))
