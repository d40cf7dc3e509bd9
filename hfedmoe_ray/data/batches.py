"""Examples as a model takes them: rows padded to the longest, or read by an encoder and written by a decoder.

Legend: B examples of a batch, S' longest text of the batch, D longest response, N predictions.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hfedmoe_ray.data.labels import IntArray
from hfedmoe_ray.data.tokenize import TokenArray


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Examples as a model takes them, trimmed to the longest text among them."""

    input_ids: IntArray
    """Token ids [B, S'], padded on the right."""
    attention_mask: IntArray
    """1 where there is a token of the text, 0 where there is padding [B, S']."""
    labels: IntArray
    """Class numbers [B]; with `targets` the tokens that are to be written, [N], in the order of their places."""
    targets: npt.NDArray[np.bool_] | None = None
    """Where the next token is one that is to be written, [B, S'], with `decoder_ids` [B, D]; N times. None for
    classification."""
    decoder_ids: IntArray | None = None
    """What a decoder reads while an encoder reads `input_ids`, [B, D]; `targets` marks its real tokens."""

    @property
    def examples(self) -> int:
        """B."""
        return len(self.input_ids)

    @property
    def asked(self) -> IntArray:
        """Which example each prediction belongs to, [N]."""
        return np.arange(self.examples) if self.targets is None else self.targets.nonzero()[0]

    def owners(self, *, decoder: bool = False) -> IntArray:
        """Returns which example each real token belongs to, [T]: of those that a decoder reads, or of the others."""
        return self.asked if decoder else self.attention_mask.nonzero()[0]


def written_after(ids: IntArray, lengths: TokenArray, prompts: TokenArray) -> Batch:
    """Returns texts of which the part after the prompt is to be written, by a decoder alone.

    Args:
        ids: Prompt and response, [B, S'].
        lengths: Tokens of both, [B].
        prompts: Tokens of the prompts, [B].
    """
    place = np.arange(ids.shape[1]) + 1  # of the token that is to come
    targets = (place >= prompts[:, None]) & (place < lengths[:, None])
    labels = np.roll(ids, -1, axis=1)[targets]
    return Batch(input_ids=ids, attention_mask=_mask(lengths, ids.shape[1]), labels=labels, targets=targets)


def translated(ids: IntArray, lengths: TokenArray, prompts: TokenArray, start: int) -> Batch:
    """Returns prompts that an encoder reads and responses that a decoder writes; see `written_after`.

    Args:
        ids: Prompt and response, [B, S'].
        lengths: Tokens of both, [B].
        prompts: Tokens of the prompts, [B].
        start: What the decoder reads before its first token.
    """
    written = (lengths - prompts).astype(np.int64)
    width, longest = int(prompts.max()), max(int(written.max()), 1)
    mask = _mask(prompts, width)
    places = np.minimum(prompts[:, None] + np.arange(longest), ids.shape[1] - 1)
    targets = np.arange(longest) < written[:, None]
    responses = np.where(targets, np.take_along_axis(ids, places, axis=1), start)
    decoder_ids = np.concatenate([np.full((len(ids), 1), start, dtype=np.int64), responses[:, :-1]], axis=1)
    return Batch(
        input_ids=ids[:, :width] * mask,
        attention_mask=mask,
        labels=responses[targets],
        targets=targets,
        decoder_ids=decoder_ids,
    )


def _mask(lengths: TokenArray, width: int) -> IntArray:
    """1 where there is a token, [B, width]."""
    return (np.arange(width) < lengths[:, None]).astype(np.int64)
