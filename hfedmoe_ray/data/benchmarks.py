"""What a benchmark's file becomes, by its kind."""

from dataclasses import dataclass
from typing import Any

from hfedmoe_ray.config.evaluation import Benchmark
from hfedmoe_ray.data.choices import Choices, Questions, read_questions, stored_choices, tokenize_questions
from hfedmoe_ray.data.dataset import FederatedDataset
from hfedmoe_ray.data.exercises import Exercises, Prompts, read_exercises, stored_exercises, tokenize_exercises
from hfedmoe_ray.data.passages import Passages, read_passages, stored_passages, tokenize_passages
from hfedmoe_ray.types import Array


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The items of a benchmark as text."""

    items: Questions | Exercises | tuple[str, ...]

    @property
    def facts(self) -> Any:
        """Everything that decides the arrays, for JSON."""
        match self.items:
            case Questions() as asked:
                return [asked.prompts, asked.choices, asked.answers.tolist()]
            case Exercises() as asked:
                return [asked.prompts, asked.answers, asked.chat]
            case texts:
                return texts

    def tokenized(self, tokenizer: Any, max_length: int, *, translates: bool) -> dict[str, Array]:
        """Returns the arrays that are stored, by name.

        Raises:
            DataError: A choice is too long, or has no token of its own.
        """
        match self.items:
            case Questions() as asked:
                return tokenize_questions(tokenizer, asked, max_length, translates=translates)
            case Exercises() as asked:
                return tokenize_exercises(tokenizer, asked, max_length, translates=translates)
            case texts:
                return tokenize_passages(tokenizer, texts, max_length)


def read_benchmark(benchmark: Benchmark) -> Asked:
    """Reads a benchmark's file; raises DataError if it, a column or a text is missing, or an answer names no choice."""
    read = {"choice": read_questions, "match": read_exercises, "perplexity": read_passages}
    items: Any = read[benchmark.kind](benchmark)
    return Asked(items=items)


def stored_benchmark(data: FederatedDataset, benchmark: Benchmark) -> Choices | Prompts | Passages:
    """Opens a benchmark that was prepared with the data of a run."""
    match benchmark.kind:
        case "choice":
            return stored_choices(data, benchmark.name)
        case "match":
            return stored_exercises(data, benchmark.name)
        case "perplexity":
            return stored_passages(data, benchmark.name)
