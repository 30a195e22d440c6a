"""The code blocks of the documents, and a folder in which they run unchanged."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from scenes import World

from impq_core.config import RunConfig, TextConfig
from impq_core.plugins import Plugins
from impq_core.runs.pipeline import run
from impq_core.runs.sweep import Sweep, run_sweep
from impq_core.testing import tiny_model

ROOT = Path(__file__).parents[1]
RUN, SWEEP = "impq-runs/20260101-120000-ab12", "impq-runs/20260101-130000-cd34"
"""Names of a finished run and of a sweep in the documents."""

_BLOCK = re.compile(r"(?:^<!-- not run: (?P<skip>.+?) -->\n)?(?:^<!-- [\w ]+ -->\n)?"
                    r"^```(?P<language>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block of code.

    Args:
        page: path of the document from the repository's root.
        line: line of its fence.
        language: language of the fence.
        text: content of the block.
        title: file with this content; empty if the block is to be run.
        skip: why it cannot be run; empty if it can.
    """

    page: str
    line: int
    language: str
    text: str
    title: str = ""
    skip: str = ""

    @property
    def commands(self) -> list[str]:
        """The commands: the lines of a shell block, or the lines after the prompts of a console."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        return [part.strip() for line in lines if line.strip() and not line.startswith("#")
                for part in line.split("&&")]


def blocks_of(page: str) -> list[Block]:
    """The blocks of a document in order: those to be run, and the files that they need."""
    text = (ROOT / page).read_text()
    return [Block(page, text[:found.start("language")].count("\n") + 1, found["language"], found["text"],
                  found["title"] or "", found["skip"] or "")
            for found in _BLOCK.finditer(text) if found["title"] or found["language"] in ("bash", "console", "python")]


@dataclass
class Page:
    """A document in its own folder; a block needs the blocks before it.

    Args:
        world: the folder.
        blocks: the blocks of the document.
    """

    world: World
    blocks: list[Block]
    _names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})
    _done: list[Exception | None] = field(default_factory=list)

    def run(self, block: Block) -> None:
        """Run a block after the blocks before it; raises the block's exception."""
        number = self.blocks.index(block)
        for one in self.blocks[len(self._done):number + 1]:
            try:
                with self.world.inside():
                    if not one.skip:
                        self._carry_out(one)
                self._done.append(None)
            except Exception as error:  # raised for this block below; later blocks may fail because of it
                self._done.append(error)
        if error := self._done[number]:
            raise error

    def _carry_out(self, block: Block) -> None:
        if block.title:
            Path(block.title).parent.mkdir(parents=True, exist_ok=True)
            Path(block.title).write_text(block.text)
        elif block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile("\n" * block.line + block.text, block.page, "exec"), self._names)
        else:
            for command in block.commands:
                self._type(command)

    def _type(self, command: str) -> None:
        words = shlex.split(command, comments=True)
        kept = words.pop() if words[-2:-1] == [">"] else ""
        if words[0] == "impq":
            answer = self.world.ask(shlex.join(words[1:len(words) - bool(kept)]))
            result = answer.code, answer.out + answer.err
            if kept:
                Path(kept).write_text(answer.out)
        else:
            ours = {"python": [sys.executable], "pytest": [sys.executable, "-m", "pytest"]}
            done = subprocess.run([*ours.get(words[0], words[:1]), *words[1:]], capture_output=True, text=True,
                                  timeout=300)
            result = done.returncode, done.stdout + done.stderr
        assert result[0] == 0, f"{command}\n{result[1]}"


def make_world(folder: Path) -> World:
    """The folder of a document: a tiny model, texts, settings that name them, a finished run and a sweep."""
    world = World(folder / "here", folder / "kept")
    world.here.mkdir()
    for number, name in enumerate(("calibration.txt", "evaluation.txt", "train.jsonl", "test.jsonl")):
        rows = [" ".join(str(n * n) for n in range(start, start + 300))  # squares, so that no two texts share a run
                for start in range(10_000 * number, 10_000 * number + 9000, 300)]
        text = "".join(json.dumps({"text": row}) + "\n" for row in rows) if name.endswith("l") else "\n".join(rows)
        (world.here / name).write_text(text)
    for number, name in enumerate(("chats.jsonl", "chat-test.jsonl"), start=5):
        rows = [json.dumps({"messages": [{"role": "user", "content": f"Squares from {start}?"},
                                         {"role": "assistant", "content": " ".join(
                                             str(n * n) for n in range(start, start + 30))}]})
                for start in range(10_000 * number, 10_000 * number + 3000, 30)]
        (world.here / name).write_text("\n".join(rows))
    tiny_model(world.here / "my-model", blocks=2)
    (world.here / "my-model" / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}")
    shutil.copytree(ROOT / "examples", world.here / "examples")
    config = RunConfig(model="my-model", granularity="block", calibration=TextConfig("calibration.txt", 16, 32),
                       game_windows=4, evaluation=TextConfig("evaluation.txt", 8, 32), dtype="float32",
                       tracking_uri="none")
    with world.inside():
        played = replace(config, estimator="spqe")
        for name, made in ((RUN, run(played, Plugins()).folder),
                           (SWEEP, run_sweep(Sweep(played, {"budget": ["2.5bits", "3bits"]}), Plugins()))):
            made.rename(name)
        Path("impq.toml").write_text(_settings(config))
        Path("compare.html").unlink(missing_ok=True)
    shutil.copytree(world.here, world.kept)
    return world


def _settings(config: RunConfig) -> str:
    """The impq.toml that lets a command run here as it is printed: nothing in it that a command would have to name."""
    return "\n".join([
        'model = "my-model"', f"game_windows = {config.game_windows}", 'dtype = "float32"', 'tracking_uri = "none"',
        *(f'[{role}]\nsource = "{text.source}"\nwindows = {text.windows}\nlength = {text.length}'
          for role, text in (("calibration", config.calibration), ("evaluation", config.evaluation)))]) + "\n"


def links_of(page: str) -> Iterator[str]:
    """The targets of a document's links that are no web addresses."""
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", (ROOT / page).read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:", target):
            yield target
