"""The experiment that `hfedmoe init` writes: every key one is likely to touch, with what it means."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from hfedmoe_ray.config.json_schema import schema_comment
from hfedmoe_ray.config.load import parse_value

SCHEMA_FILE = "hfedmoe.schema.json"
WITH_A_LINEAR_HEAD = ("bert", "hfedmoe_encoder")
"""Families whose task head can start at class means: weights and a bias."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a first experiment is about."""

    name: str
    """Of the run's directory, too."""
    file: str
    """Where it will be written."""
    data: str
    """`data.source`."""
    text: str
    label: str
    labels: Sequence[str] = ()
    """All labels, where clients read their own files."""
    model: str
    """`model.source`."""
    family: str
    """Its model_type."""
    dense: bool
    clients: int
    rounds: int


def starting_text(start: Start) -> str:
    """Returns a commented configuration."""
    return f"""\
# {start.name}: an experiment of hfedmoe.
#   hfedmoe validate {start.file}  # checks this file, its data and its model
#   hfedmoe plan {start.file}  # says who gets what, whether it fits this machine, and what it will cost
#   hfedmoe run {start.file}  # runs it; keys can be overridden: rounds=2 local.steps=5
{schema_comment(SCHEMA_FILE)}
name: {_word(start.name)}  # the run is written to runs/NAME
seed: 0
strategy: hfedmoe  # or a control: random, frequency, fedavg, …; {{name: hfedmoe, beta: 0.1}} sets its options
backend: ray  # local: the same run in one process, for a debugger
rounds: {start.rounds}

clients:
  count: {start.clients}
  # per_round: {max(1, start.clients // 2)}  # drawn anew each round; default: all of them
  tiers:  # classes of devices; shares sum to 1
    # experts: share of the model's experts that a client holds, trains and sends
    # device: of a GPU, or of a CPU core where there is none; memory_gib: what a client may use
    - {{name: phone, share: 0.5, experts: 0.125, device: 0.1, memory_gib: 1.0}}
    - {{name: laptop, share: 0.3, experts: 0.25, device: 0.2, memory_gib: 1.5}}
    - {{name: server, share: 0.2, experts: 0.5, device: 0.4, memory_gib: 2.0}}

model:
  source: {_word(start.model)}  # package:NAME, a directory, or a name on the hub
{_upcycle(start)}  trainable: {"experts" if start.dense and start.family != "bert" else "top"}  # or experts, top, full
{_head(start)}  # lora: {{rank: 8}}  # train low-rank factors of the experts instead of the experts

data:
  source: {_word(start.data)}  # .jsonl, .csv, .parquet, hub:NAME, package:NAME
  text: {_word(start.text)}  # column of the texts
  label: {_word(start.label)}  # column of the classes
{_partition(start)}
  max_length: 64  # tokens of a text that are read

local:  # what a client does in a round
  steps: 8
  batch_size: 16
  learning_rate: 5.0e-4

evaluate:
  every: 1  # rounds between evaluations of the global model

tracking:
  wandb: {{mode: auto}}  # online with an API key, else offline; or disabled
"""


def _upcycle(start: Start) -> str:
    if not start.dense:
        return ""
    if start.family == "bert":
        return (
            "  # A dense model: each feed-forward layer of its upper half is split into experts; a token uses four.\n"
            "  upcycle: {how: split, experts: 16, top_k: 4}\n"
        )
    return (
        "  # A dense model: each feed-forward layer becomes experts that start as copies of it, with a little noise.\n"
        "  upcycle: {how: copy, experts: 8, top_k: 2}\n"
    )


def _head(start: Start) -> str:
    if start.family not in WITH_A_LINEAR_HEAD:
        return ""
    return "  head: prototypes  # starts at the class means of the clients' features; random: they send no such means\n"


def _partition(start: Start) -> str:
    if start.labels:
        return (
            f"  labels: [{', '.join(map(_word, start.labels))}]  # all of them: the server does not read the files\n"
            "  # test: test.jsonl  # examples on which the server measures the global model\n"
            "  partition: {how: files}  # client 0 reads the file with 0 in place of {client}, on its own node"
        )
    own = "" if start.data.startswith("package:") else "# "
    return (
        f"  {own}max_examples: 4000  # for a first try; all of them without\n"
        f"  {own}test_examples: 1000\n"
        "  # test: test.jsonl  # default: the source's own test split, else a tenth of the data\n"
        "  partition: {how: dirichlet, alpha: 0.3}  # label skew; or {how: iid}, {how: natural, key: COLUMN}"
    )


def _word(text: str) -> str:
    """Text as YAML reads it back: in quotes where it would be something else, in a list too."""
    simple = re.fullmatch(r"[\w./~-][\w./~:+ -]*[\w./~+-]|\w", text) and ": " not in text
    return text if simple and parse_value(text, text) == text else json.dumps(text, ensure_ascii=False)
