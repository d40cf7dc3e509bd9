"""The rows of a benchmark's file, whatever is asked about them."""

import numpy as np

from hfedmoe_ray.config.evaluation import Benchmark
from hfedmoe_ray.data.sources import TEST_SPLITS, columns_of, split_rows
from hfedmoe_ray.data.tables import Table, read_file
from hfedmoe_ray.seeds import generator


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
