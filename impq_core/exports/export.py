"""Exports: the folder of a model with the planned weights replaced, and such folders measured again.

The variants of a run are quantized behind a prefix at the widest choice. For an export the plan is quantized once more,
block after block, each behind the quantized ones; the score in the manifest is the score of that model.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from impq_core.config import RunConfig, from_data, override, unmetered
from impq_core.errors import ImpqError
from impq_core.evaluate import Evaluator
from impq_core.exports.manifest import FORMAT, MANIFEST, check_target, read_manifest
from impq_core.files import scratch_folder, write_text
from impq_core.interfaces import Checkpoint, Exporter
from impq_core.model.bank import Assignment
from impq_core.model.device import resolve_dtype
from impq_core.model.linears import FromConv1D
from impq_core.model.names import file_names
from impq_core.model.outline import outline, stored_dtype, stored_widths, unpacked_dtype
from impq_core.parts import load_exporter, require_ends
from impq_core.plugins import Plugins
from impq_core.results import Exported, Score
from impq_core.runs.folder import RunFolder, recorded
from impq_core.runs.layout import Layout, lay_out
from impq_core.runs.prepare import prepare
from impq_core.runs.session import Session
from impq_core.trust import NO_TRUST, Trust
from impq_core.types import Plan

if TYPE_CHECKING:
    import torch


def export_run(run: str | Path, name: str, target: Path | None = None, plugins: Plugins | None = None,
               trust: Trust = NO_TRUST, device: str | None = None, memory: str | None = None) -> Exported:
    """Export the plan of a finished run.

    Args:
        run: a run folder.
        name: the format.
        target: a folder that is missing or empty; RUN/FORMAT by default. The files appear there when all are written.
        plugins: exporters and observers; the installed plugins by default.
        trust: what the caller permits.
        device: where blocks compute; the run's device by default.
        memory: what the export may take; what the run might by default.

    Raises:
        ImpqError: an error that the user can correct.
    """
    plugins = plugins or Plugins()
    source = RunFolder.open(run, "plan.json")
    target = target or source.path / name
    config = override(unmetered(source.read_config()), plan=str(source.plan), device=device, memory=memory)
    exporter = load_exporter(name, config.backend, config.options.get("backend", {}), plugins)
    check_target(target)
    prepared = prepare(config, plugins, trust)
    plan, score, others = prepared.plan, None, dict[str, Score]()
    assert plan is not None
    _require_ends(exporter, name, prepared, plan)
    if exporter.backends:
        session = Session(prepared, plugins)
        checkpoint = _outline(session, plan, exporter)
        _require_names(session, checkpoint)
        exporter.file_bytes(checkpoint)  # refuses what the format does not hold, before anything is quantized
        evaluator = session.evaluator_of_exports()
        session.quantize_plan(plan)
        if exporter.packed:
            score, others = _scores(evaluator, prepared.space.assignment(plan.pick))
        checkpoint = make_checkpoint(session, checkpoint, exporter)
    else:
        bare = bare_checkpoint(plan, config.backend, prepared.config.options.get("backend", {}))
        checkpoint = replace(bare, widths=stored_widths(plan, prepared.parts.backend), config=prepared.source.config(),
                             files=prepared.source.folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(target.parent, target.name) as scratch:
        work = scratch / "export"
        work.mkdir()
        if exporter.backends:
            prepared.source.copy_files(work, exporter.copies)
        exporter.export(checkpoint, work)
        if exporter.backends:
            _require_size(exporter, name, checkpoint, work)
        if exporter.backends and not exporter.packed:  # values rounded to 16 bits: the score is that of the file
            score, others = _score_dense(session, evaluator, exporter.dense(work, checkpoint), work)
        plan.save(work / "plan.json")
        write_text(work / MANIFEST, json.dumps({
            "format": FORMAT, "exporter": name, "run": _plain(asdict(recorded(prepared.config))),
            "text": str(prepared.evaluation), "score": _numbers(score) if score else None, "bytes": plan.nbytes,
            "file_bytes": _file_bytes(exporter, work)}, indent=1) + "\n")
        for file in work.iterdir():
            file.chmod(0o644)  # safetensors and temporary files are readable by their owner alone
        if target.exists():
            target.rmdir()
        work.rename(target)
    exported = Exported(target, name, score, str(prepared.evaluation), plan.nbytes, _file_bytes(exporter, target),
                        others)
    plugins.notify("impq_exported", exported=exported, run=source.path)
    return exported


def _require_ends(exporter: Exporter, name: str, layout: Layout, plan: Plan) -> None:
    """Raises ImpqError if the plan has a quantized embedding or head, and the format cannot hold it."""
    for layer in layout.ends:
        if plan.widths()[layer.name]:
            require_ends(exporter, name, layer.name)


def _require_size(exporter: Exporter, name: str, checkpoint: Checkpoint, folder: Path) -> None:
    """Raises ImpqError if an export is larger than the format or the plan promised."""
    written, promised = _file_bytes(exporter, folder), [exporter.file_bytes(checkpoint)]
    if checkpoint.plan.file_bytes is not None and exporter.packed:
        promised.append(checkpoint.plan.file_bytes)
    if written > min(promised):
        raise ImpqError(f"bug of format '{name}': its file takes {written} bytes, more than the {min(promised)} that "
                        "were promised")


def _outline(session: Session, plan: Plan, exporter: Exporter) -> Checkpoint:
    prepared = session.prepared
    return outline(prepared.source, session.runner.model, plan, prepared.config.backend, prepared.parts.backend,
                   session.dtype, exporter.packed)


def check_formats(config: RunConfig, names: Sequence[str], plugins: Plugins, trust: Trust = NO_TRUST) -> None:
    """Check, before a run, that formats will hold its plans, as far as that is known from shapes and tokenizer.

    Args:
        config: of the run.
        names: of the formats.
        plugins: the source of the parts.
        trust: what the caller permits.

    Raises:
        ImpqError: a format does not hold plans of this model, layers and backend.
    """
    options = config.options.get("backend", {})
    exporters = [load_exporter(name, config.backend, options, plugins) for name in names]
    if not exporters:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run will say it
        layout = lay_out(unmetered(config), plugins, trust)
        ends = (0, len(layout.space.choices) - 1)
        pick = np.array([ends[layer % 2] for layer in range(len(layout.space))])  # neighbours differ
        plan = layout.plan or Plan(layout.space, pick, layout.space.bytes_of(pick))
        for name, exporter in zip(names, exporters, strict=True):
            _require_ends(exporter, name, layout, plan)
        if not any(exporter.backends for exporter in exporters):
            return
        model, dtype = layout.source.without_weights(), resolve_dtype(layout.config.dtype, layout.device)
        for exporter in exporters:
            if exporter.backends:
                exporter.file_bytes(outline(layout.source, model, plan, config.backend, layout.parts.backend, dtype,
                                            exporter.packed))  # refuses what the format does not hold


def bare_checkpoint(plan: Plan, backend: str, options: Mapping[str, Any]) -> Checkpoint:
    """A checkpoint without tensors, whose linears have their names in the model.

    Args:
        plan: the plan.
        backend: name of the backend of the plan.
        options: its options.
    """
    return Checkpoint(plan, plan.widths(), {spec.name: spec for layer in plan.space.everyone for spec in layer.linears},
                      {}, {}, {}, backend, options, Path())


def _planned(checkpoint: Checkpoint) -> set[str]:
    return {f"{name}.weight" for name, choice in checkpoint.widths.items() if choice is not None}


def _require_names(session: Session, checkpoint: Checkpoint) -> None:
    """Raises ImpqError if a planned weight is not in the model's files under a name of its own."""
    source = session.prepared.source
    if lacking := _planned(checkpoint) - {name for name, _ in source.tensors()}:
        raise ImpqError(f"model {source.name} holds no weight named {min(lacking)} in its files: an export replaces "
                        "weights that have a name of their own there, which fused experts have not")


def make_checkpoint(session: Session, checkpoint: Checkpoint, exporter: Exporter) -> Checkpoint:
    """A checkpoint with the variants of its plan, packed or not, and every other tensor of the model's files.

    Args:
        session: holds the variants of the plan.
        checkpoint: the outline, without weights.
        exporter: of the format.

    Raises:
        ImpqError: an unpacked weight overflows 16 bits.
    """
    planned, dense = _planned(checkpoint), {}
    for tensor_name, tensor in session.prepared.source.tensors():
        if tensor_name not in planned:
            dense[tensor_name] = tensor.to(stored_dtype(tensor, session.dtype))
        elif not exporter.packed:
            dense[tensor_name] = _unpacked(session, checkpoint, tensor_name, unpacked_dtype(tensor, session.dtype))
    if not exporter.packed:
        return replace(checkpoint, dense=dense)
    variants = {name: session.bank.stored(checkpoint.specs[name], choice)
                for name, choice in checkpoint.widths.items() if choice is not None}
    return replace(checkpoint, variants=variants, dense=dense)


def _unpacked(session: Session, checkpoint: Checkpoint, tensor_name: str, dtype: torch.dtype) -> torch.Tensor:
    """The quantized values of a planned weight, in the form that the weight has in the model's files."""
    name = tensor_name.removesuffix(".weight")
    spec, choice = checkpoint.specs[name], checkpoint.widths[name]
    assert choice is not None
    weight = session.bank.variant(spec, choice).to(dtype).cpu()
    if not weight.isfinite().all():
        raise ImpqError(f"the quantized values of {name} overflow {str(dtype).removeprefix('torch.')}: run with "
                        "--dtype bfloat16")
    return weight.T if isinstance(session.bank.module(spec), FromConv1D) else weight


def _score_dense(session: Session, evaluator: Evaluator, stored: Mapping[str, Callable[[], torch.Tensor]],
                 folder: Path) -> tuple[Score, dict[str, Score]]:
    """The score of the model with the tensors of a folder, none of which is packed."""
    unquantized = [None] * len(session.bank.layers)
    session.bank.apply(unquantized)
    _load_dense(session, stored, folder)
    return _scores(evaluator, unquantized)


def _scores(evaluator: Evaluator, assignment: Assignment) -> tuple[Score, dict[str, Score]]:
    """The score of an allocation on the first held-out text, and those on the others by their names."""
    [scores] = evaluator.scores_of_texts([assignment])
    return scores[0], {text.name: score for text, score in zip(evaluator.texts[1:], scores[1:], strict=True)}


def evaluate_folder(path: str | Path, plugins: Plugins | None = None, trust: Trust = NO_TRUST, device: str = "auto",
                    memory: str = "", **text: str | int | tuple[str, ...] | None) -> Exported:
    """Load an exported folder and score it on held-out text, against the unquantized model it was made from.

    Args:
        path: a folder that an export wrote.
        plugins: exporters and backends; the installed plugins by default.
        trust: what the caller permits.
        device: where blocks compute.
        memory: what the evaluation may take; empty for what is free.
        text: settings of the held-out texts that differ from the run's: ``evaluation``, ``evaluation_windows`` ...

    Raises:
        ImpqError: impq did not write the folder, its format holds no weights, or a file is missing or damaged.
    """
    plugins = plugins or Plugins()
    folder = Path(path)
    manifest = read_manifest(folder)
    name = manifest["exporter"]
    config = override(unmetered(from_data(manifest["run"], str(folder / MANIFEST))), plan=str(folder / "plan.json"),
                      device=device, memory=memory, **text)
    exporter = load_exporter(name, config.backend, config.options.get("backend", {}), plugins)
    prepared = prepare(config, plugins, trust, calibrate=False)
    plan = prepared.plan
    assert plan is not None
    session = Session(prepared, plugins)
    evaluator = session.evaluator_of_exports()
    score, others = _scores(evaluator, put_export(session, exporter, plan, folder))
    return Exported(folder, name, score, str(prepared.evaluation), plan.nbytes, _file_bytes(exporter, folder), others)


def put_export(session: Session, exporter: Exporter, plan: Plan, folder: Path) -> Assignment:
    """Give a session the weights of an exported folder. Those that the folder does not pack take the place of the
    unquantized model's, which the session then has no longer.

    Returns:
        The allocation of the session's bank with which its model is the folder's.

    Raises:
        ImpqError: a file is missing or damaged.
    """
    checkpoint, unquantized = _outline(session, plan, exporter), [None] * len(session.bank.layers)
    for name, variant in exporter.restore(folder, checkpoint).items():
        session.bank.add(checkpoint.specs[name], variant)
    session.bank.apply(unquantized)
    _load_dense(session, exporter.dense(folder, checkpoint), folder)
    return session.prepared.space.assignment(plan.pick) if exporter.packed else unquantized


def _load_dense(session: Session, stored: Mapping[str, Callable[[], torch.Tensor]], folder: Path) -> None:
    """Give the model the tensors of an exported folder that it stores one to one, as its own.

    Args:
        session: has the model.
        stored: reads each tensor, by its name in the model's files.
        folder: the export.
    """
    model = session.runner.model
    state = model.state_dict(keep_vars=True)
    names = file_names(model, state)
    conv1d = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, FromConv1D)}
    for name, values in state.items():
        if names.get(name) in stored:
            read = stored[names[name]]
            read = partial(_transposed, read) if name in conv1d else read
            tensor = read()
            if tensor.shape != values.shape:
                raise ImpqError(f"{folder} does not fit the model it was made from: {name} is {tuple(tensor.shape)}, "
                                f"not {tuple(values.shape)}")
            if values.is_meta:
                session.runner.placement.read_from(values, read)
            else:
                values.data.copy_(tensor)


def _transposed(read: Callable[[], torch.Tensor]) -> torch.Tensor:
    return read().T


def _file_bytes(exporter: Exporter, folder: Path) -> int:
    """Bytes of the files with the model's tensors; 0 for a recipe."""
    return sum(file.stat().st_size for file in exporter.files(folder))


def _plain(data: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(data))  # type: ignore[no-any-return]


def _numbers(score: Score) -> dict[str, float]:
    return {"nll": score.nll, "nll_stderr": score.stderr, "perplexity": score.perplexity, "kl": score.kl,
            "top1_agreement": score.top1}
