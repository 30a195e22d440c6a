"""A tiny model with modeling code of its own, as a folder that needs --trust-remote-code."""

from __future__ import annotations

import json
from pathlib import Path

from impq_core.testing.tiny import byte_tokenizer

CODE = '''
import os
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

Path(os.environ["IMPQ_TEST_CODE_RAN"]).touch()


class OwnConfig(PretrainedConfig):
    model_type = "own"

    def __init__(self, vocab_size=259, hidden_size=64, num_hidden_layers=2, **more):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        super().__init__(**more)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix, self.up_proj = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.down_proj = nn.Linear(2 * width, width, bias=False)

    def forward(self, hidden_states):
        past = self.norm(hidden_states)
        count = torch.arange(1, past.shape[1] + 1, dtype=past.dtype)[None, :, None]
        hidden_states = hidden_states + self.mix(past.cumsum(dim=1) / count)
        return hidden_states + self.down_proj(torch.relu(self.up_proj(self.norm(hidden_states))))


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config.hidden_size) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def forward(self, input_ids):
        hidden_states = self.embed_tokens(input_ids)
        for block in self.layers:
            hidden_states = block(hidden_states)
        return self.norm(hidden_states)


class OwnForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = OwnConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.model = OwnModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, attention_mask=None, use_cache=None, logits_to_keep=0):
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids)[:, -logits_to_keep:]))
'''


def model_with_code(folder: Path, **config: object) -> Path:
    """Write the model; its code creates the file of the environment variable ``IMPQ_TEST_CODE_RAN`` when it runs."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True)

    def write() -> None:
        (folder / "modeling_own.py").write_text(CODE)
        (folder / "config.json").write_text(json.dumps({
            "model_type": "own", "architectures": ["OwnForCausalLM"], "vocab_size": 259, "hidden_size": 64,
            "num_hidden_layers": 2, "auto_map": {"AutoConfig": "modeling_own.OwnConfig",
                                                 "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}, **config}))

    write()
    torch.manual_seed(0)
    loaded = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    AutoModelForCausalLM.from_config(loaded, trust_remote_code=True).save_pretrained(folder)
    write()
    byte_tokenizer().save_pretrained(folder)
    return folder
