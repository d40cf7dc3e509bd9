"""Examples as a model takes them: a row each, several in a row, or read by an encoder and written by a decoder.

Several in a row (`packed`) are the same examples with less padding between them: each sees itself alone and counts its
own positions, so that losses, gradients and routing are those of rows of their own, within rounding.

Legend: B examples of a batch, S' longest text of the batch, D longest response, N predictions, R rows of C places that
B texts fill.
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
    positions: IntArray | None = None
    """Place of each token in its own text, where rows hold several: then everything here is [R, C] instead of [B, S'].
    0 for padding."""
    texts: IntArray | None = None
    """Which example each place of such rows belongs to, [R, C]; -1 for padding."""

    @property
    def examples(self) -> int:
        """B."""
        return len(self.input_ids) if self.texts is None else int(self.texts.max()) + 1

    @property
    def asked(self) -> IntArray:
        """Which example each prediction belongs to, [N]."""
        if self.targets is None:
            return np.arange(self.examples)
        return self.targets.nonzero()[0] if self.texts is None else self.texts[self.targets]

    def owners(self, *, decoder: bool = False) -> IntArray:
        """Returns which example each real token belongs to, [T]: of those that a decoder reads, or of the others."""
        if decoder:
            return self.asked
        real = self.attention_mask.astype(bool)
        return real.nonzero()[0] if self.texts is None else self.texts[real]


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


def packed(ids: IntArray, lengths: TokenArray, prompts: TokenArray, room: int) -> Batch:
    """Returns the examples of `written_after` in rows of which as few places as can be found are padding.

    Args:
        ids: Prompt and response, [B, S'].
        lengths: Tokens of both, [B].
        prompts: Tokens of the prompts, [B].
        room: Most tokens of a row, C at most; at least S'.
    """
    rows = _rows(lengths, room)
    used = [int(lengths[members].sum()) for members in rows]
    shape = (len(rows), max(used))
    texts, positions = np.full(shape, -1, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for row, members in enumerate(rows):
        own = lengths[members]
        texts[row, : used[row]] = np.repeat(members, own)
        positions[row, : used[row]] = np.concatenate([np.arange(length) for length in own])
    real = texts >= 0
    place = positions + 1  # of the token that is to come, in its text
    targets = real & (place >= prompts[texts]) & (place < lengths[texts])
    filled = np.where(real, ids[texts, positions], 0)
    return Batch(
        input_ids=filled,
        attention_mask=real.astype(np.int64),
        labels=ids[texts[targets], place[targets]],
        targets=targets,
        positions=positions,
        texts=texts,
    )


def _rows(lengths: TokenArray, room: int) -> list[list[int]]:
    """Deals texts, longest first, each to the emptiest row, of as many rows as leave the fewest places to padding."""
    order = [int(text) for text in np.argsort(-lengths, kind="stable")]
    fewest = -(-int(lengths.sum()) // room)
    best: list[list[int]] = []
    places = 0
    for count in range(fewest, len(order) + 1):
        used = [0] * count
        rows: list[list[int]] = [[] for _ in used]
        for text in order:
            row = used.index(min(used))
            rows[row].append(text)
            used[row] += int(lengths[text])
        if max(used) <= room and (not best or count * max(used) < places):
            best, places = rows, count * max(used)
    return best


def _mask(lengths: TokenArray, width: int) -> IntArray:
    """1 where there is a token, [B, width]."""
    return (np.arange(width) < lengths[:, None]).astype(np.int64)
