"""Bad input in files: configurations, plans, models, texts, stores, caches, disks and the folders of runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from filelock import FileLock
from scenes import Case, change, cut, edit, larger_tokenizer, light, weights, write


def toml(text: str | bytes, says: str, what: str) -> Case:
    return light("run --config bad.toml", 2, says, what, lambda: write("bad.toml", text))


CONFIGS = [
    light("run --config none.toml", 2, "cannot read none.toml: No such file"),
    Case("run --config model", 2, "cannot read model: Is a directory"),
    toml("model = [", "cannot read bad.toml", "no TOML"),
    toml(b"\xff\xfe", "cannot read bad.toml", "no text"),
    toml("estimater = 'spqe'", "unknown key 'estimater' (did you mean 'estimator'?)", "a key misspelt"),
    toml("[calibration]\nwindow = 3", "[calibration]: unknown key 'window' (did you mean 'windows'?)",
         "a key of a table misspelt"),
    toml("seed = 'one'", "'seed' takes a whole number, not 'one'", "a word for a number"),
    toml("budget = 3.0", "'budget' takes text, not 3.0", "a number for a text"),
    toml("bits = 4", "'bits' takes a list of numbers", "a number for a list"),
    toml("bits = [nan, 4]", "has no nan bits", "NaN for a width"),
    toml("[pins]\na = 'four'", "'pins' takes a table of widths", "a word for a width"),
    toml('model = "a\\u0000b"', "'model' takes text", "a NUL in a name"),
    toml("model = ''", "model is empty", "an empty name"),
    toml("evaluation = ''", "the name of a text is empty", "a text without a name"),
    toml("[options.estimater]\na = 1", "does not have (did you mean 'estimator'?)", "a part misspelt"),
    toml("estimator = 'spqe'\n[options.estimator]\npermutations = [4]", "takes int, not '[4]'", "a list for a number"),
    light("run", 2, "impq.toml: unknown key 'modle' (did you mean 'model'?)", "a key misspelt in impq.toml",
          lambda: write("impq.toml", "modle = 'model'")),
]


def plan(text: str, says: str, what: str) -> Case:
    return Case("run --plan plan.json", 1, says, what, lambda: write("plan.json", text))


PLANS = [
    Case("run --plan none.json", 1, "cannot read a plan from none.json: No such file"),
    plan("{", "cannot read a plan", "no JSON"),
    plan("[" * 100_000, "RecursionError", "JSON without an end"),
    plan("[]", "cannot read a plan", "a list"),
    plan('{"layers": {}}', "gives no width for layer 'model.layers.0'", "no layers"),
    plan('{"layers": {"model.layer.0": null}}', "did you mean 'model.layers.0'", "a layer misspelt"),
    plan('{"layers": {"model.layers.0": {"bits": "four", "group_size": 64}}}', "cannot read a plan",
         "a word for a width"),
    plan('{"layers": {"model.layers.0": {"bits": 4, "group_size": 1e400}}}', "OverflowError", "endless groups"),
    Case("run --plan finished/plan.json --granularity group", 1, "lacks at this granularity"),
    Case("run --plan finished/plan.json --bits 3,4", 1, "the widths asked for are 4 (groups of 64), 3",
         "a plan of other widths", lambda: edit("finished/plan.json", '"bits": 4.0', '"bits": 2.0')),
    Case("run --plan finished/plan.json", 1, "is of format impq-plan/9; this impq reads impq-plan/1",
         "a plan of another format", lambda: edit("finished/plan.json", "impq-plan/1", "impq-plan/9")),
    Case("export finished hqq", 1, "cannot read a plan from", "a plan that is no JSON",
         lambda: write("finished/plan.json", "{")),
]

MODELS = [
    light("run --model ./none", 1, "model ./none: no such folder"),
    light("estimate --model none", 1, "a hub name has the form owner/name"),
    light("sweep --model none", 1, "no such folder"),
    light("run", 1, "model has no config.json", "a model without a configuration",
          lambda: os.remove("model/config.json")),
    light("run", 1, "no .safetensors weights", "a model without weights", lambda: os.remove("model/model.safetensors")),
    light("run", 1, "only pickled weights", "a model with only pytorch_model.bin",
          lambda: os.rename("model/model.safetensors", "model/pytorch_model.bin")),
    Case("run", 1, "that transformers can load", "an unknown architecture",
         lambda: edit("model/config.json", '"llama"', '"lama"')),
    Case("run", 1, "that transformers can load", "a config.json that is no JSON",
         lambda: write("model/config.json", "{")),
    Case("run", 1, "no list of 0 blocks", "a model without blocks",
         lambda: edit("model/config.json", '"num_hidden_layers": 2', '"num_hidden_layers": 0')),
    Case("run", 1, "model.safetensors is damaged or cut short", "weights cut in half",
         lambda: cut("model/model.safetensors", 90_000)),
    Case("run", 1, "model.safetensors is damaged or cut short", "weights cut to nothing",
         lambda: cut("model/model.safetensors", 0)),
    Case("run", 1, "model.safetensors is damaged or cut short", "weights that are none",
         lambda: write("model/model.safetensors", b"weights?" * 1000)),
    Case("estimate", 1, "weight model.layers.1.mlp.down_proj.weight holds NaN", "NaN in a weight",
         lambda: weights("model.layers.1.mlp.down_proj.weight", float("nan"))),
    Case("sweep", 1, "weight model.embed_tokens.weight holds NaN or infinity", "infinity in an embedding",
         lambda: weights("model.embed_tokens.weight", float("inf"))),
    Case("run --tracking-uri none", 1, "lack 1 tensors (first: model.layers.1.mlp.down_proj.weight)",
         "a weight that is missing; the run is left with its error",
         lambda: weights("model.layers.1.mlp.down_proj.weight", None), leaves="impq-runs"),
    Case("run", 1, "the tokenizer gives token 259, the model knows 259", "a tokenizer of another model",
         larger_tokenizer),
    Case("run", 1, "has no tokenizer that can be loaded", "a broken tokenizer",
         lambda: write("model/tokenizer.json", "{")),
    Case("export finished hqq", 1, "model: no such folder", "a model that is gone", lambda: shutil.rmtree("model")),
]


def text(name: str, content: str | bytes, says: str, what: str) -> Case:
    return light(f"run --evaluation {name}", 1, f"evaluation text {name}{says}", what, lambda: write(name, content))


def table(columns: dict[str, list[object]], says: str, what: str) -> Case:
    def scene() -> None:
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(columns), "rows.parquet")

    return light("run --evaluation rows.parquet", 1, f"evaluation text rows.parquet{says}", what, scene)


TEXTS = [
    light("run --calibration none.txt", 1, "calibration text none.txt: no such file"),
    light("run --calibration evalation.txt", 1, "no such file (did you mean 'evaluation.txt'?)"),
    light("run --evaluation model", 1, "evaluation text model is a folder: name one .txt, .jsonl, .parquet file in it"),
    light("run --evaluation paper.docx", 2, "only .txt, .jsonl, .parquet files are read"),
    light("run --evaluation rows.json", 2, "write one object a line (jq -c '.[]' rows.json > rows-text.jsonl)"),
    light("run --evaluation rows.jsonl.gz", 2, "is compressed: unpack it first (gunzip -k rows.jsonl.gz)"),
    Case("evaluate exported --evaluation none.txt", 1, "text none.txt: no such file"),
    text("empty.txt", "", " is empty", "an empty file"),
    Case("run --evaluation short.txt", 1, "enough for 0 windows", "a short file",
         lambda: write("short.txt", "too short")),
    text("latin.txt", b"one\ncaf\xe9 ", ", line 2: byte 0xe9 is not UTF-8", "a file in another encoding"),
    text("windows.txt", "one".encode("utf-16"), " is UTF-16; convert it to UTF-8", "a file in UTF-16"),
    text("data.txt", "one\n\0", ", line 2: holds a NUL character", "a file that is not text"),
    text("rows.jsonl", '{"txt": "a"}\n', ", line 1: has no field 'text', only 'txt'", "rows without a text"),
    text("rows.jsonl", '{"text": "a"}\n{"text": 3}\n', ", line 2: field 'text' holds a number", "a number for a text"),
    text("rows.jsonl", '{"text": "a"}\n{"text": "\\ud800"}\n', ", line 2: field 'text' holds \\ud800",
         "half of a character"),
    text("rows.jsonl", '{"text": null}\n', " is empty", "rows of gaps"),
    text("rows.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n', ", line 1: has chat records ('messages')",
         "chats"),
    text("rows.jsonl", '[{"text": "a"}]\n', ", line 1: is a list, not an object", "rows in one list"),
    text("rows.jsonl", "{\n", ", line 1: is not valid JSON", "rows that are no JSON"),
    text("rows.parquet", "{\n", " is not a Parquet file", "a table that is none"),
    table({"id": [1], "body": ["a"]}, " has no column 'text', only 'id', 'body'", "a table without a text"),
    table({"text": [["a"]]}, " has a column 'text' of type list", "a table of lists"),
    light("run --evaluation a:b:c:d", 2, "a datasets name is path, path:config or path:config:split"),
    Case("run --evaluation calibration.txt --evaluation-windows 1000", 1, "evaluate on text the plan has not seen"),
    Case("run --evaluation-windows 100000", 1, "not 100000 (see --evaluation-windows, --evaluation-length)"),
    Case("run --calibration-length 99999", 1, "enough for 0 windows of 99999"),
]

STORES = [
    light("run --tracking-uri http://127.0.0.1:9", 1, "does not answer"),
    light("run --tracking-uri sqlite:////nowhere/at/all.db", 1, "the folder /nowhere/at is missing"),
    Case("run --tracking-uri ./mlruns", 1, "is not understood: give sqlite:///FILE, http(s)://HOST, or none"),
    Case("run --tracking-uri sqlite://runs.db", 1, "is not understood: give sqlite:///FILE"),
    Case("run --tracking-uri http://[::1", 1, "is not understood"),
    Case("run --tracking-uri http://host:port", 1, "does not answer"),
    Case("run --tracking-uri sqlite:///calibration.txt", 1, "no SQLite database", "a store that is no database"),
    Case("sweep --tracking-uri sqlite:///model", 1, "no SQLite database", "a store that is a folder"),
    Case("estimate --tracking-uri oracle+cx://nobody@127.0.0.1:9/x", 1, "cannot be used",
         "a database without its driver"),
    light("ui", 1, "there is no store sqlite:///HERE/mlflow.db yet: 'impq run' makes one"),
    light("ui --tracking-uri none", 2, "no pages without a store"),
    Case("ui --tracking-uri sqlite:///calibration.txt", 1, "no SQLite database", "a store that is no database"),
    Case("ui --tracking-uri http://[::1", 1, "is not understood"),
    Case("doctor --tracking-uri sqlite:///calibration.txt", 1, "no SQLite database", "a store that is no database"),
    Case("doctor --tracking-uri ./mlruns", 1, "is not understood"),
    Case("IMPQ_CACHE=/dev/null/x doctor --tracking-uri none", 1, "the cache cannot be written"),
    light("IMPQ_CACHE=/dev/null/x cache", 1, "/dev/null/x cannot be created (Not a directory); set IMPQ_CACHE"),
    light("IMPQ_CACHE=/dev/null/x cache prune --all", 1, "set IMPQ_CACHE"),
    Case("IMPQ_CACHE=/dev/null/x run --model demo", 1, "set IMPQ_CACHE"),
    Case("IMPQ_CACHE=/dev/null/x run --calibration demo", 1, "set IMPQ_CACHE"),
    Case("run --output calibration.txt", 1, "the output folder calibration.txt cannot be written"),
    Case("run --output /dev/null/x", 1, "the output folder /dev/null/x cannot be written"),
    Case("sweep --output /dev/null/x", 1, "the output folder /dev/null/x cannot be written"),
    Case("export finished hqq --to model", 1, "the export folder model is not empty"),
    Case("export finished hqq --to calibration.txt", 1, "the export folder calibration.txt is not empty"),
    Case("export finished hqq --to /dev/null/x", 1, "cannot be made: /dev/null is no folder"),
    Case("run --tracking-uri none", 1, "the output folder impq-runs cannot be written: File too large", "a full disk",
         disk=0),
    Case("run --tracking-uri none", 1, "File too large; mend that", "a disk that fills up; the run is left",
         disk=2000, leaves="impq-runs"),
    Case("run --resume estimated", 1, "File too large; mend that", "a disk that fills up", disk=2000,
         leaves="estimated"),
    Case("allocate finished --budget 2.5bits", 1, "qp-estimate-2.5bits.json cannot be read or written",
         "a disk that fills up", disk=500, leaves="finished/plans"),
    Case("fit finished", 1, "cannot be read or written: File too large", "a full disk", disk=0),
    Case("export finished hqq", 1, "File too large", "a disk that fills up", disk=20_000),
]


def resume(says: str, what: str, scene: Callable[[], object], code: int = 1, leaves: str = "") -> Case:
    return Case("run --resume finished", code, says, what, scene, leaves=leaves)


RUNS = [
    light("run --resume nowhere", 1, "nowhere is no run folder: it has no impq.toml"),
    light("run --resume swept", 1, "it has no provenance.json"),
    light("sweep --resume finished", 1, "it has no sweep.json"),
    light("allocate nowhere --budget 3bits", 1, "no run folder"),
    light("fit model", 1, "model is no run folder"),
    light("export nowhere hqq", 1, "no run folder"),
    light("export estimated hqq", 1, "it has no plan.json"),
    light("evaluate finished", 1, "no folder that impq exported"),
    resume("cannot be read: not an object", "a provenance that is a list",
           lambda: write("finished/provenance.json", "[]")),
    resume("provenance.json cannot be read", "a provenance that is no text",
           lambda: write("finished/provenance.json", b"\xff")),
    resume("code was", "a run of other code", lambda: edit("finished/provenance.json", '"code": "', '"code": "0')),
    resume("versions.numpy was", "a run with another library",
           lambda: edit("finished/provenance.json", '"numpy": "', '"numpy": "0.')),
    resume("model digest was", "other weights than the run's", lambda: weights("model.embed_tokens.weight", 0.5)),
    resume("calibration digest was", "another text than the run's",
           lambda: write("calibration.txt", Path("calibration.txt").read_text().replace("4", "5"))),
    resume("text HERE/calibration.txt: no such file", "a text that is gone", lambda: os.remove("calibration.txt")),
    resume("unknown key 'estimater' (did you mean 'estimator'?)", "a run of another format",
           lambda: edit("finished/impq.toml", "estimator =", "estimater ="), 2),
    resume("another process is at work in HERE/finished", "a run that is at work",
           lambda: FileLock("finished/.lock").acquire()),
    resume("measurements.jsonl, line 2: is damaged", "a log with a line that is no fact; the error is kept",
           lambda: edit("finished/measurements.jsonl", '{"pick"', '{"pick'), leaves="finished/error.txt"),
    resume("has a line that is no measurement", "a log with a fact that is none; the error is kept",
           lambda: edit("finished/measurements.jsonl", '"pick"', '"pikc"'), leaves="finished/error.txt"),
    resume('format was "impq-measurements/9"', "a log of another format; the error is kept",
           lambda: edit("finished/measurements.jsonl", "ments/1", "ments/9"), leaves="finished/error.txt"),
    resume("has a line that is no score", "a log of scores with a fact that is none; the error is kept",
           lambda: edit("finished/scores.jsonl", '"widths"', '"withds"'), leaves="finished/error.txt"),
    resume("measurements.jsonl cannot be read or written: Is a directory", "a folder for a log; the error is kept",
           lambda: (os.remove("finished/measurements.jsonl"), os.mkdir("finished/measurements.jsonl")),
           leaves="finished/error.txt"),
    Case("sweep --resume swept", 1, "sweep.json is damaged", "a sweep of nothing",
         lambda: write("swept/sweep.json", "{}")),
    Case("sweep --resume swept", 1, "sweep.json is damaged", "a sweep with a number for names",
         lambda: write("swept/sweep.json", '{"varied": {"budget": 3}, "pairs": {}}')),
    Case("sweep --resume swept", 1, "finished.jsonl cannot be gone on with: runs was", "a sweep that was changed",
         lambda: edit("swept/sweep.json", "2.5bits", "2.7bits")),
    Case("sweep --resume swept", 1, "finished.jsonl, line 1 is damaged", "a sweep with a broken log",
         lambda: write("swept/finished.jsonl", "x\n")),
    Case("allocate finished --budget 3bits", 1, "estimate.npz cannot be read", "an estimate cut short",
         lambda: cut("finished/estimate.npz", 700)),
    Case("allocate finished --budget 3bits", 1, "linear terms are not all finite", "an estimate of NaN",
         lambda: change("finished/estimate.npz", "linear", [[0, np.nan]] * 2)),
    Case("allocate finished --budget 3bits", 1, "of an estimate of this space has shape", "an estimate of one layer",
         lambda: change("finished/estimate.npz", "linear", [[0, 1]])),
    Case("allocate finished --budget 3bits", 1, "space.json cannot be read", "a space that is a list",
         lambda: write("finished/space.json", "[]")),
    Case("allocate finished --budget 3bits", 1, "carried over to the same layers", "a space of other layers",
         lambda: edit("finished/space.json", '"model.layers.0"', '"model.layer.0"')),
    Case("allocate finished --budget 3bits", 1, "finished/plans cannot be read or written: File exists",
         "a file for a folder", lambda: write("finished/plans", "")),
    Case("allocate finished --budget 3bits --surrogate additive", 1, "it has no measurements.npz",
         "a run without losses", lambda: os.remove("finished/measurements.npz")),
    Case("fit finished", 1, "it has no measurements.npz", "a run without losses",
         lambda: os.remove("finished/measurements.npz")),
    Case("fit finished", 1, "measurements.npz cannot be read", "losses cut short",
         lambda: cut("finished/measurements.npz", 700)),
    Case("fit finished", 1, "no surrogate can be fitted to the losses of finished", "losses of NaN",
         lambda: change("finished/measurements.npz", "losses", [np.nan] * 12)),
    Case("fit finished", 1, "numbers in 0..1", "losses of picks that are none",
         lambda: change("finished/measurements.npz", "picks", [[7, 7]] * 12)),
    Case("evaluate exported", 1, "impq.json or plan.json is missing or damaged", "a manifest that is a list",
         lambda: write("exported/impq.json", "[]")),
    Case("evaluate exported", 1, "is of format impq-export/9", "an export of another format",
         lambda: edit("exported/impq.json", "impq-export/1", "impq-export/9")),
    Case("evaluate exported", 2, "unknown exporter 'hq' (did you mean 'hqq'?)", "an export in an unknown format",
         lambda: edit("exported/impq.json", '"exporter": "hqq"', '"exporter": "hq"')),
    Case("evaluate exported", 1, "model.safetensors cannot be read", "an export cut short",
         lambda: cut("exported/model.safetensors", 5000)),
    Case("evaluate exported", 1, "writes a recipe, not weights", "an export without weights",
         lambda: edit("exported/impq.json", '"exporter": "hqq"', '"exporter": "recipe-gptqmodel"')),
]
