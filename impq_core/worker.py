"""Workers: processes that carry out tasks of a run for its leader.

Tasks and answers are plain data, and a task does not depend on the number of workers, so the losses, gradients, scores
and variants of a run are bit for bit the same with any number. A worker writes variants and scores
into the cache, and nothing else: every answer is in a file of the leader before it counts.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from impq_core.config import from_data
from impq_core.costs import Metering
from impq_core.errors import ImpqError
from impq_core.evaluate import Evaluator
from impq_core.game.model_game import ModelGame
from impq_core.game.probe import ModelProbe
from impq_core.interfaces import Answer, Order, Task
from impq_core.keys import Change, digest_of
from impq_core.model.quantize import Filling
from impq_core.plugins import Plugins
from impq_core.runs.prepare import Prepared, prepare
from impq_core.runs.session import GAME, Session
from impq_core.space import Choice
from impq_core.tasks.shared import Measurer
from impq_core.trust import Trust


class Worker:
    """Carries out tasks, one at a time. It keeps the model and the variants of its last order."""

    def __init__(self) -> None:
        self._order = ""
        self._session: Session | None = None
        self._variants_of = ""  # which variants the session's bank has: of the game, or the deployed ones
        self._filling: tuple[Filling, int] | None = None  # and the place that it is at
        self._search: tuple[int, int] | None = None  # the windows of the games and the probe
        self._games: dict[str, ModelGame] = {}
        self._probe: ModelProbe | None = None
        self._evaluators: dict[str, list[Evaluator]] = {}  # by the name of the texts: of layers, and of linears
        self._measurer: Measurer | None = None

    def carry_out(self, order: Order, task: Task) -> Answer:
        """The answer to a task.

        Raises:
            ImpqError: code, versions, model, texts, device or threads differ from the leader's, or the task fails.
        """
        if self._session is None or self._order != digest_of(order):
            self._session = self._prepare(order)
            self._order = digest_of(order)
        work = {"variants": self._make, "losses": self._measure, "gradients": self._read, "score": self._score,
                "tasks": self._ask}
        return work[task["kind"]](self._session, task)

    def _prepare(self, order: Order) -> Session:
        prepared, plugins = _same_as(order)
        self._trust = Trust(order["remote_code"])
        before = None if self._measurer else self._session  # an exported folder has taken the weights' place
        self._session = None
        self._forget()
        runner = None
        if before and _model(before.prepared) == _model(prepared):
            before.bank.apply([None] * len(before.bank.layers))
            runner = before.runner
        return Session(prepared, plugins, runner)

    def _forget(self) -> None:
        """Let what belongs to the variants of a session go."""
        if self._measurer:
            self._measurer.close()
        self._variants_of, self._filling, self._games, self._probe, self._evaluators = "", None, {}, None, {}
        self._measurer = None

    def _have(self, session: Session, deployed: bool) -> None:
        """Load the variants of the game or the deployed ones; those that are not in the cache are made."""
        wanted = "deployed" if deployed and session.prepared.measures_another_backend else "game"
        if self._variants_of != wanted:
            self._forget()
            (session.quantize_deployed if wanted == "deployed" else session.quantize_for_game)()
            self._variants_of = wanted

    def _make(self, session: Session, task: Task) -> Answer:
        """Put the variants of a block into the cache."""
        wanted, block, prepared = f"making {task['deployed']}", task["block"], session.prepared
        if self._variants_of != wanted or self._filling is None or self._filling[1] > block:
            self._forget()
            filling = (session.filling(prepared.space, prepared.parts.backend, prepared.deployed_menus)
                       if task["deployed"] else
                       session.filling(prepared.game_space, prepared.game_backend, prepared.game_menus))
            self._variants_of = wanted
        else:
            filling, _ = self._filling
        filling.make(block, filling.missing(block))
        self._filling = filling, block
        return {}

    def _searching(self, session: Session, task: Task) -> Session:
        """The session for the windows of a task's search; what belongs to those of another search is let go."""
        search = (task["search"][0], task["search"][1]) if "search" in task else None
        if search != self._search:
            self._search, self._games, self._probe = search, {}, None
        return session.with_prepared(replace(session.prepared, search=search)) if search else session

    def _measure(self, session: Session, task: Task) -> Answer:
        """Absolute losses of picks on the windows of a set."""
        self._have(session, deployed=task["game"] != GAME)
        session = self._searching(session, task)
        if task["game"] not in self._games:
            self._games[task["game"]] = session.game() if task["game"] == GAME else session.refining(task["game"])
        game = self._games[task["game"]]
        return {"losses": game.measured(task["set"], np.array(task["picks"], dtype=np.int64)).tolist()}

    def _read(self, session: Session, task: Task) -> Answer:
        """Products of gradients of some windows."""
        self._have(session, deployed=False)
        session = self._searching(session, task)
        self._probe = self._probe or session.probe()
        return {"found": self._probe.read_windows(task["reading"], task["key"], *task["windows"])}

    def _score(self, session: Session, task: Task) -> Answer:
        """Scores of an allocation on the held-out texts, or on the windows that are held back."""
        self._have(session, deployed=True)
        if task["texts"] not in self._evaluators:
            session.bank.apply([None] * len(session.bank.layers))
            evaluator = session.evaluator(name=task["texts"])
            self._evaluators[task["texts"]] = [evaluator, evaluator.of_linears()]
        [scores] = self._evaluators[task["texts"]][task["linears"]].scores_of_texts(
            [[Choice(**choice) if choice else None for choice in task["choices"]]])
        return {"scores": [score.to_dict() for score in scores]}

    def _ask(self, session: Session, task: Task) -> Answer:
        """Values of a task of lm-eval on a model of a run or an exported folder."""
        self._measurer = self._measurer or Measurer(session, self._trust)
        return self._measurer.measure(task)


def _same_as(order: Order) -> tuple[Prepared, Plugins]:
    """The run of an order as this process prepares it, and its plugins.

    Raises:
        ImpqError: it is not the leader's run.
    """
    where = f"the worker on {socket.gethostname()} cannot take part"
    torch.set_num_threads(order["threads"])
    os.environ["IMPQ_CACHE"] = order["cache"]
    try:
        plugins = Plugins(map(Path, order["plugins"]))
        prepared = prepare(from_data(order["config"], "the leader's configuration"), plugins,
                           Trust(order["remote_code"]), order["calibrate"],
                           meterings=tuple(map(Metering.from_dict, order["meters"])))
    except ImpqError as error:
        raise ImpqError(f"{where}: {error}") from error
    processors = order["processor"], torch.backends.cpu.get_cpu_capability()
    changes = [Change("processor", *processors)] if len(set(processors)) > 1 else []
    require_same([*changes, *prepared.key.diff(order["key"])], order["threads"], where)
    return prepared, plugins


def require_same(changes: Sequence[Change], threads: int, where: str) -> None:
    """Raises ImpqError if facts of a worker differ from the leader's, or if it has another number of threads.

    Args:
        changes: from the leader's key to the worker's.
        threads: of the leader.
        where: what the message begins with.
    """
    if changes:
        first, *more = sorted(changes, key=lambda change: change.is_digest)  # readable facts first
        raise ImpqError(f"{where}: {first.name} is {first.now[:80]} there and {first.before[:80]} here"
                        + (f" (and {len(more)} more)" if more else "")
                        + ": give it the code, libraries, files and hardware of this process")
    if torch.get_num_threads() != threads:
        raise ImpqError(f"{where}: it has {torch.get_num_threads()} threads, and this process {threads}: give "
                        "--threads")


def _model(prepared: Prepared) -> list[object]:
    """What decides the loaded model."""
    config = prepared.config
    return [prepared.source.digest, config.device, config.dtype, config.memory]
