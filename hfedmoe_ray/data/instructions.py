"""Prompts and responses to token ids, for models that are to write the responses.

A prompt's last tokens and a response's first ones are never merged into one: both are tokenised by themselves, so that
the model is asked for exactly the response. Where an encoder reads the prompts it gets them with what its
tokenizer ends a text with; `data.max_length` then is that of either. (Choices of benchmarks are tokenised as others do
it: `data.choices`.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hfedmoe_ray.config.data import Data
from hfedmoe_ray.data.tokenize import TokenArray, pad_id, tokenize
from hfedmoe_ray.errors import ConfigError
from hfedmoe_ray.types import Array

_Template = Literal["auto", "chat", "plain"]


@dataclass(frozen=True, kw_only=True)
class Instructions:
    """Tokenised examples. Legend: N examples, S longest example."""

    input_ids: TokenArray
    """Prompt and response, padded on the right [N, S]."""
    lengths: TokenArray
    """Tokens of each example [N]."""
    prompts: TokenArray
    """Tokens of each prompt [N], at least 1: nothing comes before the first token that it could be told from."""
    cut: int
    """Examples of which something was left out."""


def tokenized(
    tokenizer: Any, texts: Sequence[str], prompts: Sequence[str] | None, data: Data, *, translates: bool = False
) -> tuple[dict[str, Array], int]:
    """Tokenises texts, or responses after their prompts.

    Args:
        tokenizer: transformers' own.
        texts: Texts, or responses.
        prompts: What comes before each response; None: texts are classified.
        data: The `data` section of the configuration.
        translates: Whether an encoder is to read the prompts.

    Returns:
        Arrays by name: `input_ids` [N, S], `lengths` [N], and with prompts `prompts` [N]; and how many prompts and
        responses were longer than `data.max_length`.
    """
    if prompts is None:
        input_ids, lengths = tokenize(tokenizer, texts, data.max_length)
        return {"input_ids": input_ids, "lengths": lengths}, 0
    made = tokenize_instructions(tokenizer, prompts, texts, data.max_length, data.template, translates=translates)
    return {"input_ids": made.input_ids, "lengths": made.lengths, "prompts": made.prompts}, made.cut


def tokenize_instructions(
    tokenizer: Any,
    prompts: Sequence[str],
    responses: Sequence[str],
    max_length: int,
    template: _Template,
    *,
    translates: bool = False,
) -> Instructions:
    """Tokenises examples; of what is longer than `max_length` the prompt's beginning is left out first.

    A response ends with the tokenizer's end-of-sequence token, or as its chat template ends a turn.

    Args:
        tokenizer: transformers' own.
        prompts: May be empty texts: then the response is plain text.
        responses: What is to be written.
        max_length: Most tokens of an example, at least 2.
        template: See `config.data.Data.template`.
        translates: Whether an encoder reads the prompts: then `max_length` is that of a prompt and of a response.

    Raises:
        ConfigError: `template` is chat, and the tokenizer has no chat template.
    """
    rows: list[tuple[list[int], list[int]]] = []
    cut = 0
    for prompt, response in zip(prompts, responses, strict=True):
        before, after = (
            _pair(tokenizer, prompt, response) if translates else _pieces(tokenizer, prompt, response, template)
        )
        whole = len(before) + len(after)
        after = after[: max_length - (not translates)]
        before = before[-(max_length if translates else max_length - len(after)) :]
        rows.append((before, after))
        cut += len(before) + len(after) < whole
    lengths = np.fromiter((len(before) + len(after) for before, after in rows), dtype=np.int32, count=len(rows))
    input_ids = np.full((len(rows), int(lengths.max(initial=1))), pad_id(tokenizer), dtype=np.int32)
    for row, (before, after) in enumerate(rows):
        input_ids[row, : lengths[row]] = before + after
    asked = np.fromiter((len(before) for before, _ in rows), dtype=np.int32, count=len(rows))
    return Instructions(input_ids=input_ids, lengths=lengths, prompts=asked, cut=cut)


def _pieces(tokenizer: Any, prompt: str, response: str, template: _Template) -> tuple[list[int], list[int]]:
    """Token ids of a prompt, at least one, and of a response, at least one."""
    if _chats(tokenizer, prompt, template):
        user = {"role": "user", "content": prompt}
        given = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([user, {"role": "assistant", "content": response}], tokenize=False)
        # Templates that leave parts of a turn out where another follows do not begin alike; then its text stands alone.
        written = whole.removeprefix(given) if whole.startswith(given) else response + (tokenizer.eos_token or "")
        before, after = _ids(tokenizer, given), _ids(tokenizer, written)
    else:
        before = list(tokenizer(prompt)["input_ids"])
        if before and before[-1] == tokenizer.eos_token_id and len(before) > 1:
            before.pop()  # some tokenizers end every text, which a prompt must not be
        after = _ids(tokenizer, response)
        if tokenizer.eos_token_id is not None:
            after.append(tokenizer.eos_token_id)
    if not before:
        start = tokenizer.bos_token_id
        before, after = ([start], after) if start is not None else (after[:1], after[1:])
    return before or [pad_id(tokenizer)], after or [pad_id(tokenizer)]


def prompt_ids(tokenizer: Any, prompt: str, *, chat: bool, translates: bool) -> list[int]:
    """Returns the token ids of a prompt, at least one, as they stand before a response.

    Args:
        tokenizer: transformers' own.
        prompt: What is asked.
        chat: Whether it is a user's turn in the tokenizer's chat template.
        translates: Whether an encoder reads it.

    Raises:
        ConfigError: There is no chat template.
    """
    if chat and not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "evaluate.benchmarks: `chat: true` puts prompts into the tokenizer's chat template, and this model's has "
            "none. Leave it out."
        )
    if translates:
        return _pair(tokenizer, prompt, "")[0]
    return _pieces(tokenizer, prompt, "", "chat" if chat else "plain")[0]


def _pair(tokenizer: Any, prompt: str, response: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt as an encoder reads it, and of a response as a decoder writes it, each at least one."""
    before = list(tokenizer(prompt)["input_ids"])
    after = _ids(tokenizer, response)
    if tokenizer.eos_token_id is not None:
        after.append(tokenizer.eos_token_id)
    return before or [pad_id(tokenizer)], after or [pad_id(tokenizer)]


def _chats(tokenizer: Any, prompt: str, template: _Template) -> bool:
    """Whether an example is a user's turn and an assistant's."""
    has = bool(getattr(tokenizer, "chat_template", None))
    if template == "chat" and not has:
        raise ConfigError(
            "data.template: this model's tokenizer has no chat template. Write `template: plain`, or choose a model "
            "that was made for chats."
        )
    return template == "chat" or (template == "auto" and has and bool(prompt))


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
