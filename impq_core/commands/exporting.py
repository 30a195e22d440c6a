"""Exports of finished runs, as several commands make them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from impq_core.commands.output import Answer
from impq_core.config import RunConfig
from impq_core.plugins import Plugins
from impq_core.trust import Trust

if TYPE_CHECKING:
    from impq_core.interfaces import Exporter
    from impq_core.results import Exported


def load_exporters(config: RunConfig, names: tuple[str, ...], plugins: Plugins) -> list[Exporter]:
    """The exporters of a run's plans; raises ImpqError if a name is unknown, or if a format cannot hold the plans."""
    from impq_core.parts import Parts, load_exporter, require_ends

    options = Parts.build(config, plugins).options().get("backend", {})
    exporters = [load_exporter(name, config.backend, options, plugins) for name in names]
    if config.quantize_embeddings:
        for name, exporter in zip(names, exporters, strict=True):
            require_ends(exporter, name, "the embedding")
    return exporters


def export_plan(run: str, format: str, target: Path, plugins: Plugins, trust: Trust, device: str | None = None,
                memory: str | None = None) -> Exported:
    """Export the plan of a run, and print its score; raises ImpqError."""
    from impq_core.exports.export import export_run
    from impq_core.terminal import score_line

    exported = export_run(run, format, target, plugins, trust, device, memory)
    if exported.score:
        click.echo(f"quantized block by block, each behind the quantized ones: {score_line(exported.score)}")
        click.echo(size_line(exported))
        show_others(exported)
    click.echo(f"{format} in {exported.folder}")
    return exported


def export_answer(exported: Exported) -> Answer:
    """The answer of a command about an exported folder."""
    from impq_core.documents.runs import CheckpointDocument
    from impq_core.terminal import score_line

    scored = [score_line(exported.score)] if exported.score else []
    return Answer(CheckpointDocument.of(exported), [*scored, f"{exported.format} in {exported.folder}"])


def size_line(exported: Exported) -> str:
    """Text and sizes of an export."""
    return (f"on {exported.text}; {exported.nbytes / 1e6:.2f} MB of quantized weights in a file of "
            f"{exported.file_bytes / 1e6:.2f} MB")


def show_others(exported: Exported) -> None:
    """Print the scores on the texts behind the first."""
    from impq_core.terminal import score_line

    for name, score in exported.others.items():
        click.echo(f"on text {name}: {score_line(score)}")
