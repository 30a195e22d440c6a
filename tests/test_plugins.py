from __future__ import annotations

import importlib.metadata
import types
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest

from impq_core.config import RunConfig
from impq_core.errors import ImpqError, UsageError
from impq_core.hookspecs import Component, hookimpl
from impq_core.interfaces import Allocator, Estimator
from impq_core.parts import Parts, assign_options
from impq_core.plugins import Plugins, build_options


class _Entry:
    """An entry point of an imagined distribution."""

    def __init__(self, name: str, plugin: object, dist: str = "other") -> None:
        self.name, self._plugin = name, plugin
        self.dist = types.SimpleNamespace(name=dist)

    def load(self) -> object:
        if isinstance(self._plugin, BaseException):
            raise self._plugin
        return self._plugin


def _module(**functions: object) -> types.ModuleType:
    module = types.ModuleType("plugin")
    for name, function in functions.items():
        function.__name__ = name  # type: ignore[attr-defined]
        setattr(module, name, hookimpl(function))
    return module


def _with(*entries: _Entry) -> Plugins:
    return Plugins(entry_points=[*importlib.metadata.entry_points(group="impq"), *entries])  # type: ignore[list-item]


def test_first_party_plugins_come_through_the_same_door() -> None:
    found = Plugins()
    assert {"spqe"} <= set(found.names("estimator")) and {"gptq", "auto-gptq"} <= set(found.names("backend"))
    assert found.dropped == []
    assert found.find("backend", "auto-gptq").target == found.find("backend", "gptq").target
    assert "archived" in found.find("backend", "auto-gptq").notice


@pytest.mark.parametrize(("plugin", "reason"), [
    (ImportError("no module named 'zzz'"), "ImportError: no module named 'zzz'"),
    (SystemExit(3), "SystemExit"),
    (_module(impq_estimator=lambda: []), "unknown hook 'impq_estimator' (did you mean 'impq_estimators'?)"),
    (_module(impq_estimators=lambda: "spqe2"), "impq_estimators returned str, not a list of Components"),
    (_module(impq_backends=lambda: ["gptq2"]), "'gptq2', which is no Component"),
    (_module(impq_backends=lambda: 1 / 0), "ZeroDivisionError"),
    (_module(impq_run_started=lambda cfg: None), "cfg"),
])
def test_a_broken_plugin_is_dropped_with_its_reason_and_nothing_else_suffers(plugin: object, reason: str) -> None:
    good = _module(impq_estimators=lambda: [Component("mine", "json:JSONDecoder")])
    found = _with(_Entry("bad", plugin), _Entry("good", good))
    [dropped] = found.dropped
    assert dropped.name == "other:bad" and reason in dropped.reason
    assert {"spqe", "mine"} <= set(found.names("estimator"))


def test_a_taken_name_drops_the_newcomer() -> None:
    thief = _module(impq_estimators=lambda: [Component("spqe", "evil:Class"), Component("fresh", "json:JSONDecoder")])
    found = _with(_Entry("aaa", thief, dist="aaa"))
    [dropped] = found.dropped
    assert "spqe" in dropped.name and "taken by impq:spqe" in dropped.reason
    assert found.find("estimator", "spqe").target == "impq_spqe.sampler:Spqe"
    assert "fresh" in found.names("estimator")


def test_what_is_missing_or_wrong_is_said_when_chosen() -> None:
    offers = [Component("needy", "json:JSONDecoder", needs=("no_such_library",), extra="needy"),
              Component("nested", "json:JSONDecoder", needs=("no_such_package.library",)),
              Component("dangling", "json:NoSuchClass"), Component("gone", "no_such_module:Class"),
              Component("wrong", "json:JSONDecoder")]
    found = _with(_Entry("many", _module(impq_estimators=lambda: offers)))
    for name, reason in (("needy", r"needs no_such_library \(pip install 'impq\[needy\]'\)"),
                         ("nested", r"needs no_such_package\.library"),
                         ("dangling", "NoSuchClass"), ("gone", "no_such_module"), ("wrong", "is not an estimator"),
                         ("spqee", "did you mean 'spqe'")):
        with pytest.raises(ImpqError, match=reason):
            found.load("estimator", name, Estimator)


def test_a_plugin_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from impq_core.hookspecs import Component, hookimpl\n"
                    "from impq_core.interfaces import Allocator\n\nclass Mine(Allocator):\n"
                    "    def allocate(self, estimate, budget_bytes):\n        raise ValueError\n\n"
                    "@hookimpl\ndef impq_allocators():\n    return [Component('mine', f'{__name__}:Mine')]\n")
    assert Plugins([file]).load("allocator", "mine", Allocator).__name__ == "Mine"
    file.write_text("raise RuntimeError('half-written')")
    with pytest.raises(UsageError, match="half-written"):
        Plugins([file])
    with pytest.raises(UsageError, match="no such file"):
        Plugins([tmp_path / "none.py"])


def test_observers_watch_and_cannot_break_a_run() -> None:
    class Bad:
        @hookimpl
        def impq_progress(self, stage: str, done: int, total: int) -> None:
            raise RuntimeError("boom")

        @hookimpl
        def impq_run_started(self, config: object) -> None:
            raise ImpqError("store is gone")

    class Good:
        seen: list[int] = []  # noqa: RUF012

        @hookimpl
        def impq_progress(self, done: int) -> None:
            self.seen.append(done)

    found = Plugins()
    found.watch(Bad())
    found.watch(Good())
    with pytest.warns(RuntimeWarning, match="Bad failed in impq_progress: RuntimeError: boom"):
        found.notify("impq_progress", stage="x", done=3, total=4)
    assert Good.seen == [3]
    with pytest.raises(ImpqError, match="store is gone"):
        found.notify("impq_run_started", config=None, space=None, folder=None, coverage=1.0)


def test_observers_are_called_in_the_order_of_their_registration() -> None:
    called: list[int] = []

    class Observer:
        def __init__(self, number: int) -> None:
            self.number = number

        @hookimpl
        def impq_progress(self, done: int) -> None:
            called.append(self.number)

    plugins = Plugins(entry_points=[])
    for number in range(40):
        plugins.watch(Observer(number))
    plugins.notify("impq_progress", stage="x", done=0, total=1)
    assert called == list(range(40))


def test_two_plugin_files_of_one_name_are_two_plugins(tmp_path: Path) -> None:
    files = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        files.append(tmp_path / name / "mine.py")
        files[-1].write_text(
            "from impq_core.hookspecs import Component, hookimpl\nfrom impq_core.interfaces import Allocator\n\n"
            f"class Mine(Allocator):\n    origin = '{name}'\n    def allocate(self, estimate, budget_bytes): ...\n\n"
            f"@hookimpl\ndef impq_allocators():\n    return [Component('{name}', f'{{__name__}}:Mine')]\n")
    plugins = Plugins([*files, files[0].parent / ".." / "one" / "mine.py"])
    assert [plugins.load("allocator", name, Allocator).origin for name in ("one", "two")] == ["one", "two"]
    assert not plugins.dropped  # the third path names the first file


def test_a_plugin_whose_commands_fail_loses_only_them() -> None:
    offered = [types.SimpleNamespace(name="theirs")]
    plugins = Plugins(entry_points=[_Entry("bad", _module(impq_commands=lambda: 1 / 0)),  # type: ignore[list-item]
                                    _Entry("good", _module(impq_commands=lambda: offered))])  # type: ignore[list-item]
    assert list(plugins.commands()) == ["theirs"] and list(plugins.commands()) == ["theirs"]
    [dropped] = plugins.dropped
    assert "other:bad" in dropped.name and "ZeroDivisionError" in dropped.reason


@dataclass(frozen=True)
class _Options:
    count: int = 1
    share: float = 0.5
    flag: bool = False

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError("count must not be negative")


class _Part:
    Options = _Options


def test_options_are_converted_and_checked() -> None:
    build = lambda given: build_options(_Part, "estimator", "x", given)  # noqa: E731
    assert build({"count": "3", "share": "1", "flag": "on"}) == _Options(3, 1.0, True)
    for given, reason in (({"cuont": "3"}, "no option 'cuont' .*did you mean 'count'"),
                          ({"count": "many"}, "count of estimator 'x' takes int, not 'many'"),
                          ({"count": 1.5}, "takes int"), ({"flag": "perhaps"}, "takes bool"),
                          ({"count": "-1"}, "must not be negative")):
        with pytest.raises(UsageError, match=reason):
            build(given)


def test_options_find_their_part() -> None:
    found = Plugins()
    config = RunConfig(estimator="spqe")
    assert assign_options(config, found, {"permutations": "4", "allocator.seed": "2"}) == {
        "estimator": {"permutations": "4"}, "allocator": {"seed": "2"}}
    for key, reason in (("permutation", "did you mean 'permutations'"), ("allocater.gap", "did you mean 'allocator'")):
        with pytest.raises(UsageError, match=reason):
            assign_options(config, found, {key: "1"})
    with pytest.raises(UsageError, match="did you mean 'backend'"):
        Parts.build(RunConfig(options={"backends": {}}), found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [choice.bits for choice in Parts.build(RunConfig(bits=(2, 8, 3)), found).menu] == [8, 3, 2]
