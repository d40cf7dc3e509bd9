"""Texts to token ids, with the tokenizer that was prepared with the model."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hfedmoe_ray.errors import ModelError

TokenArray = npt.NDArray[np.int32]

_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model")
_CHUNK = 512
"""Texts tokenised at a time: fast tokenizers keep what truncation cuts off until the batch is done."""


def load_tokenizer(directory: Path) -> Any:
    """Loads the tokenizer of a directory; raises ModelError if there is none that transformers can read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, truncation_side="right", trust_remote_code=False)
    except Exception as error:  # damaged files raise whatever their parser does: KeyError, or Exception itself
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(
            f"model.source: no tokenizer can be loaded from {directory} ({type(error).__name__}: {reason}). Give a "
            "model directory that holds its tokenizer (tokenizer.json and tokenizer_config.json), or prepare the model "
            "again."
        ) from error


def tokenizer_hash(directory: Path) -> str:
    """Returns a hash of the files that make up a tokenizer, without loading it; raises ModelError if there are none."""
    files = sorted({file for pattern in _FILES for file in directory.glob(pattern) if file.is_file()})
    if not files:
        raise ModelError(
            f"model.source: {directory} holds no tokenizer. Give a model directory that holds its tokenizer "
            "(tokenizer.json and tokenizer_config.json), or prepare the model again."
        )
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def pad_id(tokenizer: Any) -> int:
    """Returns the id that fills up short texts: the pad token, else the end-of-sequence token, else 0.

    Many causal models have no pad token. Which id stands there is never seen: padding is masked by its place, not by
    its id, so an end-of-sequence token inside a text is still read.
    """
    return int(next((id_ for id_ in (tokenizer.pad_token_id, tokenizer.eos_token_id) if id_ is not None), 0))


def tokenize(tokenizer: Any, texts: Sequence[str], max_length: int) -> tuple[TokenArray, TokenArray]:
    """Tokenises texts, special tokens included, and keeps the first `max_length` tokens of each.

    Returns:
        Token ids [N, S] padded on the right, S the longest text (1 without any text), and lengths [N]. A text without
        a single token counts as one pad token, so that every length is at least 1.
    """
    fill = pad_id(tokenizer)
    rows: list[list[int]] = []
    for start in range(0, len(texts), _CHUNK):
        encoded = tokenizer(
            list(texts[start : start + _CHUNK]),
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        rows += (ids or [fill] for ids in encoded["input_ids"])
    lengths = np.fromiter(map(len, rows), dtype=np.int32, count=len(rows))
    input_ids = np.full((len(rows), int(lengths.max(initial=1))), fill, dtype=np.int32)
    for row, ids in enumerate(rows):
        input_ids[row, : len(ids)] = ids
    return input_ids, lengths
