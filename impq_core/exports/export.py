"""Exports: the folder of a model with the planned weights replaced, and such folders measured again.

The variants of a run are quantized behind a prefix at the widest choice. For an export the plan is quantized once more,
block after block, each behind the quantized ones; the score in the manifest is the score of that model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from impq_core.config import from_data, override
from impq_core.errors import ImpqError, one_line
from impq_core.exports.checkpoint import WEIGHTS, read_model, tensor_names
from impq_core.exports.manifest import FORMAT, MANIFEST, check_target, read_manifest
from impq_core.files import scratch_folder, write_text
from impq_core.interfaces import Checkpoint
from impq_core.model.linears import FromConv1D
from impq_core.model.names import file_names
from impq_core.model.placement import Stored
from impq_core.parts import load_exporter
from impq_core.plugins import Plugins
from impq_core.results import Exported, Score
from impq_core.runs.folder import RunFolder, recorded
from impq_core.runs.prepare import prepare
from impq_core.runs.session import Session
from impq_core.trust import NO_TRUST, Trust
from impq_core.types import Plan


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
    config = override(source.read_config(), plan=str(source.plan), device=device, memory=memory)
    exporter = load_exporter(name, config.backend, config.options.get("backend", {}), plugins)
    check_target(target)
    prepared = prepare(config, plugins, trust)
    plan, score = prepared.plan, None
    assert plan is not None
    checkpoint = bare_checkpoint(plan, config.backend, prepared.config.options.get("backend", {}))
    if exporter.backends:
        session = Session(prepared, plugins)
        _require_names(session, plan)
        evaluator = session.evaluator_of_exports()
        session.quantize_plan(plan)
        score = evaluator.score(prepared.space.assignment(plan.pick))
        checkpoint = make_checkpoint(session, plan)
    target.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(target.parent, target.name) as scratch:
        work = scratch / "export"
        work.mkdir()
        if exporter.backends:
            prepared.source.copy_files(work)
        exporter.export(checkpoint, work)
        plan.save(work / "plan.json")
        write_text(work / MANIFEST, json.dumps({
            "format": FORMAT, "exporter": name, "run": _plain(asdict(recorded(prepared.config))),
            "text": str(prepared.evaluation), "score": _numbers(score) if score else None}, indent=1) + "\n")
        for file in work.iterdir():
            file.chmod(0o644)  # safetensors and temporary files are readable by their owner alone
        if target.exists():
            target.rmdir()
        work.rename(target)
    exported = Exported(target, name, score, str(prepared.evaluation), plan.nbytes, _file_bytes(target))
    plugins.notify("impq_exported", exported=exported, run=source.path)
    return exported


def bare_checkpoint(plan: Plan, backend: str, options: Mapping[str, Any],
                    names: Mapping[str, str] = MappingProxyType({})) -> Checkpoint:
    """A checkpoint without tensors.

    Args:
        plan: the plan.
        backend: name of the backend of the variants.
        options: its options.
        names: names of weights in the model's files, by their names in the model; other weights have one name.
    """
    specs = {spec.name: spec for layer in plan.space.everyone for spec in layer.linears}
    in_files = {name: names.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight") for name in specs}
    return Checkpoint(plan, {in_files[name]: choice for name, choice in plan.widths().items()},
                      {in_files[name]: spec for name, spec in specs.items()}, {}, {}, {}, backend, options)


def _names(session: Session) -> dict[str, str]:
    return file_names(session.runner.model, session.runner.model.state_dict())


def _bare(session: Session, plan: Plan) -> Checkpoint:
    prepared = session.prepared
    return bare_checkpoint(plan, prepared.config.backend, asdict(prepared.parts.backend.options), _names(session))


def _planned(bare: Checkpoint) -> set[str]:
    return {f"{name}.weight" for name, choice in bare.widths.items() if choice is not None}


def _require_names(session: Session, plan: Plan) -> None:
    """Raises ImpqError if a planned weight is not in the model's files under a name of its own."""
    source = session.prepared.source
    if lacking := _planned(_bare(session, plan)) - {name for name, _ in source.tensors()}:
        raise ImpqError(f"model {source.name} holds no weight named {min(lacking)} in its files: an export replaces "
                        "weights that have a name of their own there, which fused experts have not")


def make_checkpoint(session: Session, plan: Plan) -> Checkpoint:
    """The packed variants of a plan, and every other tensor of the model's files under its own name.

    Floats wider than the dtype of the run are stored in that dtype, as they were measured.
    """
    prepared = session.prepared
    bare = _bare(session, plan)
    planned = _planned(bare)
    dense = {}
    for name, tensor in prepared.source.tensors():
        if name in planned:
            continue
        if tensor.is_floating_point() and tensor.dtype.itemsize > session.dtype.itemsize:
            dense[name] = tensor.to(session.dtype)
        else:
            dense[name] = tensor
    config = prepared.source.config()
    stored = {tensor.dtype for tensor in dense.values() if tensor.is_floating_point()}
    if len(stored) == 1:
        config.pop("torch_dtype", None)
        config["dtype"] = str(stored.pop()).removeprefix("torch.")
    variants = {name: session.bank.stored(bare.specs[name], choice)
                for name, choice in bare.widths.items() if choice is not None}
    return replace(bare, variants=variants, dense=dense, config=config)


def evaluate_folder(path: str | Path, plugins: Plugins | None = None, trust: Trust = NO_TRUST, device: str = "auto",
                    memory: str = "", **text: str | int | None) -> Exported:
    """Load an exported folder and score it on held-out text, against the unquantized model it was made from.

    Args:
        path: a folder that an export wrote.
        plugins: exporters and backends; the installed plugins by default.
        trust: what the caller permits.
        device: where blocks compute.
        memory: what the evaluation may take; empty for what is free.
        text: settings of the held-out text that differ from the run's: ``evaluation``, ``evaluation_windows`` ...

    Raises:
        ImpqError: impq did not write the folder, its format holds no weights, or a file is missing or damaged.
    """
    plugins = plugins or Plugins()
    folder = Path(path)
    manifest = read_manifest(folder)
    name = manifest["exporter"]
    config = override(from_data(manifest["run"], str(folder / MANIFEST)), plan=str(folder / "plan.json"),
                      device=device, memory=memory, **text)
    exporter = load_exporter(name, config.backend, config.options.get("backend", {}), plugins)
    prepared = prepare(config, plugins, trust, calibrate=False)
    plan = prepared.plan
    assert plan is not None
    session = Session(prepared, plugins)
    evaluator = session.evaluator_of_exports()
    bare = _bare(session, plan)
    for file_name, variant in exporter.restore(folder, bare).items():
        session.bank.add(bare.specs[file_name], variant)
    _load_dense(session, folder)
    score = evaluator.score(prepared.space.assignment(plan.pick))
    return Exported(folder, name, score, str(prepared.evaluation), plan.nbytes, _file_bytes(folder))


def _load_dense(session: Session, folder: Path) -> None:
    """Give the model the unquantized tensors of an exported folder that it stores one to one."""
    model, names, stored = session.runner.model, _names(session), tensor_names(folder)
    transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, FromConv1D)}
    dense = {name: values for name, values in model.state_dict(keep_vars=True).items() if names.get(name) in stored}
    with read_model(folder) as tensor:
        try:
            found = {name: tensor(names[name]).T if name in transposed else tensor(names[name]) for name in dense}
            for name, values in found.items():
                if values.shape != dense[name].shape:
                    raise RuntimeError(f"{name} is {tuple(values.shape)}, not {tuple(dense[name].shape)}")
            streamed = {name: dense[name] for name in dense if dense[name].is_meta}
            model.load_state_dict({name: found[name] for name in dense if name not in streamed}, strict=False)
        except RuntimeError as error:  # a tensor of another shape
            raise ImpqError(f"{folder / WEIGHTS} does not fit the model it was made from: {one_line(error)}") from error
        for name, parameter in streamed.items():
            session.runner.placement.read_from(parameter, Stored(
                folder / WEIGHTS, names[name], tuple(found[name].shape), tuple(found[name].stride()), 0,
                parameter.dtype))


def _file_bytes(folder: Path) -> int:
    """Bytes of the file with the model's tensors; 0 for a recipe."""
    file = folder / WEIGHTS
    return file.stat().st_size if file.exists() else 0


def _plain(data: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(data))  # type: ignore[no-any-return]


def _numbers(score: Score) -> dict[str, float]:
    return {"nll": score.nll, "nll_stderr": score.stderr, "perplexity": score.perplexity, "kl": score.kl,
            "top1_agreement": score.top1}
