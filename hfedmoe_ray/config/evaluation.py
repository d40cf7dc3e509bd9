"""What is measured of a run's model, and when. Torch-free."""

import re
from typing import Literal, Self

from pydantic import PositiveInt, model_validator

from hfedmoe_ray.config.section import Name, Section, UnitInterval

_OF_WRITTEN = ("extract", "until", "max_tokens", "chat")
"""Keys of benchmarks whose answers are written."""


class Benchmark(Section):
    """What a language model is asked besides its own data."""

    name: Name
    kind: Literal["choice", "match", "perplexity"] = "choice"
    """choice: which of several choices the model finds likeliest after the prompt; match: whether what it writes after
    the prompt is the answer (GSM8K); perplexity: how likely it finds the texts that `prompt` makes."""
    source: str
    """Local .jsonl, .csv or .parquet file; of one with a column `split` the test rows, else the validation rows."""
    prompt: str
    """A column, or a pattern of columns such as "Question: {goal}\\nAnswer:"."""
    choices: tuple[str, ...] = ()
    """choice: columns or patterns, one for each choice. `"{A:.0}A"` is the letter A, whatever the column A says."""
    answer: str = "label"
    """choice: column with the number of the right choice, from 0; match: column or pattern of the right answer."""
    delimiter: str = " "
    """choice: what stands between prompt and choice."""
    extract: str | None = None
    """match: a regular expression; what it finds first in the written text counts, or its first group. Default: all of
    the text. GSM8K's is `"#### (\\-?[0-9\\.\\,]+)"`."""
    until: tuple[str, ...] = ()
    """match: texts at which the model stops writing, besides its end-of-sequence token."""
    max_tokens: PositiveInt = 256
    """match: most tokens that are written."""
    chat: bool = False
    """match: put the prompt into the tokenizer's chat template, as a user's turn."""
    examples: PositiveInt | None = None
    """Only so many items, drawn always the same. Default: all."""

    @model_validator(mode="after")
    def _kind(self) -> Self:
        if (self.kind == "choice") != bool(self.choices) or len(self.choices) == 1:
            raise ValueError(
                f"benchmark {self.name}: `choices`, at least two, are what `kind: choice` asks about: write both, or "
                "neither"
            )
        # Compared with defaults, which a resolved configuration spells out.
        fields = type(self).model_fields
        writes = [name for name in _OF_WRITTEN if getattr(self, name) != fields[name].default]
        if self.kind != "match" and writes:
            raise ValueError(
                f"benchmark {self.name}: {', '.join(writes)} says how answers are written, which `kind: "
                f"{self.kind}` does not ask for: leave it out, or write `kind: match`"
            )
        if self.extract is not None:
            try:
                re.compile(self.extract)
            except re.error as error:
                raise ValueError(f"benchmark {self.name}: `extract` is no regular expression ({error})") from error
        return self


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

    def named(self, name: str) -> Benchmark:
        """Returns the benchmark of a name."""
        return next(benchmark for benchmark in self.benchmarks if benchmark.name == name)

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
