"""A small world to try bad input on: a model, texts, a finished run, an estimate, an export and a sweep."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import resource
import shlex
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
from apart import called, called_apart

from impq_core.config import RunConfig, TextConfig
from impq_core.exports.export import export_run
from impq_core.plugins import Plugins
from impq_core.runs.pipeline import run
from impq_core.runs.sweep import Sweep, run_sweep
from impq_core.testing import tiny_model


@dataclass(frozen=True)
class Answer:
    """Result of a command: exit code, output, and the created, changed and deleted files, as paths in the world.

    If it ran in a process of its own, ``heavy`` are the heavy modules that it loaded.
    """

    code: int
    out: str
    err: str
    touched: tuple[str, ...]
    heavy: tuple[str, ...] = ()


@dataclass(frozen=True)
class World:
    """A folder that can be reset to its first content.

    Args:
        here: folder of the commands; always the same path, because runs record the path of their model.
        kept: copy of its first content.
    """

    here: Path
    kept: Path

    @classmethod
    def make(cls, folder: Path) -> World:
        """Build it, which takes some seconds."""
        from transformers.utils import logging

        logging.set_verbosity_error()  # as impq does where it is the first to load transformers
        logging.disable_progress_bar()
        world = cls(folder / "here", folder / "kept")
        world.here.mkdir()
        for name, start in (("calibration", 0), ("evaluation", 5000)):
            (world.here / f"{name}.txt").write_text(" ".join(str(n * n) for n in range(start, start + 3000)))
        tiny_model(world.here / "model", blocks=2)
        # Divergence: narrower widths may lower the loss of a random model, of which impq warns.
        config = RunConfig(model="model", backend="hqq", estimator="spqe", granularity="block", bits=(2, 4), value="kl",
                           calibration=TextConfig("calibration.txt", 8, 16), game_windows=4,
                           evaluation=TextConfig("evaluation.txt", 4, 16), dtype="float32", tracking_uri="none",
                           cache=False, options={"estimator": {"permutations": 4}})
        with world.inside():
            plugins = Plugins()
            run(config, plugins).folder.rename("finished")
            run(config, plugins, only_estimate=True).folder.rename("estimated")
            export_run("finished", "hqq", Path("exported"), plugins)
            export_run("finished", "impq", Path("packed"), plugins)
            run_sweep(Sweep(config, {"budget": ["2.5bits", "3bits"]}), plugins).rename("swept")
            Path("impq-runs").rmdir()
            Path("impq.toml").write_text(replace(config, tracking_uri="", options={}).to_toml())
        shutil.copytree(world.here, world.kept)
        return world

    def reset(self) -> None:
        """Restore the first content."""
        shutil.rmtree(self.here)
        shutil.copytree(self.kept, self.here)

    @contextlib.contextmanager
    def inside(self, **variables: str) -> Iterator[None]:
        """Enter the folder with these environment variables; changes of the process are undone afterwards."""
        before, shown, handler = Path.cwd(), warnings.showwarning, signal.getsignal(signal.SIGTERM)
        os.chdir(self.here)
        try:
            with mock.patch.dict(os.environ, {"IMPQ_CACHE": str(self.here / "cache"), **variables}):
                yield
        finally:
            os.chdir(before)
            warnings.showwarning = shown
            signal.signal(signal.SIGTERM, handler)

    def ask(self, command: str, apart: bool = False, disk: int | None = None) -> Answer:
        """Run a command line in the folder.

        Args:
            command: without ``impq``; ``NAME=VALUE`` in front of it are environment variables.
            apart: run in a separate process.
            disk: largest size of a file in bytes; a larger one raises the error of a full disk.
        """
        words = shlex.split(command)
        count = next((i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), len(words))
        variables, arguments = dict(word.split("=", 1) for word in words[:count]), words[count:]
        before = self._files()
        heavy: tuple[str, ...] = ()
        with self.inside(**variables), _limited(disk):
            if apart:
                code, out, err, heavy = called_apart(arguments, self.here, os.environ)
            else:
                code, out, err = called(arguments)
        after = self._files()
        touched = tuple(name for name in sorted({**before, **after}) if before.get(name) != after.get(name))
        return Answer(code, *(text.replace(str(self.here), "HERE") for text in (out, err)), touched, heavy)

    def _files(self) -> dict[str, str]:
        return {str(path.relative_to(self.here)): hashlib.sha256(path.read_bytes()).hexdigest()
                for path in self.here.rglob("*") if path.is_file() and path.parent.name != "__pycache__"}


@contextlib.contextmanager
def _limited(disk: int | None) -> Iterator[None]:
    if disk is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (disk, hard))  # Python ignores the signal that would come with it
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@dataclass(frozen=True)
class Case:
    """A bad input. The text of the message is in docs/errors.md, and nowhere else.

    Args:
        command: the arguments of ``impq``, as a shell reads them.
        code: the expected exit code.
        key: a file, option, name or value that the message must contain, to tell it from another error's.
        what: the fault, if the command does not show it.
        scene: makes the fault, in the world's folder.
        apart: run in a process of its own, which must not have loaded anything heavy.
        disk: bytes beyond which no file can grow.
        leaves: the only files that may be made or changed begin like this.
    """

    command: str
    code: int
    key: str = ""
    what: str = ""
    scene: Callable[[], object] | None = None
    apart: bool = False
    disk: int | None = None
    leaves: str = ""

    @property
    def name(self) -> str:
        """The unique name of the case."""
        return f"{self.command} ({self.what})" if self.what else self.command


light = partial(Case, apart=True)
"""A case whose error is found before anything heavy is loaded."""


def write(name: str, content: str | bytes) -> None:
    """A file of the world with this content."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def edit(name: str, old: str, new: str) -> None:
    """The first ``old`` in a file replaced."""
    text = Path(name).read_text()
    assert old in text, (name, old)
    Path(name).write_text(text.replace(old, new, 1))


def cut(name: str, size: int) -> None:
    """A file cut short."""
    os.truncate(name, size)


def change(name: str, array: str, values: object) -> None:
    """Another array in an .npz file."""
    with np.load(name) as data:
        arrays = dict(data)
    np.savez(name, **{**arrays, array: np.asarray(values)})


def weights(name: str, value: float | None) -> None:
    """A weight of the model with one number changed, or (None) left out."""
    from safetensors.torch import load_file, save_file

    tensors = load_file("model/model.safetensors")
    if value is None:
        del tensors[name]
    else:
        tensors[name][0, 0] = value
    save_file(tensors, "model/model.safetensors", metadata={"format": "pt"})


def larger_tokenizer() -> None:
    """A tokenizer that knows a word more than the model."""
    from impq_core.testing.tiny import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["25000000"])
    tokenizer.save_pretrained("model")
