"""A tokenizer in a GGUF file, proven by llama.cpp: it splits a probe text as the model's own tokenizer does."""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from impq_core.errors import ImpqError, one_line
from impq_gguf.llama import Vocabulary
from impq_gguf.metadata import described

if TYPE_CHECKING:
    from gguf import GGUFWriter, SpecialVocab

PRE_TOKENIZERS = (
    "llama-bpe", "qwen2", "smollm", "gpt-2", "tekken", "gpt-4o", "starcoder", "deepseek-v3", "qwen35", "deepseek-llm",
    "deepseek-coder", "command-r", "stablelm2", "olmo", "dbrx", "falcon", "falcon3", "refact", "chatglm-bpe", "viking",
    "bloom", "poro-chat", "gpt3-finnish", "codeshell", "exaone", "exaone-moe", "chameleon", "minerva-7b", "superbpe",
    "trillion", "bailingmoe", "seed-coder", "hunyuan", "hunyuan-dense", "kimi-k2", "minimax-m2", "grok-2", "afmoe",
    "jais", "jais-2", "gigachat", "midm-2.0", "lfm2", "youtu", "solar-open", "tiny_aya", "mpt", "default")
"""llama.cpp's names of the rules that split a text before byte pairs are merged, the commonest first."""

PROBES = (
    "The quick brown fox can't jump; it's 12:45, isn't it? WE'LL see, they've SAID'D so.",
    " leading space,  two spaces,   three, and a trailing one ",
    "\nline\n\n\nthree line ends\r\nand\ta tab\t\ttwo\n    def f(x):\n\treturn {'a': x ** 2, \"b\": [1, 22, 333]}\n",
    "1 12 123 1234 12345 1234567890 3.14159 1e-9 0xFF v1.2.3-rc4 $1,234,567.89 50% ½ ² №5",
    "Ünïcödé: naïve façade, Straße, Łódź, Ελληνικά, русский текст, עברית, العربية, हिन्दी भाषा, ไทย, 한국어, "
    "日本語テキスト，中文。",  # noqa: RUF001
    "emoji 🙂👩‍💻🇺🇸 ☃ ❤️ — dashes – and … quotes “so” ‘so’ «so» ¿qué? ¡sí!",  # noqa: RUF001
    "camelCase snake_case SCREAMING_CASE kebab-case http://example.org/a?b=c&d=%20#e user@example.org C++ C# <tag/> "
    "/* */ //#!? ...!!! ((())) [[]] {{}} &&||== != -> => ::",
    "x", "  ", "\n", "",
)
"""Texts that differ between rules: contractions, numbers, spaces, scripts, symbols."""

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Tokenizer:
    """What a GGUF file holds of a tokenizer.

    Args:
        model: ``gpt2`` (byte pairs) or ``llama`` (SentencePiece).
        tokens: text of every token.
        types: numbers of ``gguf.TokenType``.
        scores: of every token; empty for ``gpt2``.
        special: the tokens with a meaning, merges, chat template.
        rules: llama.cpp's keys that decide how a text is split before tokens are looked up.
    """

    model: str
    tokens: Sequence[str]
    types: Sequence[int]
    scores: Sequence[float]
    special: SpecialVocab
    rules: Mapping[str, str | bool] = field(default_factory=dict)

    def add_to(self, writer: GGUFWriter) -> None:
        """Add the keys ``tokenizer.*`` to a file."""
        writer.add_tokenizer_model(self.model)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
        self.special.add_to_gguf(writer, quiet=True)
        for name, value in self.rules.items():
            if isinstance(value, bool):
                writer.add_bool(f"tokenizer.ggml.{name}", value)
            else:
                writer.add_string(f"tokenizer.ggml.{name}", value)


def read_tokenizer(files: Path, rows: int) -> Tokenizer:
    """The tokenizer of a model, for llama.cpp.

    Args:
        files: the model's folder.
        rows: rows of the embedding; those without a token get an unused one. Tokens beyond them are left out: the model
            cannot read them.

    Raises:
        ImpqError: the folder has no tokenizer that transformers runs without Python code of its own, or llama.cpp
            splits texts otherwise under all rules that it has.
    """
    from transformers import AutoTokenizer

    logging.getLogger("gguf").setLevel(logging.ERROR)  # what it doubts is tested here
    try:
        tokenizer = AutoTokenizer.from_pretrained(files)
        content = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # transformers and the file formats raise their own
        raise ImpqError(f"format gguf cannot carry the tokenizer of {files.name}: {one_line(error, 200)}") from error
    found = _tokens(tokenizer, content, files, rows)
    expected = [tokenizer(text)["input_ids"] for text in PROBES]
    reasons, tried, name = [], 0, described(files).name or ""
    with tempfile.TemporaryDirectory() as folder:
        for rules in _candidates(found.model, content):
            candidate, tried = replace(found, rules=rules), tried + 1
            try:
                if _split(candidate, name, Path(folder) / "vocabulary.gguf") == expected:
                    return candidate
            except ImpqError as error:  # a rule that this release of llama.cpp does not know, or a damaged vocabulary
                reasons.append(one_line(error))
    raise ImpqError(f"format gguf cannot carry the tokenizer of {files.name} ({type(tokenizer).__name__}): llama.cpp "
                    f"splits texts otherwise{f' ({reasons[0]})' if len(reasons) == tried else ''}")


def _candidates(model: str, content: Mapping[str, Any]) -> list[Mapping[str, str | bool]]:
    """The rules to try, the likeliest first."""
    if model == "llama":
        likely = "prepend" in json.dumps([content.get("normalizer"), content.get("pre_tokenizer")]).lower()
        return [{"pre": "default", "add_space_prefix": prefix} for prefix in (likely, not likely)]
    return [{"pre": name} for name in PRE_TOKENIZERS]


def _split(tokenizer: Tokenizer, name: str, file: Path) -> list[list[int]]:
    """The probe texts in llama.cpp's tokens."""
    from gguf import GGUFWriter

    writer = GGUFWriter(file, "llama")
    writer.add_name(name)  # llama.cpp gives the tokens of some models further properties
    tokenizer.add_to(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with Vocabulary(file) as vocabulary:
        return [vocabulary.tokenize(text) for text in PROBES]


def _tokens(tokenizer: Any, content: Mapping[str, Any], files: Path, rows: int) -> Tokenizer:
    from gguf import SpecialVocab, TokenType

    model = content["model"]
    if model.get("type") != "BPE":
        raise ImpqError(f"format gguf cannot carry the tokenizer of {files.name}: it is of type {model.get('type')}, "
                        "not BPE")
    by_number = {number: text for text, number in tokenizer.get_vocab().items() if number < rows}
    sentencepiece = not any(part.get("type") == "ByteLevel" for part in _parts(content))
    added = {part["id"]: part["special"] for part in content["added_tokens"]}
    texts, types = [], []
    for number in range(rows):
        text, kind = by_number.get(number, f"[PAD{number}]"), TokenType.NORMAL
        if number not in by_number:
            kind = TokenType.UNUSED
        elif sentencepiece and text == model.get("unk_token"):
            kind = TokenType.UNKNOWN
        elif number in added:
            kind = TokenType.CONTROL if added[number] else TokenType.USER_DEFINED
        elif sentencepiece and _BYTE.fullmatch(text):
            kind = TokenType.BYTE
        if sentencepiece and kind == TokenType.USER_DEFINED:
            text = text.replace("\N{LOWER ONE EIGHTH BLOCK}", " ")  # llama.cpp looks for them in the text itself
        texts.append(text)
        types.append(int(kind))
    special = SpecialVocab(files, load_merges=not sentencepiece, n_vocab=rows)
    probe = tokenizer("x")["input_ids"]
    special.add_special_token = {"bos": probe[0] == tokenizer.bos_token_id,
                                 "eos": probe[-1] == tokenizer.eos_token_id}
    if not sentencepiece and not special.merges:
        special.merges = [_no_merge(model["vocab"])]
    return Tokenizer("llama" if sentencepiece else "gpt2", texts, types,
                     _scores(model, texts) if sentencepiece else (), special)


def _parts(content: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The pre-tokenizers and decoders, those within sequences too."""
    for key in ("pre_tokenizer", "decoder"):
        whole = content.get(key) or {}
        yield from (whole, *whole.get("pretokenizers", ()), *whole.get("decoders", ()))


def _scores(model: Mapping[str, Any], texts: Sequence[str]) -> list[float]:
    """Scores by which SentencePiece merges in the order of the merges: that of a token is minus the rank of the first
    merge that makes it. Tokens that no merge makes come last."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(model["merges"]):
        ranks.setdefault("".join(pair.split(" ") if isinstance(pair, str) else pair), rank)
    return [float(-ranks.get(text, len(model["merges"]))) for text in texts]


def _no_merge(vocabulary: Mapping[str, int]) -> str:
    """A merge without effect, because it makes no token: llama.cpp requires one."""
    letters = [text for text in vocabulary if len(text) == 1]
    return next(f"{a} {b}" for a in letters for b in letters if a + b not in vocabulary)
