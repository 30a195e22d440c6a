"""Templates of ``impq plugins new``, which writes a working plugin with tests as a start."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import MappingProxyType

from jinja2 import Environment, StrictUndefined

from impq_core.errors import UsageError, nearest
from impq_core.files import scratch_folder
from impq_core.plugins import Plugins

SUMMARIES = MappingProxyType({
    "estimator": "squared error of the weights",
    "surrogate": "least squares on the steps taken",
    "allocator": "demotions by least loss per byte",
    "refiner": "random exchanges between two layers",
    "backend": "rounding in groups: 8, 4 or 2 bits",
})
"""Kinds of components that a plugin can start with, and the summary of each template."""


def files_of(name: str, kinds: Sequence[str]) -> dict[str, str]:
    """Contents by path of a distribution ``impq-NAME`` with a part of each kind, all called ``name``."""
    facts = {"name": name, "package": "impq_" + name.replace("-", "_"), "kinds": kinds, "alone": False,
             "summaries": SUMMARIES}
    package = str(facts["package"])
    return {"README.md": _render("README.md", facts), "pyproject.toml": _render("pyproject.toml", facts),
            f"{package}/__init__.py": _render("package.py", facts),
            **{f"{package}/{kind}.py": _render(f"{kind}.py", facts) for kind in kinds},
            "tests/test_plugin.py": _render("test_plugin.py", facts)}


def single_file(name: str, kind: str) -> str:
    """A plugin in one file, for ``--plugin``."""
    return _render(f"{kind}.py", {"name": name, "package": "", "kinds": [kind], "alone": True,
                                     "summaries": SUMMARIES})


def write_plugin(target: str, kinds: Sequence[str], plugins: Plugins) -> list[Path]:
    """Write a plugin, whole or not at all.

    Args:
        target: a name, for a folder ``impq-NAME`` in the working folder; or a path that ends in ``.py``, for a single
            file.
        kinds: the kinds of its components.
        plugins: the installed plugins; the name must differ from the names of their components of the same kind.

    Returns:
        The files.

    Raises:
        UsageError: the name is invalid or in use, a kind is unknown, the folder or file exists already, or a single
            file is to hold several kinds.
    """
    single = target.endswith(".py")
    name = Path(target).stem.replace("_", "-") if single else target
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise UsageError(f"'{name}' is no name for a plugin: use small letters, digits and hyphens, such as "
                         "'my-estimator'")
    for kind in kinds:
        if kind not in SUMMARIES:
            raise UsageError(f"--kind takes {', '.join(SUMMARIES)}, not '{kind}'{nearest(kind, SUMMARIES)}")
        if (kind, name) in plugins.offers:
            raise UsageError(f"the {kind} '{name}' exists already, from {plugins.offers[kind, name].origin}: "
                             "choose another name")
    if single and len(set(kinds)) > 1:
        raise UsageError(f"a single file holds one part: give --kind once, or 'impq plugins new {name}' for a package")
    place = Path(target if single else f"impq-{name}")
    if place.exists():
        raise UsageError(f"{place} exists already: choose another name, or delete it")
    if not place.parent.is_dir():
        raise UsageError(f"there is no folder {place.parent} to write {place.name} in")
    if single:
        place.write_text(single_file(name, kinds[0]))
        return [place]
    files = files_of(name, [kind for kind in SUMMARIES if kind in kinds])
    with scratch_folder(place.parent, place.name) as scratch:
        _fill(scratch / "plugin", files)
        (scratch / "plugin").rename(place)
    return [place / path for path in files]


def _fill(folder: Path, files: Mapping[str, str]) -> None:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content)


def _render(template: str, facts: Mapping[str, object]) -> str:
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
                              keep_trailing_newline=True, autoescape=False)  # Python and TOML, not HTML
    environment.filters["camel"] = lambda name: "".join(word.capitalize() for word in name.split("-"))
    text = resources.files("impq_core.skeleton").joinpath(f"{template}.jinja").read_text(encoding="utf-8")
    return environment.from_string(text).render(facts)
