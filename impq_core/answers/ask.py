"""Greedy answers of the unquantized and the quantized model of a run or an exported folder, and where they part."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from impq_core.answers.prompts import Prompt
from impq_core.errors import ImpqError, one_line
from impq_core.exports.models import PLAN, UNQUANTIZED, Models, models_of
from impq_core.keys import AnswerKey
from impq_core.paired_answers import FILE, Answer, AnswerTable, Split
from impq_core.plugins import Plugins
from impq_core.trust import NO_TRUST, Trust

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Tokens = list[int]


def ask(path: str | Path, prompts: Sequence[str | Prompt], tokens: int = 64, chat: bool | None = None,
        plugins: Plugins | None = None, trust: Trust = NO_TRUST, device: str | None = None,
        memory: str | None = None) -> AnswerTable:
    """The greedy answers of the unquantized and the quantized model of a run or an exported folder.

    Args:
        path: a run folder, an exported folder, or a file in one.
        prompts: texts, or prompts with messages.
        tokens, chat: see ``ask_models``.
        plugins: parts and observers; the installed plugins by default.
        trust: what the caller permits.
        device: where blocks compute; the run's, or ``auto`` for an exported folder, by default.
        memory: what this may take.

    Raises:
        ImpqError: an error that the user can correct.
    """
    asked = [Prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    return ask_models(models_of(path, (), plugins or Plugins(), trust, device, memory), asked, tokens, chat)


def ask_models(models: Models, prompts: Sequence[Prompt], tokens: int, chat: bool | None) -> AnswerTable:
    """Let both models answer, and keep the answers in ``answers.json`` of their folder. Prompts that were answered
    before by the same models are not asked again.

    The divergence where two answers part is that of the models' distributions behind the prompt and the tokens that
    the answers share. It takes a third turn of the unquantized model, whose distributions at all tokens are too large
    to be kept.

    Args:
        models: of a run or an exported folder.
        prompts: the prompts.
        tokens: the most tokens of an answer.
        chat: send texts through the model's chat template; None if it has one. Messages always are.

    Returns:
        The answers, in the order of the prompts.

    Raises:
        ImpqError: the model has no chat template and needs one, or a prompt is longer than its context.
    """
    file = models.folder / FILE
    table = AnswerTable.load(file) if file.is_file() else AnswerTable()
    asked = [(prompt, *_encoded(models, prompt, chat)) for prompt in prompts]
    _check_length(models, [ids for _, ids, _ in asked], tokens)
    keys = [_key(models, ids, tokens) for _, ids, _ in asked]
    known = {answer.key: answer for answer in table.answers}
    wanted = {key: ids for key, (_, ids, _) in zip(keys, asked, strict=True) if key not in known}
    ours, theirs, parts = _answers(models, wanted, tokens) if wanted else ({}, {}, {})
    found = []
    for key, (prompt, _, templated) in zip(keys, asked, strict=True):
        answer = known.get(key) or Answer(
            "", (), False, tokens, _text(models, ours[key]), _text(models, theirs[key]), len(ours[key]),
            len(theirs[key]), parts[key], key)
        # A prompt with a template's marks in it has the tokens of a shorter one that goes through the template.
        found.append(replace(answer, prompt=prompt.text, messages=prompt.messages, chat=templated))
    table.with_answers(found).save(file)
    answers = AnswerTable(tuple(found))
    models.plugins.notify("impq_answered", answers=answers, folder=models.folder)
    return answers


def _answers(models: Models, wanted: Mapping[str, Tokens], tokens: int) -> tuple[
        dict[str, Tokens], dict[str, Tokens], dict[str, Split | None]]:
    """The answers of the unquantized and of the quantized model, and where they part, by key."""
    turns = 2 * len(wanted)

    def answered(model: PreTrainedModel, ids: Tokens, done: int) -> Tokens:
        answer = _generate(model, models.tokenizer, ids, tokens)
        models.plugins.notify("impq_progress", stage="answers", done=done, total=turns)
        return answer

    with models.model(UNQUANTIZED) as model:
        ours = {key: answered(model, ids, done) for done, (key, ids) in enumerate(wanted.items(), start=1)}
    behind: dict[str, torch.Tensor] = {}
    with models.model(PLAN) as model:
        theirs = {key: answered(model, ids, done)
                  for done, (key, ids) in enumerate(wanted.items(), start=1 + len(wanted))}
        shared = {key: _shared(ours[key], theirs[key]) for key in wanted if ours[key] != theirs[key]}
        for key, count in shared.items():
            behind[key] = _log_probabilities(model, wanted[key] + ours[key][:count])
    parts: dict[str, Split | None] = dict.fromkeys(wanted)
    if shared:
        with models.model(UNQUANTIZED) as model:
            for key, count in shared.items():
                reference = _log_probabilities(model, wanted[key] + ours[key][:count])
                divergence = functional.kl_div(behind[key], reference, reduction="sum", log_target=True)
                next_ours, next_theirs = (models.tokenizer.decode(answer[key][count:count + 1])
                                          for answer in (ours, theirs))
                parts[key] = Split(count, _text(models, ours[key][:count]), next_ours, next_theirs,
                                   max(0.0, float(divergence)))
    return ours, theirs, parts


def _encoded(models: Models, prompt: Prompt, chat: bool | None) -> tuple[Tokens, bool]:
    """The token ids of a prompt, and whether it went through the chat template."""
    tokenizer, name = models.tokenizer, models.prepared.source.name
    templated = bool(prompt.messages) or (bool(tokenizer.chat_template) if chat is None else chat)
    if not templated:
        return list(tokenizer(prompt.text)["input_ids"]), False
    if not tokenizer.chat_template:
        raise ImpqError(f"model {name} has no chat template: " + (
            "give prompts as text" if prompt.messages else "leave out --chat"))
    messages = list(prompt.messages) or [{"role": "user", "content": prompt.text}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise errors of their own about roles
        raise ImpqError(f"the chat template of model {name} refuses messages: {one_line(error)}") from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]), True


def _check_length(models: Models, prompts: Sequence[Tokens], tokens: int) -> None:
    """Raises ImpqError if a prompt and its answer may be longer than the model's context."""
    config = models.prepared.source.config()
    context = config.get("max_position_embeddings") or config.get("text_config", {}).get("max_position_embeddings")
    longest = max(map(len, prompts))
    if isinstance(context, int) and longest + tokens > context:
        raise ImpqError(f"a prompt of {longest} tokens and an answer of {tokens} are longer than the model's "
                        f"context of {context}: shorten it, or give fewer --tokens")


def _key(models: Models, ids: Tokens, tokens: int) -> str:
    prompt = hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:20]
    return AnswerKey((models.key(UNQUANTIZED), models.key(PLAN)), prompt, tokens).digest


@torch.no_grad()
def _generate(model: PreTrainedModel, tokenizer: Any, ids: Tokens, tokens: int) -> Tokens:
    """The most likely tokens one after the other, up to one that ends an answer; settings of the model that change
    what is likely, such as a penalty of repetitions, do not count."""
    from transformers import GenerationConfig

    ends = model.generation_config.eos_token_id if model.generation_config else None
    ends = tokenizer.eos_token_id if ends is None else ends
    first = ends[0] if isinstance(ends, list) and ends else ends
    config = GenerationConfig(do_sample=False, num_beams=1, max_new_tokens=tokens, eos_token_id=ends,
                              pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else first,
                              repetition_penalty=1.0, no_repeat_ngram_size=0)
    inputs = torch.tensor([ids], device=model.device)
    output = model.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=config)
    answer: Tokens = output[0, len(ids):].tolist()
    return answer


@torch.no_grad()
def _log_probabilities(model: PreTrainedModel, ids: Tokens) -> torch.Tensor:
    """Log-probabilities (vocabulary,) of the token behind ``ids``, float32, in host memory."""
    logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0, -1]
    return functional.log_softmax(logits.float(), dim=-1).cpu()


def _shared(ours: Tokens, theirs: Tokens) -> int:
    """Number of tokens that two different answers have in common at their beginning."""
    pairs = zip(ours, theirs, strict=False)
    return next((count for count, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))


def _text(models: Models, answer: Tokens) -> str:
    text: str = models.tokenizer.decode(answer, skip_special_tokens=True)
    return text
