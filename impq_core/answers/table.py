"""Answers side by side in the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from impq_core.paired_answers import Answer, AnswerTable


def answer_tables(table: AnswerTable) -> Iterator[Table]:
    """A table for each prompt: the answers in two columns, with what follows the shared beginning in bold."""
    for answer in table.answers:
        made = Table(header_style="bold", title_justify="left", caption_justify="left", show_lines=False, expand=True,
                     title=Text(_prompt(answer)), caption=Text(_caption(answer)))
        for name in ("unquantized", "plan"):
            made.add_column(name, ratio=1, overflow="fold")
        made.add_row(*(_marked(text, answer) for text in (answer.unquantized, answer.plan)))
        yield made


def _prompt(answer: Answer) -> str:
    if not answer.messages:
        return answer.prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in answer.messages)


def _marked(text: str, answer: Answer) -> Text:
    common = answer.split.common if answer.split else text
    shared = len(common) if text.startswith(common) else 0
    return Text.assemble(text[:shared], (text[shared:], "bold"))


def _caption(answer: Answer) -> str:
    split = answer.split
    if split is None:
        return f"the same {answer.plan_tokens} tokens"
    return (f"tokens in common: {split.token}; then {split.unquantized!r} and {split.plan!r}; KL there {split.kl:.4f} "
            "nats")
