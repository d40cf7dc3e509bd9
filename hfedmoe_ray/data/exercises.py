"""Exercises whose answer a language model writes, and what of it counts.

Of a written answer counts what `extract` finds first, and of both answers what is left after lm-evaluation-harness's
normalisation for GSM8K: no commas, no dollar signs, nothing up to "#### ", no full stop at the end, lower case.

Legend: N exercises, S longest prompt.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from hfedmoe_ray.config.evaluation import Benchmark
from hfedmoe_ray.data import store
from hfedmoe_ray.data.dataset import FederatedDataset, Split
from hfedmoe_ray.data.instructions import prompt_ids
from hfedmoe_ray.data.items import key_of, read_items
from hfedmoe_ray.data.sources import texts_of
from hfedmoe_ray.data.tokenize import pad_id
from hfedmoe_ray.types import Array

_IGNORED = tuple(map(re.compile, (",", r"\$", r"(?s).*#### ", r"\.$")))
_NOTHING = "[invalid]"
"""What an answer counts as in which there is nothing to extract."""


@dataclass(frozen=True, kw_only=True)
class Exercises:
    """Prompts and the answers that are right."""

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    """Normalised."""
    chat: bool
    """Whether a prompt is a user's turn."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Tokenised exercises."""

    rows: Split
    """The prompts."""
    answers: tuple[str, ...]

    def part(self, index: int, count: int) -> "Prompts":
        """Returns slice `index` of `count`, as `Split.part` does."""
        first, end = len(self.answers) * index // count, len(self.answers) * (index + 1) // count
        return Prompts(rows=self.rows.part(index, count), answers=self.answers[first:end])


def read_exercises(benchmark: Benchmark) -> Exercises:
    """Reads a benchmark's file; raises DataError if it, a column or a text is missing."""
    table, key = read_items(benchmark), key_of(benchmark)
    return Exercises(
        prompts=texts_of(table, benchmark.prompt, f"{key}.prompt"),
        answers=tuple(map(normalised, texts_of(table, benchmark.answer, f"{key}.answer"))),
        chat=benchmark.chat,
    )


def tokenize_exercises(
    tokenizer: Any, exercises: Exercises, max_length: int, *, translates: bool = False
) -> dict[str, Array]:
    """Returns the arrays of `Prompts` by name; a prompt longer than `max_length` loses its beginning."""
    rows = [
        prompt_ids(tokenizer, prompt, chat=exercises.chat, translates=translates)[-max_length:]
        for prompt in exercises.prompts
    ]
    ids = np.full((len(rows), max(map(len, rows), default=1)), pad_id(tokenizer), dtype=np.int32)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
    return {
        "input_ids": ids,
        "lengths": np.array([len(row) for row in rows], dtype=np.int32),
        "answers": np.array(exercises.answers, dtype=np.str_),
    }


def stored_exercises(data: FederatedDataset, name: str) -> Prompts:
    """Opens exercises that were prepared with the data of a run."""
    prefix = store.benchmark(name)
    lengths = data.array(f"{prefix}.lengths")
    rows = Split(
        input_ids=data.array(f"{prefix}.input_ids"),
        lengths=lengths,
        labels=np.arange(len(lengths)),
        key=f"{data.key}/{prefix}",
    )
    return Prompts(rows=rows, answers=tuple(map(str, data.array(f"{prefix}.answers"))))


def is_right(written: str, answer: str, benchmark: Benchmark) -> bool:
    """Whether what a model has written says the (normalised) answer."""
    written = until_stopped(written, benchmark)
    if benchmark.extract is not None:
        found = re.search(benchmark.extract, written)
        written = _NOTHING if found is None else (found[1] if found.re.groups else found[0])
    return normalised(written) == answer


def until_stopped(written: str, benchmark: Benchmark) -> str:
    """Returns what was written before the first of the texts that end an answer."""
    for ending in benchmark.until:
        written = written.split(ending, maxsplit=1)[0]
    return written


def normalised(answer: str) -> str:
    """Returns what of an answer is compared."""
    answer = answer.strip()
    for pattern in _IGNORED:
        answer = pattern.sub("", answer)
    return answer.lower()
