"""What a worker reads: one client's own examples, or the global test split, as NumPy arrays mapped from disk.

Legend: N examples of a split, S stored length, B examples of a batch, S' longest text of the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hfedmoe_ray.config.data import Data
from hfedmoe_ray.context import PreparedData
from hfedmoe_ray.data import store
from hfedmoe_ray.data.batches import Batch, packed, translated, written_after
from hfedmoe_ray.data.instructions import tokenized
from hfedmoe_ray.data.labels import IntArray
from hfedmoe_ray.data.partition import split_own_test
from hfedmoe_ray.data.sources import load_client_file
from hfedmoe_ray.data.tokenize import TokenArray, load_tokenizer
from hfedmoe_ray.errors import DataError
from hfedmoe_ray.seeds import generator
from hfedmoe_ray.types import Array

_ROOM = 2
"""Tokens of a row of several texts, at most, in those of the longest text. With twice as many, 3 to 6 % of the places
are padding on short instructions; longer rows cost attention, which compares a token with all of its row."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Tokenised examples in a fixed order; the arrays are read-only where they are mapped from disk."""

    input_ids: TokenArray
    """Token ids [N, S], padded on the right."""
    lengths: TokenArray
    """Tokens of each text [N], at least 1."""
    labels: IntArray
    """Class numbers [N]."""
    prompts: TokenArray | None = None
    """Tokens of each prompt [N], after which a response is to be written; None for classification."""
    packing: bool = False
    """Whether batches hold several texts in a row."""
    key: str
    """Names exactly these examples, in every process and run: for caches of what is computed from them."""

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Sequence[int] | npt.NDArray[np.integer[Any]], start: int | None = None) -> Batch:
        """Returns the examples at these positions (at least one), in this order, trimmed to the longest of them.

        Args:
            indices: Positions.
            start: What a decoder reads first, where an encoder reads the prompts; None: there is no encoder.
        """
        rows = np.asarray(indices)
        lengths = self.lengths[rows]
        longest = int(lengths.max())
        ids = self.input_ids[rows, :longest].astype(np.int64)
        if self.prompts is None:
            mask = (np.arange(longest) < lengths[:, None]).astype(np.int64)
            return Batch(input_ids=ids, attention_mask=mask, labels=self.labels[rows])
        if self.packing:
            return packed(ids, lengths, self.prompts[rows], _ROOM * self.input_ids.shape[1])
        if start is None:
            return written_after(ids, lengths, self.prompts[rows])
        return translated(ids, lengths, self.prompts[rows], start)

    def weight(self, indices: Sequence[int] | npt.NDArray[np.integer[Any]]) -> int:
        """Returns how many predictions these examples ask for: classes, or tokens to be written."""
        rows = np.asarray(indices)
        return len(rows) if self.prompts is None else int((self.lengths[rows] - self.prompts[rows]).sum())

    def part(self, index: int, count: int) -> "Split":
        """Returns slice `index` of `count`: contiguous, in sizes that differ by at most one; all of them are the split.

        Raises:
            ValueError: `index` is not in 0..count-1.
        """
        if not 0 <= index < count:
            raise ValueError(f"there is no part {index} of {count}")
        return self.rows(len(self) * index // count, len(self) * (index + 1) // count, f"{self.key}/{index}of{count}")

    def rows(self, start: int, end: int, key: str) -> "Split":
        """Returns the examples from `start` to before `end`, under a key of their own."""
        rows = slice(start, end)
        return Split(
            input_ids=self.input_ids[rows],
            lengths=self.lengths[rows],
            labels=self.labels[rows],
            prompts=None if self.prompts is None else self.prompts[rows],
            packing=self.packing,
            key=key,
        )


class FederatedDataset:
    """The data of all clients as one worker sees it.

    Opening it maps files and reads nothing. Where clients read their own files, a client's file is read, tokenised and
    split when it is first asked for, on the node where this object lives, and kept in memory alone: it is written
    nowhere.
    """

    def __init__(self, prepared: PreparedData, data: Data) -> None:
        """Opens prepared data.

        Args:
            prepared: What `prepare_data` returned, on any node that has (or shares) its directory.
            data: The `data` section of the configuration it was prepared with.

        Raises:
            DataError: the directory is missing on this node, or holds something else.
        """
        meta = store.read_meta(prepared.path)
        if meta is None or meta.sha256 != prepared.sha256:
            problem = "is missing on this node" if meta is None else "is not the one this run was prepared with"
            raise DataError(
                f"The prepared data {prepared.path} {problem}. Put the cache on storage that all nodes share (set "
                "HFEDMOE_CACHE to it), or copy the directory to every node."
            )
        self._path = prepared.path
        self._meta = meta
        self._data = data
        self._bounds: IntArray = store.open_array(self._path, "bounds")
        self._train, self._test = self._open("train"), self._open("test")
        self._own_files: dict[int, tuple[Split, Split]] = {}

    def train(self, client: int) -> Split:
        """Returns the training examples of a client."""
        return self._of_client(client)[0]

    def all_train(self) -> Split:
        """Returns what all clients train and test on (empty where they read their own files)."""
        return self._train

    def own_test(self, client: int) -> Split:
        """Returns the examples that a client keeps to test on (none if `own_test` is 0)."""
        return self._of_client(client)[1]

    def global_test(self) -> Split:
        """Returns the global test split (empty where clients read their own files and `data.test` is not given)."""
        return self._test

    def array(self, name: str) -> Array:
        """Returns a stored array, mapped."""
        return store.open_array(self._path, name)

    @property
    def key(self) -> str:
        """Names what is stored here in every process and run."""
        return self._meta.sha256[:16]

    def _open(self, split: str) -> Split:
        return Split(
            input_ids=store.open_array(self._path, f"{split}.input_ids"),
            lengths=store.open_array(self._path, f"{split}.lengths"),
            labels=store.open_array(self._path, f"{split}.labels"),
            prompts=store.open_array(self._path, f"{split}.prompts") if self._meta.written else None,
            packing=self._data.packing,
            key=f"{self._meta.sha256[:16]}/{split}",
        )

    def _of_client(self, client: int) -> tuple[Split, Split]:
        if not 0 <= client < len(self._bounds):
            raise ValueError(f"there is no client {client}: the data was prepared for {len(self._bounds)}")
        if self._data.partition.how == "files":
            if client not in self._own_files:
                self._own_files[client] = self._read_own_file(client)
            return self._own_files[client]
        start, own_test, end = map(int, self._bounds[client])
        key = f"{self._meta.sha256[:16]}/{client}"
        return self._train.rows(start, own_test, f"{key}/train"), self._train.rows(own_test, end, f"{key}/own_test")

    def _read_own_file(self, client: int) -> tuple[Split, Split]:
        texts, labels, prompts = load_client_file(self._data, client)
        tokenizer = load_tokenizer(self._path / store.TOKENIZER)
        tokens, _ = tokenized(tokenizer, texts, prompts, self._data, translates=self._meta.translates)
        rows_of = split_own_test(labels, self._data.own_test, generator(self._meta.seed, "own-test", client))
        facts = {"data": self._meta.sha256, "client": client, "own_test": self._data.own_test}
        arrays: dict[str, Array] = {**tokens, "labels": labels}
        key = f"{store.content_hash(arrays, facts)[:16]}/{client}"
        train, own_test = (
            Split(
                **{field: array[rows] for field, array in arrays.items()},
                packing=self._data.packing,
                key=f"{key}/{name}",
            )
            for rows, name in zip(rows_of, ("train", "own_test"), strict=True)
        )
        return train, own_test
