"""The documents: every command and snippet runs, every link leads somewhere, and the site builds.

``IMPQ_WRITE_DOCS=1 pytest tests/test_docs.py`` writes docs/reference.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import reference
from scenes import World
from snippets import ROOT, RUN, Block, Page, blocks_of, links_of, make_world

from impq_core import hookspecs
from impq_core.config import from_data
from impq_core.plugins import Plugins
from impq_core.tracking.store import experiments

PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
BLOCKS = {page: blocks_of(page) for page in PAGES}
TRACKED = ["docs/first-plan.md", "docs/mlflow.md"]
"""Pages whose commands keep their runs in the default tracking store, as a reader's do."""

OTHERS = ["CHANGELOG.md", "CONTRIBUTING.md", "examples/README.md"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("documents"))


@pytest.fixture(scope="module")
def open_page(made: World, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Page]:
    """Each document with its copy of the world; their runs record the model of the first copy, which is not changed."""
    pages: dict[str, Page] = {}

    def page(name: str) -> Page:
        if name not in pages:
            world = World(tmp_path_factory.mktemp(Path(name).stem) / "here", made.kept)
            world.here.mkdir()
            world.reset()
            if name in TRACKED:  # the others leave out MLflow, which takes a second a run
                toml = world.here / "impq.toml"
                toml.write_text(toml.read_text().replace('tracking_uri = "none"\n', ""))
            pages[name] = Page(world, BLOCKS[name])
        return pages[name]
    return page


@pytest.mark.parametrize("block", [block for blocks in BLOCKS.values() for block in blocks],
                         ids=lambda block: f"{block.page}:{block.line}")
def test_what_is_printed_runs(block: Block, open_page: Callable[[str], Page]) -> None:
    if block.skip:
        pytest.skip(block.skip)
    open_page(block.page).run(block)


@pytest.mark.parametrize("name", TRACKED)
def test_pages_track_their_runs_by_default(name: str, open_page: Callable[[str], Page]) -> None:
    page = open_page(name)
    page.run(page.blocks[-1])
    assert experiments(f"sqlite:///{page.world.here}/mlflow.db")


def test_no_block_escapes_the_test() -> None:
    """Fences that begin in the middle of a line, or code that is only indented, would not be run."""
    for page in PAGES:
        text = (ROOT / page).read_text()
        assert not re.search(r"^[ \t]+```", text, re.M), page
        assert len(re.findall(r"^```", text, re.M)) % 2 == 0, page
        outside = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
        assert not re.search(r"^    +\$? ?impq ", outside, re.M), page
    every_block = [block for blocks in BLOCKS.values() for block in blocks]
    assert sum(bool(block.skip) for block in every_block) < len(every_block) / 4, "too many blocks are skipped"


def test_the_pages_leave_nothing_out(made: World) -> None:
    """The handwritten lists are complete: parts, hooks, the files of a run, the arrays in them, the keys of a plan."""
    choosing, plugins, files = ((ROOT / "docs" / f"{name}.md").read_text() for name in ("choosing", "plugins", "files"))
    found = Plugins()
    for (role, name), offer in found.offers.items():
        page = files if role == "exporter" else choosing
        assert f"`{name}`" in page or not offer.origin.startswith("impq:"), f"{role} {name}"
    for name, hook in vars(hookspecs).items():
        if name.startswith("impq_"):
            taken = ", ".join(inspect.signature(hook).parameters)
            assert f"`{name}{f'({taken})' if taken else ''}`" in plugins, name
    run = made.kept / RUN
    assert all(f"`{path.name}" in files for path in run.iterdir() if not path.name.startswith("."))
    for name in ("measurements.npz", "estimate.npz"):
        with np.load(run / name) as arrays:
            assert all(f"`{array}`" in files for array in arrays), name
    [plan] = re.findall(r"^```json\n(.*?)^```$", files, re.M | re.S)
    assert json.loads(plan).keys() == json.loads((run / "plan.json").read_text()).keys()
    [settings] = re.findall(r"^```toml\n(.*?)^```$", files, re.M | re.S)
    from_data(tomllib.loads(settings), "files.md")


def test_the_tree_names_every_module() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    tree = text[text.index("## The tree"):]
    modules = [path.stem for path in (ROOT / "impq_core").iterdir() if not path.name.startswith("_") and (
        path.suffix == ".py" or (path / "__init__.py").exists())]
    plugins = [path.name for path in (ROOT / "plugins").glob("impq_*")]
    helpers = [path.stem for path in (ROOT / "tests").glob("*.py") if not path.name.startswith(("test_", "conftest"))]
    assert [name for name in (*modules, *plugins, *helpers) if not re.search(rf"\b{name}\b", tree)] == []


@pytest.mark.parametrize("page", [*PAGES, *OTHERS])
def test_links_lead_to_files_and_headings(page: str) -> None:
    for target in links_of(page):
        name, _, anchor = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings], target


@pytest.mark.parametrize("name", reference.PAGES)
def test_the_reference_is_what_the_code_says(name: str) -> None:
    page = ROOT / "docs" / "reference" / name
    text = reference.PAGES[name]()
    if os.environ.get("IMPQ_WRITE_DOCS") == "1":
        page.parent.mkdir(exist_ok=True)
        page.write_text(text)
    assert page.read_text() == text


def test_the_site_builds_without_a_warning_and_asks_nothing_of_other_hosts(tmp_path: Path) -> None:
    site = tmp_path / "site"
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)], cwd=ROOT,
                          capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    for page in ("index", "first-plan/index", "reference/commands/index", "benchmarks/results/spine/index"):
        html = (site / f"{page}.html").read_text()
        assert not re.findall(r"<(?:script|img|iframe)[^>]+src=\"https?:[^\"]+", html), page
        assert not re.findall(r"<link[^>]+rel=\"(?:stylesheet|preconnect|preload)\"[^>]+href=\"https?:", html), page
