"""Faulty plugin distributions: each is named and dropped, and impq works without it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from scenes import World

HEAD = "from impq_core.hookspecs import Component, hookimpl\n"
PART = """
import numpy as np
from impq_core.interfaces import Allocator, Backend, Inspector, Refiner, Sampler, Surrogate
from dataclasses import dataclass
from impq_core.space import Choice
from impq_core.types import SensitivityEstimate
"""


@dataclass(frozen=True)
class Hostile:
    """A distribution ``impq-NAME`` with a faulty module.

    Args:
        source: of the module.
        listed: the beginning of its line under "not used" in ``impq plugins``; empty if only its use shows the fault.
        chosen: options that choose it.
        key: what the error of ``impq run`` with these options must contain.
        code: the exit code of that run.
    """

    source: str
    listed: str = ""
    chosen: str = ""
    key: str = ""
    code: int = 1


def offer(role: str, target: str, name: str = "theirs") -> str:
    return f"{HEAD}@hookimpl\ndef impq_{role}s():\n    return [Component('{name}', '{target}', 'a part')]\n"


def returning(role: str, base: str, method: str, value: str = "None") -> str:
    return offer(role, "{0}:Theirs") + PART + (f"class Theirs({base}):\n    def {method}(self, *args, **named):\n"
                                               f"        return {value}\n")


PLUGINS = {
    "exploding": Hostile("raise RuntimeError('no licence')", "impq-exploding:exploding: RuntimeError: no licence",
                         "--estimator exploding", "'exploding'", 2),
    "exiting": Hostile("import sys; sys.exit(3)", "impq-exiting:exiting: SystemExit: 3"),
    "misspelt": Hostile(HEAD + "@hookimpl\ndef impq_estimator():\n    return []\n",
                        "impq-misspelt:misspelt: unknown hook 'impq_estimator'"),
    "clashing": Hostile(offer("estimator", "impq_clashing:Theirs", "spqe"),
                        "estimator 'spqe' of impq-clashing:clashing: "),
    "dangling": Hostile(offer("allocator", "impq_dangling.nowhere:Theirs"), "", "--allocator theirs",
                        "allocator 'theirs' of impq-dangling:dangling"),
    "unpacked": Hostile(returning("backend", "Backend", "quantize") + """
    default_bits = ("8", "4")
    def choices(self): return tuple(Choice(bits, 0) for bits in (8.0, 4.0))
    def check(self, linear, choice): pass
    def nbytes(self, linear, choice): return linear.parameters
    def dequantize(self, variant, linear): pass
""", "", "--backend theirs --bits 4,8", "impq_unpacked.Theirs.quantize returned NoneType"),
    "misshapen": Hostile(returning("estimator", "Inspector", "inspect",
                                   "SensitivityEstimate(args[0].space, np.zeros((5, 5)))"), "", "--estimator theirs",
                         "impq_misshapen.Theirs.inspect"),
    "enlisted": Hostile(offer("estimator", "{0}:Theirs") + PART + """
class Theirs(Inspector):
    @dataclass(frozen=True)
    class Options:
        depths: list = None
    def inspect(self, probe, rng): ...
""", "", "--estimator theirs -o depths=3", "option depths of estimator 'theirs'"),
    "silent": Hostile("def impq_estimators():\n    return []\n", "impq-silent:silent: "),
    "mistyped": Hostile(HEAD + "@hookimpl\ndef impq_backends():\n    return 'gptq2'\n",
                        "impq-mistyped:mistyped: impq_backends"),
    "empty-handed": Hostile(returning("estimator", "Inspector", "inspect"), "", "--estimator theirs",
                            "impq_empty_handed.Theirs.inspect returned NoneType"),
    "unsampled": Hostile(returning("estimator", "Sampler", "sample", "[1.0]"), "", "--estimator theirs",
                         "impq_unsampled.Theirs.sample returned list"),
    "unfitted": Hostile(returning("surrogate", "Surrogate", "fit"), "", "--estimator spqe --surrogate theirs",
                        "impq_unfitted.Theirs.fit returned NoneType"),
    "planless": Hostile(returning("allocator", "Allocator", "allocate", "np.zeros(2)"), "", "--allocator theirs",
                        "impq_planless.Theirs.allocate returned ndarray"),
    "unrefined": Hostile(returning("refiner", "Refiner", "refine"), "", "--refine 8 --refiner theirs",
                         "impq_unrefined.Theirs.refine returned NoneType"),
    "crashing": Hostile(offer("estimator", "impq_crashing:Theirs") + PART + "class Theirs(Inspector):\n"
                        "    def inspect(self, probe, rng):\n        raise KeyError('layer 7')\n", "",
                        "--estimator theirs",
                        "KeyError: 'layer 7' (this is a bug of impq-crashing"),
}


def install(folder: Path, name: str) -> str:
    """Put a distribution where Python finds it, as a wheel's files would be."""
    module = f"impq_{name.replace('-', '_')}"
    (folder / f"{module}.py").write_text(PLUGINS[name].source.replace("{0}", module))
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: impq-{name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[impq]\n{name} = {module}\n")
    return str(folder)


@pytest.fixture(scope="module")
def everyone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where all of them are installed at once."""
    folder = tmp_path_factory.mktemp("site")
    for name in PLUGINS:
        install(folder, name)
    return str(folder)


def test_what_cannot_be_used_is_listed_with_its_reason_and_the_rest_is_there(world: World, everyone: str,
                                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    world.reset()
    monkeypatch.syspath_prepend(everyone)
    answer = world.ask("plugins")
    assert answer.code == 0 and not answer.err, answer
    used, _, dropped = answer.out.partition("not used\n")
    for plugin in PLUGINS.values():
        assert not plugin.listed or f"  {plugin.listed}" in dropped, dropped
    for name in ("spqe", "aumann-shapley", "auto", "qp", "gptq", "swaps"):
        assert f"  {name} " in used


def test_a_run_without_them_works(world: World, everyone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world.reset()
    monkeypatch.syspath_prepend(everyone)
    answer = world.ask("run --estimator zscore --tracking-uri none")
    assert answer.code == 0 and "plan:" in answer.out, answer
    assert all(line.startswith("warning: plugin ") for line in answer.err.splitlines()), answer.err
    assert "impq-misspelt:misspelt is not used: unknown hook" in answer.err


@pytest.mark.parametrize("name", [name for name, plugin in PLUGINS.items() if plugin.chosen])
def test_a_run_with_one_names_the_plugin_at_fault(name: str, world: World, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    world.reset()
    plugin = PLUGINS[name]
    monkeypatch.syspath_prepend(install(tmp_path, name))
    answer = world.ask(f"run {plugin.chosen} --tracking-uri none")
    assert answer.code == plugin.code and plugin.key in answer.err, answer
    assert len(answer.err.strip().splitlines()) == 1, answer.err


def test_an_estimate_upside_down_is_wondered_at(world: World) -> None:
    world.reset()
    hooks = offer("estimator", "{0}:Theirs").replace("'{0}:Theirs'", "f'{__name__}:Theirs'")
    (world.here / "mine.py").write_text(hooks + PART + """
class Theirs(Inspector):
    def inspect(self, probe, rng):
        costs = np.zeros(probe.space.nbytes.shape)
        costs[:, 1:] = -1.0
        return SensitivityEstimate(probe.space, costs, method="theirs")
""")
    answer = world.ask("run --plugin mine.py --estimator theirs --tracking-uri none")
    assert answer.code == 0 and "is a sign wrong?" in answer.err, answer
    assert "(this is uniform 2)" in answer.out
