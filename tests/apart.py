"""Command lines and scripts in processes in which nothing heavy is loaded.

A server process loads the command line once and forks for each command, which then costs a fraction of a new
interpreter. ``test_cli.py`` has a few in new interpreters.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from impq_core.cli import main

HEAVY = ("mlflow", "torch", "transformers")
"""Modules that must not be imported before errors of the command line are reported."""


def called(arguments: Sequence[str]) -> tuple[int, str, str]:
    """Exit code, output and messages of ``impq`` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(list(arguments))
        except SystemExit as end:
            return int(end.code or 0), out.getvalue(), err.getvalue()
    return 0, out.getvalue(), err.getvalue()


def called_apart(arguments: Sequence[str], folder: Path,
                 variables: Mapping[str, str]) -> tuple[int, str, str, tuple[str, ...]]:
    """The same in a process of its own, and the heavy modules that it loaded.

    Args:
        arguments: without ``impq``.
        folder: where the process works.
        variables: its environment.

    Raises:
        EOFError: the process died.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["impq_core.cli"])  # in place of the main module, which has loaded all
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, list(arguments), str(folder), dict(variables)))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()


def loaded_after(script: str, names: Sequence[str], folder: Path, *arguments: str) -> list[str]:
    """Those of some modules that a new interpreter has loaded when a script ends, in order.

    Args:
        script: in which ``sys`` is imported; it may call ``sys.exit``.
        names: of modules.
        folder: where the script works.
        arguments: of the script.
    """
    whole = (f"import sys\ntry:\n{textwrap.indent(script, '    ')}\nexcept SystemExit:\n    pass\n"
             f"print('loaded', *sorted(set({list(names)}) & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", whole, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done
    first, *found = done.stdout.splitlines()[-1].split()
    assert first == "loaded", done
    return found


def _answer(to: Connection, arguments: Sequence[str], folder: str, variables: Mapping[str, str]) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    result = called(arguments)
    to.send((*result, tuple(sorted(set(HEAVY) & set(sys.modules)))))
