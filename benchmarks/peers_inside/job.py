"""What a script in a peer's environment is asked, and what it answers. It runs without impq."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

Job = dict[str, Any]
"""``model``: folder. ``tokens``: a .npy file, int64 (windows, length). ``linears``: their module names. ``widths``:
bits, ascending. ``group_size``. ``budgets``: bits of codes a weight, ascending. ``tied``: lists of
linears that are to share a width. ``options``: of the script. ``answer``: the file to write."""


def run(package: str, ask: Callable[[Job], dict[str, Any]]) -> None:
    """Read the job that the command line names, and write the answer: what ``ask`` returns (``raw``, by the budget: the
    output of the peer; ``cost``: its passes, as the script counts them), the version, and the processor's seconds of
    the whole process, imports included."""
    job: Job = json.loads(Path(sys.argv[1]).read_text())
    answer = {"version": version(package), **ask(job)}
    answer["processor_seconds"] = round(time.process_time(), 1)
    answer_file = Path(job["answer"])
    whole = answer_file.with_suffix(".whole")  # a script that is stopped leaves no half of an answer
    whole.write_text(json.dumps(answer) + "\n")
    whole.rename(answer_file)
