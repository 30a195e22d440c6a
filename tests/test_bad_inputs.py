"""Bad input: its exit code, its one line, and no file left behind.

``IMPQ_WRITE_DOCS=1 pytest tests/test_bad_inputs.py`` writes the messages to docs/errors.md. The cases do not repeat
them, so that rewording a message is one edit and one run of that command.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from bad_files import CONFIGS, MODELS, PLANS, RUNS, STORES, TEXTS
from bad_words import ANSWERS, BUDGETS, COSTS, CURVES, NAMES, NUMBERS, TASKS, USAGE
from scenes import Answer, Case, World

DOCS = Path(__file__).parents[1] / "docs" / "errors.md"
COMMAND = "IMPQ_WRITE_DOCS=1 pytest tests/test_bad_inputs.py"
HEAD = f"""# Errors

`{COMMAND}` writes this page and tries each case. Every error is one line on
stderr. The exit code is 1 for an error in a file or on the machine, and 2 for a wrong word in the command line or the
configuration. A case leaves no file behind unless the first column says so. `HERE` is the working folder; `finished`,
`estimated`, `swept` and `exported` are a run, an estimate, a sweep and an export in it.
"""


CASES = [*USAGE, *BUDGETS, *CURVES, *COSTS, *NAMES, *NUMBERS, *CONFIGS, *PLANS, *MODELS, *TEXTS, *STORES, *RUNS,
         *TASKS, *ANSWERS]


@pytest.fixture(scope="module")
def answers(world: World) -> Mapping[str, Answer]:
    """The answer to every case, by the case's name."""
    found = {}
    for case in CASES:
        world.reset()
        with world.inside():
            held = case.scene() if case.scene else None
        found[case.name] = world.ask(case.command, case.apart, case.disk)
        del held  # a lock, which had to last
    return found


def line_of(answer: Answer) -> str:
    """The error message; of doctor's findings, those that are wrong."""
    wrong = [line.removeprefix("wrong  ") for line in answer.out.splitlines() if line.startswith("wrong  ")]
    return "\n".join(wrong) or answer.err.strip()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace("::", ":"))  # xdist ends a scope at "::"
def test_bad_input_is_one_line_and_leaves_nothing(case: Case, answers: Mapping[str, Answer]) -> None:
    answer = answers[case.name]
    line = line_of(answer)
    assert answer.code == case.code and case.key in line, answer
    assert "\n" not in line and "Traceback" not in line and "bug of" not in line, answer
    assert line.startswith("impq: ") or case.command.endswith("doctor") or "doctor --tracking" in case.command, answer
    assert all(name.startswith(case.leaves) for name in answer.touched) if case.leaves else not answer.touched, answer
    assert not answer.heavy, answer


def test_the_cases_are_many() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 100


def test_the_table_of_errors_holds_the_messages(answers: Mapping[str, Answer]) -> None:
    rows = ["| wrong | command | exit | message |", "| --- | --- | --- | --- |"]
    for case in CASES:
        command = re.sub(r"^((?:[A-Z_]+=\S+ )*)", r"\1impq ", case.command).strip()
        wrong = case.what if case.disk is None else f"{case.what}: no file beyond {case.disk} bytes"
        message = stable(line_of(answers[case.name])).removeprefix("impq: ")
        cells = wrong, f"`{shortened(command)}`", str(case.code), message
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    table = HEAD + "\n" + "\n".join(rows) + "\n"
    if os.environ.get("IMPQ_WRITE_DOCS") == "1":
        DOCS.write_text(table)
    written = DOCS.read_text().splitlines()
    different = [line for line in table.splitlines() if line not in written]
    assert DOCS.read_text() == table, f"{COMMAND} writes docs/errors.md anew; new lines: {different}"
    assert len({row.rsplit(" | ", 1)[1] for row in rows}) >= 60, "distinct messages"


def stable(line: str) -> str:
    """A message without the parts that differ between machines: digests, versions, devices and other libraries'
    messages."""
    line = re.sub(r"impq-runs/[\w-]+", "impq-runs/RUN", line)
    line = re.sub(r'"[0-9a-f]{16,17}"', '"..."', line)
    line = re.sub(r"(versions\.\w+) was \S+ and is now [^;]+", r"\1 was ... and is now ...", line)
    line = re.sub(r"(?<=--device takes )cpu, .+ or auto", "cpu or auto", line)
    line = re.sub(r"((?:[A-Z]\w*Error|EOFError|BadZipFile): ).*", r"\1...", line)
    return shortened(line)


def shortened(line: str) -> str:
    return re.sub(r"9{50,}", "999...", line)
