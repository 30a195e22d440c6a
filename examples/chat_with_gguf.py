"""A conversation with an exported GGUF file, in llama.cpp, without a server of its own and without impq.

    impq run --backend gguf --budget 70% --export gguf
    python examples/chat_with_gguf.py impq-runs/20260101-120000-ab12/gguf "What is the capital of France?"

llama.cpp reads tokenizer and chat template from the file; a model without a template continues the text. The packages
needed are ``xllamacpp`` (llama.cpp, prebuilt) and nothing else. Any other program with llama.cpp in it loads the same
file: ``llama-server -m model.gguf``, ollama (``FROM ./model.gguf`` in a Modelfile), LM Studio.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import xllamacpp


def ask(server: xllamacpp.Server, question: str, tokens: int) -> str:
    """The answer of the most probable tokens, at most ``tokens``."""
    answer: dict[str, Any] = server.handle_chat_completions({
        "messages": [{"role": "user", "content": question}], "max_tokens": tokens, "temperature": 0.0})
    return str(answer["choices"][0]["message"]["content"])


def serve(folder: Path, threads: int, context: int) -> xllamacpp.Server:
    """llama.cpp with the file of an exported folder, or with a GGUF file; of a file in parts, the first."""
    files = sorted(folder.glob("*.gguf")) if folder.is_dir() else [folder]
    if not files:
        raise SystemExit(f"{folder} has no GGUF file: export a run with 'impq export RUN gguf'")
    params = xllamacpp.CommonParams()
    params.model.path = str(files[0])
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads, params.verbosity = context, 1, threads, 0
    return xllamacpp.Server(params)


def main(arguments: list[str] | None = None) -> None:
    """Answer the questions of the command line, or those that are typed until an empty line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an exported folder, or a GGUF file")
    parser.add_argument("questions", nargs="*", help="asked one by one; typed if there are none")
    parser.add_argument("--tokens", type=int, default=128, help="longest answer")
    parser.add_argument("--context", type=int, default=2048, help="tokens of question and answer together")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args(arguments)
    server = serve(given.folder, given.threads, given.context)
    for question in given.questions or iter(lambda: input("> "), ""):
        print(ask(server, question, given.tokens).strip())


if __name__ == "__main__":
    main()
