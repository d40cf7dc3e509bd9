"""Texts, of which a language model is asked how likely it finds them: perplexity.

As in lm-evaluation-harness each token of a text is predicted once, the first of them from the token that begins a text,
in windows of at most `data.max_length` tokens. A window goes on where the last one ended and sees its last token; the
last window sees as much before its own tokens as fits. Words are what stands between white space, bytes those of UTF-8.

Legend: N texts, R windows of all of them, S longest window.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from hfedmoe_ray.config.evaluation import Benchmark
from hfedmoe_ray.data import store
from hfedmoe_ray.data.dataset import FederatedDataset, Split
from hfedmoe_ray.data.items import key_of, padded, read_items, stored_rows
from hfedmoe_ray.data.labels import IntArray
from hfedmoe_ray.data.sources import texts_of
from hfedmoe_ray.data.tokenize import pad_id
from hfedmoe_ray.types import Array


@dataclass(frozen=True, kw_only=True)
class Passages:
    """Tokenised texts."""

    rows: Split
    """Windows [R]; what is predicted comes after `prompts` tokens."""
    item: IntArray
    """The text of each window [R]."""
    words: IntArray
    """Of each text [N]."""
    bytes: IntArray
    """Of each text [N]."""

    def part(self, index: int, count: int) -> "Passages":
        """Returns slice `index` of `count` of the texts."""
        first, end = len(self.words) * index // count, len(self.words) * (index + 1) // count
        start, stop = np.searchsorted(self.item, [first, end])
        return Passages(
            rows=self.rows.rows(int(start), int(stop), f"{self.rows.key}/{index}of{count}"),
            item=self.item[start:stop] - first,
            words=self.words[first:end],
            bytes=self.bytes[first:end],
        )


def read_passages(benchmark: Benchmark) -> tuple[str, ...]:
    """Reads a benchmark's texts; raises DataError if the file, a column or a text is missing."""
    return texts_of(read_items(benchmark), benchmark.prompt, f"{key_of(benchmark)}.prompt")


def tokenize_passages(tokenizer: Any, texts: tuple[str, ...], max_length: int) -> dict[str, Array]:
    """Returns the arrays of `Passages` by name."""
    start = next(id_ for id_ in (tokenizer.bos_token_id, tokenizer.eos_token_id, pad_id(tokenizer)) if id_ is not None)
    rows: list[tuple[list[int], int]] = []
    item: list[int] = []
    for number, text in enumerate(texts):
        windows = _windows([start, *tokenizer(text, add_special_tokens=False)["input_ids"]], max_length)
        rows += windows
        item += [number] * len(windows)
    return padded(rows, pad_id(tokenizer)) | {
        "item": np.array(item, dtype=np.int64),
        "words": np.array([len(re.split(r"\s+", text)) for text in texts], dtype=np.int64),
        "bytes": np.array([len(text.encode("utf-8", "surrogatepass")) for text in texts], dtype=np.int64),
    }


def stored_passages(data: FederatedDataset, name: str) -> Passages:
    """Opens texts that were prepared with the data of a run."""
    prefix = store.benchmark(name)
    item = data.array(f"{prefix}.item")
    rows = stored_rows(data, name, item)
    return Passages(rows=rows, item=item, words=data.array(f"{prefix}.words"), bytes=data.array(f"{prefix}.bytes"))


def _windows(ids: list[int], most: int) -> list[tuple[list[int], int]]:
    """The windows of a text that begins with its start token, and how many tokens of each are only seen."""
    windows, done = [], 1  # tokens that need no (more) prediction
    while done < len(ids):
        end = min(done - 1 + most, len(ids))
        first = done - 1 if end < len(ids) else max(end - most, 0)
        windows.append((ids[first:end], done - first))
        done = end
    return windows
