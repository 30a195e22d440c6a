"""Where a model comes from: the demo, a folder, or a hub name. Imports torch only to load."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from impq_core.errors import ImpqError
from impq_core.model.demo import demo_model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files are, and what the user called it.

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

    @cached_property
    def digest(self) -> str:
        """Hex digest of configuration and weights; a hub's model has the name of its commit."""
        folder = Path(self._files)
        if not folder.is_dir():
            from transformers import AutoConfig

            config = AutoConfig.from_pretrained(self._files, trust_remote_code=self.trust_remote_code)
            return str(getattr(config, "_commit_hash", None) or "unknown")
        found = hashlib.sha256()
        for file in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
            with file.open("rb") as stream:
                found.update(hashlib.file_digest(stream, "sha256").digest())
        return found.hexdigest()[:16]

    def skeleton(self) -> PreTrainedModel:
        """The model on the meta device: shapes and names, no weights.

        Raises:
            ImpqError: transformers does not know the architecture or cannot read the configuration.
        """
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        files = self._files
        try:
            config = AutoConfig.from_pretrained(files, trust_remote_code=self.trust_remote_code)
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(config, trust_remote_code=self.trust_remote_code)
        except Exception as error:  # a configuration can be wrong in any way
            raise ImpqError(f"model {self.name} is no causal language model that transformers can load: "
                            f"{_brief(error)}") from error

    def check_weights(self) -> None:
        """Look at every weight of a folder once: what is found while a run is at work leaves a run behind.

        Raises:
            ImpqError: a file is damaged, or a weight is not finite.
        """
        import torch
        from safetensors import SafetensorError, safe_open

        for file in sorted(Path(self._files).glob("*.safetensors")):
            try:
                with safe_open(file, framework="pt") as stored:
                    for name in stored.keys():  # noqa: SIM118
                        tensor = stored.get_tensor(name)
                        if (name.endswith("weight") and tensor.dtype.itemsize > 1 and tensor.numel()
                                and not torch.isfinite(torch.stack(tensor.aminmax())).all()):
                            raise ImpqError(f"model {self.name}: its weight {name} holds NaN or infinity; take a sound "
                                            "copy of the model")
            except (OSError, SafetensorError) as error:
                raise ImpqError(f"model {self.name}: {file.name} is damaged or cut short ({error}); fetch or save it "
                                "again") from error

    def load(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model with its weights, on the CPU, ready for inference.

        Raises:
            ImpqError: the weights cannot be read, or some are missing from the file.
        """
        from transformers import AutoModelForCausalLM

        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                self._files, dtype=dtype, trust_remote_code=self.trust_remote_code, use_safetensors=True,
                output_loading_info=True)
        except Exception as error:  # safetensors, the hub and transformers each raise their own
            raise ImpqError(f"the weights of model {self.name} cannot be loaded: {_brief(error)}") from error
        if missing := sorted(report["missing_keys"]):
            raise ImpqError(f"the weights of model {self.name} lack {len(missing)} tensors (first: {missing[0]}); "
                            "they would be random; fetch or save it again")
        return model.eval().requires_grad_(False)

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
        """The model's tokenizer; raises ImpqError where there is none."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self._files, trust_remote_code=self.trust_remote_code)
        except Exception as error:
            raise ImpqError(f"model {self.name} has no tokenizer that can be loaded: {_brief(error)}") from error


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


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"
