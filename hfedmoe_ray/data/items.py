"""The rows of a benchmark's file, whatever is asked about them, and tokenised rows as they are stored."""

from collections.abc import Sequence

import numpy as np

from hfedmoe_ray.config.evaluation import Benchmark
from hfedmoe_ray.data import store
from hfedmoe_ray.data.dataset import FederatedDataset, Split
from hfedmoe_ray.data.labels import IntArray
from hfedmoe_ray.data.sources import TEST_SPLITS, columns_of, split_rows
from hfedmoe_ray.data.tables import Table, read_file
from hfedmoe_ray.seeds import generator
from hfedmoe_ray.types import Array


def read_items(benchmark: Benchmark) -> Table:
    """Returns the rows that are asked about: of a column `split` the test rows, and as many as `examples` says.

    Raises:
        DataError: The file or a column is missing.
    """
    patterns = (benchmark.prompt, *benchmark.choices)
    wanted = (*(name for pattern in patterns for name in columns_of(pattern)), *columns_of(benchmark.answer), "split")
    table = read_file(benchmark.source, f"{key_of(benchmark)}.source", wanted)
    table = (split_rows(table, TEST_SPLITS) if "split" in table.columns else None) or table
    size = len(next(iter(table.columns.values())))
    if benchmark.examples is not None and benchmark.examples < size:
        # Seed 0 whatever the run: different runs are compared on the same items.
        drawn = np.sort(generator(0, "benchmark").permutation(size)[: benchmark.examples])
        table = table.rows([int(row) for row in drawn], table.where)
    return table


def key_of(benchmark: Benchmark) -> str:
    """Where a configuration has a benchmark."""
    return f"evaluate.benchmarks.{benchmark.name}"


def padded(rows: Sequence[tuple[Sequence[int], int]], pad: int) -> dict[str, Array]:
    """Returns rows of token ids as arrays that `stored_rows` opens.

    Args:
        rows: Token ids of each, and how many of them are given: what is asked for comes after.
        pad: The padding id.
    """
    ids = np.full((len(rows), max((len(row) for row, _ in rows), default=1)), pad, dtype=np.int32)
    for number, (row, _) in enumerate(rows):
        ids[number, : len(row)] = row
    return {
        "input_ids": ids,
        "lengths": np.array([len(row) for row, _ in rows], dtype=np.int32),
        "prompts": np.array([given for _, given in rows], dtype=np.int32),
    }


def stored_rows(data: FederatedDataset, name: str, items: IntArray) -> Split:
    """Opens the rows of a benchmark that was prepared with the data of a run; `items` says which item each is of."""
    prefix = store.benchmark(name)
    return Split(
        input_ids=data.array(f"{prefix}.input_ids"),
        lengths=data.array(f"{prefix}.lengths"),
        prompts=data.array(f"{prefix}.prompts"),
        labels=items,
        key=f"{data.key}/{prefix}",
    )
