"""A plan made into files that load elsewhere, and such files measured again.

The variants of a bank stand behind a prefix at the widest choice. For an export the model is quantized once more, block
after block, each behind the already quantized ones, as GPTQ is meant; the numbers in the manifest are of that model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from impq_core.config import RunConfig, from_data, override
from impq_core.errors import ImpqError
from impq_core.evaluate import Evaluator
from impq_core.exports.checkpoint import WEIGHTS, read_model, tensor_names
from impq_core.exports.manifest import FORMAT, MANIFEST, check_target, read_manifest
from impq_core.files import scratch_folder, write_text
from impq_core.interfaces import Checkpoint
from impq_core.model.bank import Bank, fill_bank
from impq_core.model.blockwise import BlockwiseModel
from impq_core.model.layers import resolve_dtype
from impq_core.parts import load_exporter
from impq_core.plugins import Plugins
from impq_core.results import Exported, Score
from impq_core.runs.folder import RunFolder, recorded
from impq_core.runs.pipeline import report
from impq_core.runs.prepare import Prepared, prepare
from impq_core.types import Plan

Progress = Callable[[int, int], None]


def export_run(run: str | Path, name: str, target: Path | None = None, plugins: Plugins | None = None,
               progress: Progress | None = None) -> Exported:
    """Export the plan of a finished run.

    Args:
        run: a run folder.
        name: the format.
        target: where to; must be missing or empty. The files appear there only when all are written. RUN/FORMAT by
            default.
        plugins: who offers the format, and who watches; the installed plugins by default.
        progress: told (blocks quantized, blocks); by default those who watch are.

    Raises:
        ImpqError: anything the user can mend.
    """
    plugins = plugins or Plugins()
    source = RunFolder.open(run, "plan.json")
    target = target or source.path / name
    progress = progress or report(plugins, "quantize")
    config = replace(source.read_config(), plan=str(source.plan))
    exporter = load_exporter(name, config.backend, config.options.get("backend", {}), plugins)
    check_target(target)
    prepared = prepare(config, plugins)
    assert prepared.plan is not None
    checkpoint, score = Checkpoint(prepared.plan, {}, {}, {}, config.backend, {}), None
    if exporter.backends:
        evaluator, bank, runner = requantize(prepared, prepared.plan, progress)
        score = evaluator.score(prepared.space.assignment(prepared.plan.pick))
        checkpoint = make_checkpoint(prepared, prepared.plan, bank, runner)
    target.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(target.parent, target.name) as scratch:
        work = scratch / "export"
        work.mkdir()
        prepared.source.tokenizer().save_pretrained(work)
        exporter.export(checkpoint, work)
        prepared.plan.save(work / "plan.json")
        write_text(work / MANIFEST, json.dumps({
            "format": FORMAT, "exporter": name, "run": config_data(recorded(prepared.config)),
            "text": str(prepared.evaluation), "score": score_data(score) if score else None}, indent=1) + "\n")
        for file in work.iterdir():
            file.chmod(0o644)  # safetensors and temporary files are made for their owner alone
        if target.exists():
            target.rmdir()
        work.rename(target)
    exported = _exported(target, name, score, prepared)
    plugins.notify("impq_exported", exported=exported, run=source.path)
    return exported


def requantize(prepared: Prepared, plan: Plan, progress: Progress) -> tuple[Evaluator, Bank, BlockwiseModel]:
    """Quantize a plan block after block, each behind the quantized ones; the model ends up standing at the plan."""
    dtype = resolve_dtype(prepared.config.dtype)
    model = prepared.source.load(dtype)
    runner = BlockwiseModel(model)
    bank = Bank(model, prepared.space.everyone, prepared.parts.backend, dtype)
    evaluator = Evaluator(runner, bank, prepared.evaluation)
    bank.apply([None] * len(bank.layers))
    hidden = runner.embed(prepared.calibration.ids) if prepared.calibration and prepared.parts.backend.needs else None
    menus = [[choice] if choice else [] for choice in prepared.space.assignment(plan.pick)]
    fill_bank(bank, runner, hidden, menus, progress)
    return evaluator, bank, runner


def make_checkpoint(prepared: Prepared, plan: Plan, bank: Bank, runner: BlockwiseModel) -> Checkpoint:
    """Collect what an exporter writes: packed variants, and every other tensor once (tied ones are not repeated)."""
    specs = {spec.name: spec for layer in bank.layers for spec in layer.linears}
    variants = {name: bank.stored(specs[name], choice) for name, choice in plan.widths().items() if choice}
    model = runner.model
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    dense = {name: tensor for name, tensor in model.state_dict().items()
             if name not in tied and name.removesuffix(".weight") not in variants}
    config = model.config.to_dict()
    config["dtype"] = prepared.config.dtype
    return Checkpoint(plan, variants, dense, json.loads(json.dumps(config, default=str)), prepared.config.backend,
                      asdict(prepared.parts.backend.options))


def evaluate_folder(path: str | Path, plugins: Plugins | None = None, **text: str | int | None) -> Exported:
    """Load an exported folder and score it on held-out text, against the unquantized model it was made from.

    Args:
        path: a folder written by an export.
        plugins: who offers its format and backend; the installed plugins by default.
        text: what is to differ from the run's held-out text: ``evaluation``, ``evaluation_windows`` ...

    Raises:
        ImpqError: impq did not write the folder, its format holds no weights, or something is missing.
    """
    plugins = plugins or Plugins()
    folder = Path(path)
    manifest = read_manifest(folder)
    name = manifest["exporter"]
    config = from_data(manifest["run"], str(folder / MANIFEST))
    config = override(config, plan=str(folder / "plan.json"), **text)
    exporter = load_exporter(name, config.backend, config.options.get("backend", {}), plugins)
    prepared = prepare(config, plugins, calibrate=False)
    assert prepared.plan is not None
    variants = exporter.restore(folder, prepared.plan)
    model = prepared.source.load(resolve_dtype(config.dtype))
    runner = BlockwiseModel(model)
    bank = Bank(model, prepared.space.everyone, prepared.parts.backend, resolve_dtype(config.dtype))
    evaluator = Evaluator(runner, bank, prepared.evaluation)
    for layer in bank.layers:
        for spec in layer.linears:
            if spec.name in variants:
                bank.add(spec, variants[spec.name])
    stored = tensor_names(folder)
    with read_model(folder) as tensor:
        try:
            model.load_state_dict({name: tensor(name) for name in model.state_dict() if name in stored}, strict=False)
        except RuntimeError as error:  # a tensor of another shape
            raise ImpqError(f"{folder / WEIGHTS} does not fit the model it was made from: "
                            f"{' '.join(str(error).split())[:200]}") from error
    score = evaluator.score(prepared.space.assignment(prepared.plan.pick))
    return _exported(folder, name, score, prepared)


def _exported(folder: Path, name: str, score: Score | None, prepared: Prepared) -> Exported:
    file = folder / WEIGHTS
    assert prepared.plan is not None
    return Exported(folder, name, score, str(prepared.evaluation), prepared.plan.nbytes,
                    file.stat().st_size if file.exists() else 0)


def config_data(config: RunConfig) -> dict[str, Any]:
    """A configuration as plain data for JSON."""
    return json.loads(json.dumps(asdict(config)))  # type: ignore[no-any-return]


def score_data(score: Score) -> dict[str, float]:
    """A score's numbers as plain data."""
    return {"nll": score.nll, "nll_stderr": score.stderr, "perplexity": score.perplexity, "kl": score.kl,
            "top1_agreement": score.top1}
