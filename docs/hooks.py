"""MkDocs hooks that publish measurements and examples, to which documents link as files of the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = {"benchmarks/results": ("*.md", "*.png"), "examples": ("*.md", "*.toml", "*.py", "*.ipynb")}
"""Folders beside docs/ with published files, and the patterns of the files. They keep their paths."""


def _files() -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for folder, patterns in OUTSIDE.items() for pattern in patterns
                  for path in (ROOT / folder).glob(pattern))


def on_config(config: Any) -> Any:
    """Add the measurements at the end of the navigation."""
    config.nav.append({"Measurements": [name for name in _files() if "results" in name and name.endswith(".md")]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the files of the folders outside docs/."""
    for name in _files():
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, **rest: Any) -> str:
    """Rewrite links from docs/ to the folders outside, which are inside the site."""
    up = "../" * page.file.src_uri.count("/")
    return re.sub(rf"\]\((?:\.\./)+({'|'.join(OUTSIDE)})/", rf"]({up}\1/", markdown)
