"""Tokenizers in GGUF files: llama.cpp splits texts as the model's own tokenizer does, or the tokenizer is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader, GGUFWriter
from impq_gguf.llama import Vocabulary
from impq_gguf.tokenizer import PROBES, read_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from impq_core.errors import ImpqError
from impq_core.testing import made_text

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TRAINED = [*PROBES, made_text(0, 20_000), "don't I'LL 100 200 2024 10000 x == y; ...\n\n\n    \t\t"] * 2
UNSEEN = [made_text(1, 3_000),
          "It's 98765 o'clock\n\n  - item 3.14; \t\tYOU'LL see <|end|> naïve日本 🙂🙂 == != x_y\r\n",
          "<|end|>user\n1234567 \n \n", "  a  b   c    d"]


def byte_level(*before: pre_tokenizers.PreTokenizer, regex: bool = False) -> Tokenizer:
    """Byte pairs, after rules that split the text."""
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TRAINED, trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<s>", "</s>", "<|end|>"]))
    tokenizer.add_tokens([AddedToken("==>", normalized=False)])
    return tokenizer


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def sentencepiece(prefix: bool) -> Tokenizer:
    """SentencePiece's byte pairs as transformers stores them, with or without a space before a text."""
    space = "\N{LOWER ONE EIGHTH BLOCK}"
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([*([normalizers.Prepend(space)] if prefix else []),
                                                 normalizers.Replace(" ", space)])
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    # A piece of a word only; characters that are rare have no token.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(space, "merged_with_next")
    tokenizer.train_from_iterator(TRAINED, trainers.BpeTrainer(
        vocab_size=900, limit_alphabet=60, show_progress=False, special_tokens=["<unk>", "<s>", "</s>", *pieces]))
    content = json.loads(tokenizer.to_str())
    content["pre_tokenizer"] = None
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in pieces]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    return tokenizer


CARRIED: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": lambda: byte_level(regex=True),
    "llama3": lambda: byte_level(split(CONTRACTIONS + r"\p{N}{1,3}" + REST)),
    "qwen2": lambda: byte_level(split(CONTRACTIONS + r"\p{N}" + REST)),
    "single digits": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), regex=True),
    "sentencepiece": lambda: sentencepiece(prefix=True),
    "sentencepiece without prefix": lambda: sentencepiece(prefix=False),
}


def saved(tokenizer: Tokenizer, folder: Path, **more: Any) -> Any:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **more)
    fast.save_pretrained(folder)
    return fast


@pytest.mark.parametrize("name", CARRIED)
def test_llama_cpp_splits_unseen_texts_as_the_tokenizer_does(name: str, tmp_path: Path) -> None:
    own = saved(CARRIED[name](), tmp_path, chat_template="{{ messages }}")
    tokenizer = read_tokenizer(tmp_path, len(own) + 5)
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    tokenizer.add_to(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with Vocabulary(tmp_path / "x.gguf") as vocabulary:
        for text in UNSEEN:
            assert vocabulary.tokenize(text) == own(text)["input_ids"]
            assert vocabulary.tokenize(text, special=False) == own(text, add_special_tokens=False)["input_ids"]
        assert len(vocabulary) == len(own) + 5
    fields = GGUFReader(tmp_path / "x.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == "{{ messages }}"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == own.eos_token_id


def test_a_tokenizer_that_cannot_be_carried_is_refused(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "[UNK]": 3}, "[UNK]"))
    refused = {"words": words, "halves": byte_level(split(r".{1,2}"))}
    for name, tokenizer in refused.items():
        saved(tokenizer, tmp_path / name)
        with pytest.raises(ImpqError, match=name):
            read_tokenizer(tmp_path / name, 1000)
    (tmp_path / "none").mkdir()
    with pytest.raises(ImpqError, match="none"):
        read_tokenizer(tmp_path / "none", 1000)
