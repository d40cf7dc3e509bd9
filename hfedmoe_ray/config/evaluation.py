"""What is measured of a run's model, and when. Torch-free."""

from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from hfedmoe_ray.config.section import Name, Section, UnitInterval


class Benchmark(Section):
    """Multiple-choice questions that a language model answers by the choice it finds likeliest after the prompt."""

    name: Name
    source: str
    """Local .jsonl, .csv or .parquet file; of one with a column `split` the test rows, else the validation rows."""
    prompt: str
    """A column, or a pattern of columns such as "Question: {goal}\\nAnswer:"."""
    choices: tuple[str, ...] = Field(min_length=2)
    """Columns or patterns, one for each choice."""
    answer: str = "label"
    """Column with the number of the right choice, from 0."""
    delimiter: str = " "
    """What stands between prompt and choice."""
    examples: PositiveInt | None = None
    """Only so many items, drawn always the same. Default: all."""


class Evaluation(Section):
    """When and how accuracy is measured."""

    every: PositiveInt = 1
    """Evaluate the global model every so many rounds (the last round always)."""
    own: Literal["never", "final", "always"] = "final"
    """When clients evaluate on their own test split holding only their residents."""
    personalised: bool = False
    """Whether, after the last round, each client also trains for one more round by itself, from the final weights and
    with the experts it holds, and evaluates again: its accuracy before and after making the model its own."""
    overlap: bool = True
    """Evaluate a round while the next one trains, in slots that have nothing else to do: what is found is the same, but
    told that much later, and the round's seconds do not contain it. With `backend: local` or `asynchronous`, and after
    the last round, it is evaluated at once."""
    batch_size: PositiveInt = 32
    """Examples of one forward pass. Clients evaluate too, and 64 texts of 64 tokens took more memory than training."""
    benchmarks: tuple[Benchmark, ...] = ()
    """`model.task: causal` or seq2seq: what the whole model is asked before the first round and after the last."""
    target: UnitInterval | None = None
    """Accuracy whose first reaching is reported as rounds_to_target."""

    @model_validator(mode="after")
    def _names(self) -> Self:
        names = [benchmark.name for benchmark in self.benchmarks]
        if len(set(names)) < len(names):
            raise ValueError(f"two benchmarks have the same name: {', '.join(names)}")
        return self

    @model_validator(mode="after")
    def _before_and_after(self) -> Self:
        if self.personalised and self.own == "never":
            raise ValueError(
                "`personalised` compares with what clients reach before they train by themselves, which `own: never` "
                "does not measure: write `own: final`, or leave personalised out"
            )
        return self
