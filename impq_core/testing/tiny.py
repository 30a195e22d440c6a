"""Tiny random models of real architectures, in memory or saved as model folders."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from impq_core.testing.rounding import Rounding

if TYPE_CHECKING:
    from impq_core.game.model_game import ModelGame
    from impq_core.game.probe import ModelProbe
    from impq_core.model.shapes import Shapes

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")


def tiny_model(folder: Path, architecture: str = "llama", blocks: int = 3, seed: int = 0,
               vocabulary: int = 259) -> Path:
    """Write a random causal language model with a byte tokenizer to ``folder``.

    Hidden width 64, feed-forward width 128. The weights are larger than those of an initialisation, so
    that quantizing them changes the loss. As in the real model, Gemma's tokenizer adds a beginning-of-sequence token.

    Args:
        folder: created.
        architecture: one of ``ARCHITECTURES``.
        blocks: number of blocks.
        seed: seed of the weights.
        vocabulary: rows of the embedding, at least the 259 tokens of the tokenizer.

    Returns:
        ``folder``.
    """
    _random_model(architecture, blocks, seed, vocabulary).save_pretrained(folder)
    byte_tokenizer(adds_start=architecture.startswith("gemma")).save_pretrained(folder)
    return folder


def _random_model(architecture: str, blocks: int, seed: int, vocabulary: int = 259) -> Any:
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    special: dict[str, Any] = {}
    if architecture.startswith("gemma"):
        special = {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16}
    elif architecture == "qwen3":
        special = {"head_dim": 16}
    kind = "gemma3_text" if architecture == "gemma3" else architecture
    config = CONFIG_MAPPING[kind](
        vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=blocks, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=256, eos_token_id=257, pad_token_id=258,
        **special)
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(0.0, 0.1)
    finally:
        torch.random.set_rng_state(state)
    return model


class TinyTable:
    """A tiny model in memory with variants from ``Rounding``, and the game on it: four windows of random bytes.

    Args:
        bits: the menu.
        granularity: ``block``, ``group`` or ``linear``.
        exclude: patterns of layers that stay unquantized.
        blocks: number of blocks of the model.

    Attributes:
        space: the layers and widths of the game.
        game: the game, with its probe.
    """

    def __init__(self, bits: Sequence[float], granularity: str = "block", exclude: Sequence[str] = (),
                 blocks: int = 3) -> None:
        from impq_core.model.bank import Bank
        from impq_core.model.blockwise import BlockwiseModel
        from impq_core.model.layers import layers_of, search_space
        from impq_core.model.quantize import fill_bank
        from impq_core.model.text import Windows

        model, backend = _random_model("llama", blocks, 0).eval().requires_grad_(False), Rounding()
        choices = tuple(choice for choice in backend.choices() if choice.bits in bits)
        runner = BlockwiseModel(model)
        self.space = search_space(layers_of(model, granularity), backend, choices, exclude=exclude)
        self._bank = Bank(runner, self.space.everyone, backend)
        menus = [choices] * len(self.space) + [()] * len(self.space.pinned)
        fill_bank(self._bank, runner, None, menus, lambda done, total: None)
        self._runner = runner
        self._windows = Windows(np.random.default_rng(0).integers(0, 256, (4, 24)), "random", "random bytes")
        self.game = self.new_game()

    def new_game(self, probe: ModelProbe | None = None) -> ModelGame:
        """Another game on the same variants and windows, with no loss measured yet.

        Args:
            probe: the probe of an earlier game; a new one by default.
        """
        from impq_core.game.model_game import ModelGame

        middle = (self.space.low_bytes + self.space.high_bytes) // 2
        return ModelGame(self.space, self._bank, self._runner, self._windows, budget_bytes=middle, probe=probe)

    def forward_flops(self) -> int:
        """FLOPs of one ordinary forward of the model over the game's windows."""
        import torch

        from impq_core.model.cost import flop_counter

        with torch.no_grad(), flop_counter() as counter:
            self._runner.model(input_ids=torch.from_numpy(self._windows.ids), use_cache=False)
        return int(counter.get_total_flops())

    def shapes(self) -> Shapes:
        """Shapes of the model."""
        from impq_core.model.layers import layers_of
        from impq_core.model.shapes import Shapes

        return Shapes.of(self._runner.model, layers_of(self._runner.model, "group"))

    def digest(self) -> str:
        """A digest of all weights and variants, which changes if one of them is changed in place."""
        digest = hashlib.sha256()
        for layer in self._bank.layers:
            for linear in layer.linears:
                digest.update(self._bank.original(linear).numpy().tobytes())
                for choice in self.space.choices:
                    if self._bank.has(linear, choice):
                        for tensor in self._bank.stored(linear, choice).tensors.values():
                            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


def byte_tokenizer(adds_start: bool = False) -> Any:
    """A tokenizer with the 256 bytes as its first tokens; with ``adds_start`` it begins every text with ``<s>``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    if adds_start:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
