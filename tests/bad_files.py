"""Bad input in files: configurations, plans, models, texts, stores, caches, disks and the folders of runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from filelock import FileLock
from scenes import Case, change, cut, edit, larger_tokenizer, light, weights, write


def toml(text: str | bytes, key: str, what: str) -> Case:
    return light("run --config bad.toml", 2, key, what, lambda: write("bad.toml", text))


CONFIGS = [
    light("run --config none.toml", 2, "none.toml"),
    Case("run --config model", 2, "model"),
    toml("model = [", "bad.toml", "no TOML"),
    toml(b"\xff\xfe", "bad.toml", "no text"),
    toml("estimater = 'spqe'", "'estimator'", "a key misspelt"),
    toml("[calibration]\nwindow = 3", "'windows'",
         "a key of a table misspelt"),
    toml("seed = 'one'", "'seed'", "a word for a number"),
    toml("budget = 3.0", "'budget'", "a number for a text"),
    toml("bits = 4", "'bits'", "a number for a list"),
    toml("bits = [nan, 4]", "nan", "NaN for a width"),
    toml("[pins]\na = 'four'", "--pin a=four", "a word for a width"),
    toml('model = "a\\u0000b"', "'model'", "a NUL in a name"),
    toml("model = ''", "model", "an empty name"),
    toml("evaluation = ''", "text", "a text without a name"),
    toml("[options.estimater]\na = 1", "'estimator'", "a part misspelt"),
    toml("estimator = 'spqe'\n[options.estimator]\npermutations = [4]", "permutations", "a list for a number"),
    light("run", 2, "fallback", "true for yes in impq.toml", lambda: write("impq.toml", "fallback = true")),
    light("run", 2, "'yes'", "a misspelt value in impq.toml", lambda: write("impq.toml", "fallback = 'yess'")),
    light("run", 2, "'model'", "a key misspelt in impq.toml",
          lambda: write("impq.toml", "modle = 'model'")),
]


def plan(text: str, key: str, what: str) -> Case:
    return Case("run --plan plan.json", 1, key, what, lambda: write("plan.json", text))


PLANS = [
    Case("run --plan none.json", 1, "none.json"),
    plan("{", "plan.json", "no JSON"),
    plan("[" * 100_000, "plan.json", "JSON without an end"),
    plan("[]", "plan.json", "a list"),
    plan('{"layers": {}}', "'model.layers.0'", "no layers"),
    plan('{"layers": {"model.layer.0": null}}', "'model.layers.0'", "a layer misspelt"),
    plan('{"layers": {"model.layers.0": {"bits": "four", "group_size": 64}}}', "plan.json",
         "a word for a width"),
    plan('{"layers": {"model.layers.0": {"bits": 4, "group_size": 1e400}}}', "plan.json", "endless groups"),
    Case("run --plan finished/plan.json --granularity group", 1, "'model.layers.0'"),
    Case("run --plan finished/plan.json --bits 3,4", 1, "2 bits",
         "a plan of other widths", lambda: edit("finished/plan.json", '"bits": 4.0', '"bits": 2.0')),
    Case("run --plan finished/plan.json", 1, "impq-plan/9",
         "a plan of another format", lambda: edit("finished/plan.json", "impq-plan/1", "impq-plan/9")),
    Case("export finished hqq", 1, "plan.json", "a plan that is no JSON",
         lambda: write("finished/plan.json", "{")),
]

MODELS = [
    light("run --model ./none", 1, "./none"),
    light("estimate --model none", 1, "none"),
    light("sweep --model none", 1, "none"),
    light("run", 1, "config.json", "a model without a configuration",
          lambda: os.remove("model/config.json")),
    light("run", 1, ".safetensors", "a model without weights", lambda: os.remove("model/model.safetensors")),
    light("run", 1, "pickled", "a model with only pytorch_model.bin",
          lambda: os.rename("model/model.safetensors", "model/pytorch_model.bin")),
    Case("run", 1, "transformers", "an unknown architecture",
         lambda: edit("model/config.json", '"llama"', '"lama"')),
    Case("run", 1, "transformers", "a config.json that is no JSON",
         lambda: write("model/config.json", "{")),
    Case("run", 1, "LlamaForCausalLM", "a model without blocks",
         lambda: edit("model/config.json", '"num_hidden_layers": 2', '"num_hidden_layers": 0')),
    Case("run", 1, "model.safetensors", "weights cut in half",
         lambda: cut("model/model.safetensors", 90_000)),
    Case("run", 1, "model.safetensors", "weights cut to nothing",
         lambda: cut("model/model.safetensors", 0)),
    Case("run", 1, "model.safetensors", "weights that are none",
         lambda: write("model/model.safetensors", b"weights?" * 1000)),
    Case("estimate", 1, "model.layers.1.mlp.down_proj.weight", "NaN in a weight",
         lambda: weights("model.layers.1.mlp.down_proj.weight", float("nan"))),
    Case("sweep", 1, "model.embed_tokens.weight", "infinity in an embedding",
         lambda: weights("model.embed_tokens.weight", float("inf"))),
    Case("run --tracking-uri none", 1, "model.layers.1.mlp.down_proj.weight", "a weight that is missing",
         lambda: weights("model.layers.1.mlp.down_proj.weight", None)),
    Case("run", 1, "259", "a tokenizer of another model",
         larger_tokenizer),
    Case("run", 1, "tokenizer", "a broken tokenizer",
         lambda: write("model/tokenizer.json", "{")),
    Case("export finished hqq", 1, "HERE/model", "a model that is gone", lambda: shutil.rmtree("model")),
]


def text(name: str, content: str | bytes, key: str, what: str) -> Case:
    return light(f"run --evaluation {name}", 1, key, what, lambda: write(name, content))


def chat(template: str) -> None:
    """A chat of two answers, and a template for the model."""
    turns = '{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}'
    write("rows.jsonl", f'{{"messages": [{turns}, {turns}]}}\n')
    write("model/chat_template.jinja", template)


def table(columns: dict[str, list[object]], key: str, what: str) -> Case:
    def scene() -> None:
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(columns), "rows.parquet")

    return light("run --evaluation rows.parquet", 1, key, what, scene)


TEXTS = [
    light("run --calibration none.txt", 1, "none.txt"),
    light("run --calibration evalation.txt", 1, "'evaluation.txt'"),
    light("run --evaluation model", 1, "model"),
    light("run --evaluation paper.docx", 2, "paper.docx"),
    light("run --evaluation rows.json", 2, "jq "),
    light("run --evaluation rows.jsonl.gz", 2, "gunzip"),
    Case("evaluate exported --evaluation none.txt", 1, "none.txt"),
    text("empty.txt", "", "empty.txt", "an empty file"),
    Case("run --evaluation short.txt", 1, "short.txt", "a short file",
         lambda: write("short.txt", "too short")),
    text("latin.txt", b"one\ncaf\xe9 ", "line 2", "a file in another encoding"),
    text("windows.txt", "one".encode("utf-16"), "UTF-16", "a file in UTF-16"),
    text("data.txt", "one\n\0", "line 2", "a file that is not text"),
    text("rows.jsonl", '{"txt": "a"}\n', "'txt'", "rows without a text"),
    text("rows.jsonl", '{"text": "a"}\n{"text": 3}\n', "line 2", "a number for a text"),
    text("rows.jsonl", '{"text": "a"}\n{"text": "\\ud800"}\n', "line 2",
         "half of a character"),
    text("rows.jsonl", '{"text": null}\n', "rows.jsonl", "rows of gaps"),
    text("rows.jsonl", '{"conversations": [{"from": "human", "value": "a"}]}\n', "'conversations'",
         "chats of another form"),
    text("rows.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n{"messages": []}\n', "line 2",
         "a chat without messages"),
    text("rows.jsonl", '{"messages": [{"role": "user", "content": ["a"]}]}\n', "line 1",
         "a message that is no text"),
    Case("run --evaluation rows.jsonl", 1, "chat template", "chats, and a model without a chat template",
         lambda: write("rows.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n')),
    Case("run --evaluation rows.jsonl", 1, "line 1", "a chat that the template refuses",
         lambda: chat("{{ raise_exception('no system message') }}")),
    Case("run --evaluation rows.jsonl --evaluation-scored assistant", 1, "--evaluation-scored",
         "a template that changes earlier answers",
         lambda: chat("{% for m in messages %}{{ m.content }}{{ loop.last }}{% endfor %}")),
    text("rows.jsonl", '[{"text": "a"}]\n', "line 1", "rows in one list"),
    text("rows.jsonl", "{\n", "line 1", "rows that are no JSON"),
    text("rows.parquet", "{\n", "Parquet", "a table that is none"),
    table({"id": [1], "body": ["a"]}, "'body'", "a table without a text"),
    table({"text": [["a"]]}, "'text'", "a table of lists"),
    light("run --evaluation a:b:c:d", 2, "a:b:c:d"),
    Case("run --evaluation calibration.txt --evaluation-windows 1000", 1, "calibration.txt"),
    Case("run --evaluation-windows 100000", 1, "--evaluation-windows"),
    Case("run --calibration-length 99999", 1, "--calibration-length"),
]

STORES = [
    light("run --tracking-uri http://127.0.0.1:9", 1, "http://127.0.0.1:9"),
    light("run --tracking-uri sqlite:////nowhere/at/all.db", 1, "/nowhere/at"),
    Case("run --tracking-uri ./mlruns", 1, "./mlruns"),
    Case("run --tracking-uri sqlite://runs.db", 1, "sqlite://runs.db"),
    Case("run --tracking-uri http://[::1", 1, "http://[::1"),
    Case("run --tracking-uri http://host:port", 1, "http://host:port"),
    Case("run --tracking-uri sqlite:///calibration.txt", 1, "calibration.txt", "a store that is no database"),
    Case("sweep --tracking-uri sqlite:///model", 1, "HERE/model", "a store that is a folder"),
    Case("estimate --tracking-uri oracle+cx://nobody@127.0.0.1:9/x", 1, "oracle+cx",
         "a database without its driver", leaves="cache/tracking.lock"),
    light("ui", 1, "HERE/mlflow.db"),
    light("ui --tracking-uri none", 2, "--tracking-uri"),
    Case("ui --tracking-uri sqlite:///calibration.txt", 1, "calibration.txt", "a store that is no database"),
    Case("ui --tracking-uri http://[::1", 1, "http://[::1"),
    Case("doctor --tracking-uri sqlite:///calibration.txt", 1, "calibration.txt", "a store that is no database"),
    Case("doctor --tracking-uri ./mlruns", 1, "./mlruns"),
    Case("IMPQ_CACHE=/dev/null/x doctor --tracking-uri none", 1, "cache"),
    light("IMPQ_CACHE=/dev/null/x cache", 1, "IMPQ_CACHE"),
    light("IMPQ_CACHE=/dev/null/x cache prune --all", 1, "IMPQ_CACHE"),
    Case("IMPQ_CACHE=/dev/null/x run --model demo", 1, "IMPQ_CACHE"),
    Case("IMPQ_CACHE=/dev/null/x run --calibration demo", 1, "IMPQ_CACHE"),
    Case("run --output calibration.txt", 1, "calibration.txt"),
    Case("run --output /dev/null/x", 1, "/dev/null/x"),
    Case("sweep --output /dev/null/x", 1, "/dev/null/x"),
    Case("export finished hqq --to model", 1, "model"),
    Case("export finished hqq --to calibration.txt", 1, "calibration.txt"),
    Case("export finished hqq --to /dev/null/x", 1, "/dev/null"),
    Case("run --tracking-uri none", 1, "File too large", "a full disk",
         disk=0),
    Case("run --tracking-uri none", 1, "File too large", "a disk that fills up; the run is left",
         disk=3500, leaves="impq-runs"),
    Case("run --resume estimated", 1, "File too large", "a disk that fills up", disk=2000,
         leaves="estimated"),
    Case("allocate finished --budget 2.5bits", 1, "qp-estimate-2.5bits.json",
         "a disk that fills up", disk=500, leaves="finished/plans"),
    Case("fit finished", 1, "File too large", "a full disk", disk=0),
    Case("export finished hqq", 1, "File too large", "a disk that fills up", disk=20_000),
]


def resume(key: str, what: str, scene: Callable[[], object], code: int = 1, leaves: str = "") -> Case:
    return Case("run --resume finished", code, key, what, scene, leaves=leaves)


RUNS = [
    light("run --resume nowhere", 1, "impq.toml"),
    light("sweep --resume finished", 1, "sweep.json"),
    light("allocate nowhere --budget 3bits", 1, "nowhere"),
    light("fit model", 1, "model"),
    light("export nowhere hqq", 1, "nowhere"),
    light("export estimated hqq", 1, "plan.json"),
    light("evaluate finished", 1, "finished"),
    light("show finished", 1, "plan.json", "a plan of another layer",
          lambda: edit("finished/plan.json", '"model.layers.1"', '"model.layers.7"')),
    light("show finished", 1, "plan.json: ", "a plan that is cut short", lambda: cut("finished/plan.json", 60)),
    light("show finished", 1, "budget_bytes", "a plan without its budget",
          lambda: edit("finished/plan.json", '"budget_bytes"', '"budget"')),
    light("show finished", 1, "cost.json", "a cost that is no number",
          lambda: edit("finished/cost.json", '"forwards": ', '"forwards": "many", "was": ')),
    light("show finished", 1, "evaluation.json", "a table that is cut short",
          lambda: cut("finished/evaluation.json", 60)),
    light("show finished", 1, "uniform-test.json", "a test against a uniform model that is cut short",
          lambda: cut("finished/uniform-test.json", 60)),
    light("show finished", 1, "uniform-test.json", "a test without its decision",
          lambda: edit("finished/uniform-test.json", '"replaces"', '"replace"')),
    light("show finished", 1, "estimate.npz", "an estimate that is cut short",
          lambda: cut("finished/estimate.npz", 60)),
    light("show finished", 1, "space.json", "a run without its space", lambda: os.remove("finished/space.json")),
    resume("provenance.json", "a provenance that is a list",
           lambda: write("finished/provenance.json", "[]")),
    resume("provenance.json", "a provenance that is no text",
           lambda: write("finished/provenance.json", b"\xff")),
    resume("code", "a run of other code", lambda: edit("finished/provenance.json", '"code": "', '"code": "0')),
    resume("versions.numpy", "a run with another library",
           lambda: edit("finished/provenance.json", '"numpy": "', '"numpy": "0.')),
    resume("model digest", "other weights than the run's", lambda: weights("model.embed_tokens.weight", 0.5)),
    resume("calibration", "another text than the run's",
           lambda: write("calibration.txt", Path("calibration.txt").read_text().replace("4", "5"))),
    resume("HERE/calibration.txt", "a text that is gone", lambda: os.remove("calibration.txt")),
    resume("'estimator'", "a run of another format",
           lambda: edit("finished/impq.toml", "estimator =", "estimater ="), 2),
    Case("compare finished --no-html", 1, "finished/tasks.json", "scores on tasks that are no JSON",
         lambda: write("finished/tasks.json", "{")),
    Case("compare finished --no-html", 1, "finished/answers.json", "answers of another format",
         lambda: write("finished/answers.json", '{"format": "impq-answers/9", "answers": []}')),
    resume("HERE/finished", "a run that is at work",
           lambda: FileLock("finished/.lock").acquire()),
    resume("measurements.jsonl, line 2", "a log with a line that is no fact; the error is kept",
           lambda: edit("finished/measurements.jsonl", '{"pick"', '{"pick'), leaves="finished/error.txt"),
    resume("measurements.jsonl", "a log with a fact that is none; the error is kept",
           lambda: edit("finished/measurements.jsonl", '"pick"', '"pikc"'), leaves="finished/error.txt"),
    resume("impq-measurements/9", "a log of another format; the error is kept",
           lambda: edit("finished/measurements.jsonl", "ments/2", "ments/9"), leaves="finished/error.txt"),
    resume("scores.jsonl", "a log of scores with a fact that is none; the error is kept",
           lambda: edit("finished/scores.jsonl", '"widths"', '"withds"'), leaves="finished/error.txt"),
    resume("held-back.jsonl", "a log of a test with a fact that is none; the error is kept",
           lambda: edit("finished/held-back.jsonl", '"widths"', '"withds"'), leaves="finished/error.txt"),
    resume("measurements.jsonl", "a folder for a log; the error is kept",
           lambda: (os.remove("finished/measurements.jsonl"), os.mkdir("finished/measurements.jsonl")),
           leaves="finished/error.txt"),
    Case("sweep --resume swept", 1, "sweep.json", "a sweep of nothing",
         lambda: write("swept/sweep.json", "{}")),
    Case("sweep --resume swept", 1, "sweep.json", "a sweep with a number for names",
         lambda: write("swept/sweep.json", '{"varied": {"budget": 3}, "pairs": {}}')),
    Case("sweep --resume swept", 1, "finished.jsonl", "a sweep that was changed",
         lambda: edit("swept/sweep.json", "2.5bits", "2.7bits")),
    Case("sweep --resume swept", 1, "finished.jsonl, line 1", "a sweep with a broken log",
         lambda: write("swept/finished.jsonl", "x\n")),
    Case("allocate finished --budget 3bits", 1, "estimate.npz", "an estimate cut short",
         lambda: cut("finished/estimate.npz", 700)),
    Case("allocate finished --budget 3bits", 1, "linear", "an estimate of NaN",
         lambda: change("finished/estimate.npz", "linear", [[0, np.nan]] * 2)),
    Case("allocate finished --budget 3bits", 1, "shape", "an estimate of one layer",
         lambda: change("finished/estimate.npz", "linear", [[0, 1]])),
    Case("allocate finished --budget 3bits", 1, "space.json", "a space that is a list",
         lambda: write("finished/space.json", "[]")),
    Case("allocate finished --budget 3bits", 1, "layers", "a space of other layers",
         lambda: edit("finished/space.json", '"model.layers.0"', '"model.layer.0"')),
    Case("allocate finished --budget 3bits", 1, "finished/plans",
         "a file for a folder", lambda: write("finished/plans", "")),
    Case("allocate finished --budget 3bits --surrogate additive", 1, "measurements.npz",
         "a run without losses", lambda: os.remove("finished/measurements.npz")),
    Case("fit finished", 1, "measurements.npz", "a run without losses",
         lambda: os.remove("finished/measurements.npz")),
    Case("fit finished", 1, "measurements.npz", "losses cut short",
         lambda: cut("finished/measurements.npz", 700)),
    Case("fit finished", 1, "finished", "losses of NaN",
         lambda: change("finished/measurements.npz", "losses", [np.nan] * 12)),
    Case("fit finished", 1, "0..1", "losses of picks that are none",
         lambda: change("finished/measurements.npz", "picks", [[7, 7]] * 12)),
    Case("evaluate exported", 1, "impq.json", "a manifest that is a list",
         lambda: write("exported/impq.json", "[]")),
    Case("evaluate exported", 1, "impq-export/9", "an export of another format",
         lambda: edit("exported/impq.json", "impq-export/1", "impq-export/9")),
    Case("evaluate exported", 2, "'hqq'", "an export in an unknown format",
         lambda: edit("exported/impq.json", '"exporter": "hqq"', '"exporter": "hq"')),
    Case("evaluate exported", 1, "model.safetensors", "an export cut short",
         lambda: cut("exported/model.safetensors", 5000)),
    Case("evaluate packed", 1, "impq.safetensors", "an export without its weights",
         lambda: os.remove("packed/impq.safetensors")),
    Case("evaluate exported", 1, "model.layers.0.self_attn.q_proj.weight", "an export of packed weights as dense ones",
         lambda: edit("exported/impq.json", '"exporter": "hqq"', '"exporter": "dense"')),
    Case("evaluate exported", 1, "GptqModelRecipe", "an export without weights",
         lambda: edit("exported/impq.json", '"exporter": "hqq"', '"exporter": "recipe-gptqmodel"')),
]
