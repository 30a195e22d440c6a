"""Other tools that choose widths, each in an environment of its own that is made on first use."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from ctypes.util import find_library
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peers_reading as reading

from impq_core.errors import ImpqError
from impq_core.model.demo import cache_folder

SCRIPTS = Path(__file__).parent / "peers_inside"

TORCH = ("torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0", "numpy==2.2.6")


@dataclass(frozen=True)
class Peer:
    """A tool.

    Args:
        name: of its rows.
        requirements: what pip installs.
        script: in peers_inside/.
        read: the widths in what the script put out; see ``peers_reading``.
        ties: whether linears that engines fuse share a width: True or False for a tool that has no choice, None for
            one that does either.
        library: a shared library to load in front of its own, if the machine has it.
    """

    name: str
    requirements: tuple[str, ...]
    script: str
    read: Callable[..., reading.Widths]
    ties: bool | None
    library: str = ""

    def plans(self, granularity: str) -> bool:
        """Whether its plans are compared with impq's at a granularity: plans of tied linears are also plans of single
        linears."""
        return granularity == "linear" or self.ties is not False


AUTO_ROUND = Peer("auto-round AutoScheme", (*TORCH, "auto-round==0.16.1"), "autoscheme_search.py",
                  reading.of_autoscheme, None)

PEERS = (
    AUTO_ROUND,
    Peer("ModelOpt AutoQuantize", (*TORCH, "nvidia-modelopt==0.47.0", "requests"),  # which it imports unasked
         "modelopt_search.py", reading.of_modelopt, True),
    Peer("NNCF", (*TORCH, "nncf==3.4.0"), "nncf_search.py", reading.of_nncf, False),
    Peer("mlx-lm dynamic_quant", ("mlx[cpu]==0.32.4", "mlx-lm==0.32.2"), "mlx_search.py", reading.of_threshold, False,
         "openblas"),  # the processor build of mlx brings the reference BLAS, 1 GFLOP/s: an hour in place of minutes
)


def python_of(peer: Peer) -> Path:
    """The interpreter of a peer's environment in the cache, which is made if it is not there. pip's own settings
    (PIP_INDEX_URL and the like) decide where packages come from, and so which build of torch.

    Raises:
        ImpqError: pip could not install the packages.
    """
    name = hashlib.sha256(json.dumps([sys.version_info[:2], peer.requirements]).encode()).hexdigest()[:8]
    folder = cache_folder() / "peers" / f"{peer.script.removesuffix('.py')}-{name}"
    python, done = folder / "bin" / "python", folder / "installed.json"
    if not done.is_file():
        print(f"{peer.name}: an environment in {folder}", flush=True)
        for command in ([sys.executable, "-m", "venv", "--clear", str(folder)],
                        [str(python), "-m", "pip", "install", "--quiet", *peer.requirements]):
            ran = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                 env=_environment(), check=False)
            if ran.returncode:
                last = (ran.stderr.strip().splitlines() or ["no output"])[-1]
                raise ImpqError(f"no environment for {peer.name} in {folder}: {last}; run {' '.join(command)}")
        done.write_text(json.dumps(peer.requirements) + "\n")
    return python


def ask(peer: Peer, script: str, job: Mapping[str, Any], folder: Path, python: Path | None = None) -> dict[str, Any]:
    """The answer of a script in a peer's environment; one that is in the folder is not asked for again.

    Args:
        peer: the tool.
        script: its name in peers_inside/.
        job: what it is asked, but the file of the answer.
        folder: of the job, the answer and the log.
        python: the interpreter; by default that of an environment in the cache.

    Raises:
        ImpqError: the script failed; the message names its log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    facts = [job, script, peer.requirements, str(python or ""), (SCRIPTS / "job.py").read_text()]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    stem = folder / f"{script.removesuffix('.py')}-{key}"
    answer, log, given = (stem.with_suffix(suffix) for suffix in (".answer.json", ".log", ".job.json"))
    if not answer.is_file():
        given.write_text(json.dumps({**job, "answer": str(answer)}) + "\n")
        python = python or python_of(peer)
        print(f"{peer.name}: {script}, log in {log}", flush=True)
        with log.open("w") as output:
            ran = subprocess.run([str(python), str(SCRIPTS / script), str(given)], stdout=output,
                                 stderr=subprocess.STDOUT, env=_environment(peer.library), check=False)
        if ran.returncode or not answer.is_file():
            last = (log.read_text().strip().splitlines() or ["no output"])[-1]
            raise ImpqError(f"{peer.name} failed with exit code {ran.returncode}: {last[:200]} (all of it: {log})")
    found: dict[str, Any] = json.loads(answer.read_text())
    return found


def _environment(library: str = "") -> dict[str, str]:
    """The variables of a process in another environment: one thread, and no modules of this one."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    if library and (found := find_library(library)):
        kept["LD_PRELOAD"] = found
    return {**kept, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false"}
