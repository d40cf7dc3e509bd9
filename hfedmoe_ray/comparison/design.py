"""What a comparison runs: every strategy in every setting with every seed, each a checked experiment of its own."""

import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfedmoe_ray.config.comparison import Comparison
from hfedmoe_ray.config.explain import closest
from hfedmoe_ray.config.load import Assignment, key_path, load_experiment, parse_value
from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.errors import ConfigError

SHORT = ("budget", "alpha")
"""Names of settings that are shorter than their keys."""
_ITEM = re.compile(r"^(?P<name>[^\[\]]+?)\s*(?:\[(?P<options>.*)\])?$", re.DOTALL)
_LONGEST = 120
"""Characters of a run's name."""

Setting = tuple[tuple[str, Any], ...]
"""One point of the grid: (key, value) pairs; empty without a grid."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a comparison."""

    strategy: str
    """As the comparison names it."""
    setting: Setting
    seed: int
    experiment: Experiment
    """Its `name` is that of the run."""

    @property
    def directory(self) -> Path:
        """The run directory."""
        return Path(self.experiment.output) / self.experiment.name


@dataclass(frozen=True, kw_only=True)
class Design:
    """A comparison, expanded."""

    name: str
    directory: Path
    """Where the comparison's own files go; its runs lie below, in `runs`."""
    strategies: tuple[str, ...]
    settings: tuple[Setting, ...]
    """In the order of the grid; one empty setting without a grid."""
    seeds: tuple[int, ...]
    runs: tuple[Run, ...]
    """By seed, then setting, then strategy: whenever it is interrupted, what there is can be compared."""
    processes: int | None
    """As configured."""
    target: float | None
    """Accuracy whose first reaching is counted in rounds."""


def read_design(
    config: Path, overrides: Sequence[str], *, output: Path | None = None, replaced: Mapping[str, Any] | None = None
) -> Design:
    """Reads what a configuration, and a command line, compare.

    Args:
        config: Configuration file; its section `compare` says what is compared.
        overrides: key=value, for every run.
        output: Directory of the comparison. Default: `output`/`name` of the configuration.
        replaced: Keys of `compare` that the command line sets instead.

    Raises:
        ConfigError: something is unknown, contradicts itself, or there is nothing to compare.
    """
    base = load_experiment(config, overrides)
    if replaced:
        section = (base.compare or Comparison()).model_dump() | dict(replaced)
        base = load_experiment(config, [*overrides, Assignment(path=("compare",), value=section)])
    asked = base.compare or Comparison()
    if not asked.strategies:
        raise ConfigError(
            f"{config} does not say what to compare. Name strategies on the command line (--strategies "
            "hfedmoe,random,fedavg) or in the file (compare: {strategies: [hfedmoe, random, fedavg]})."
        )
    directory = output or Path(base.output) / base.name
    settings = tuple(_settings(asked.grid))
    common = [
        Assignment(path=("output",), value=str(directory / "runs")),
        Assignment(path=("compare",), value=None),
        Assignment(path=("tracking", "wandb", "group"), value=base.tracking.wandb.group or base.name),
    ]
    rows = [(item, _strategy(item, asked, config)) for item in asked.strategies]
    runs = []
    for seed, setting, (item, strategy) in itertools.product(asked.seeds, settings, rows):
        chosen = [*strategy, *(Assignment(path=key_path(k), value=v, origin="grid") for k, v in setting)]
        chosen = [one for raw in chosen for one in _spelled_out(raw, base)]
        name = Assignment(path=("name",), value=_run_name(item, setting, seed))
        # A run stands for its strategy, setting and seed, so these hold over what the command line says for all.
        experiment = _checked(
            config, item, [*overrides, *common, *chosen, name, Assignment(path=("seed",), value=seed)], asked
        )
        runs.append(Run(strategy=item, setting=setting, seed=seed, experiment=experiment))
    _check_names(runs)
    return Design(
        name=base.name,
        directory=directory,
        strategies=asked.strategies,
        settings=settings,
        seeds=asked.seeds,
        runs=tuple(runs),
        processes=asked.processes,
        target=base.evaluate.target,
    )


def split_items(text: str) -> tuple[str, ...]:
    """Splits "a,b[x=1,y=2]" at the commas that stand outside of brackets.

    Raises:
        ConfigError: a bracket is not closed.
    """
    items, depth, start = [], 0, 0
    for position, letter in enumerate(text):
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            items.append(text[start:position])
            start = position + 1
    if depth:
        raise ConfigError(f"'{text}' has a bracket that is not closed, or one too many. Write hfedmoe[beta=0],random.")
    return tuple(item.strip() for item in (*items, text[start:]) if item.strip())


def show_setting(setting: Setting) -> str:
    """Writes a point of the grid: "budget = 0.125, alpha = 0.1"."""
    return ", ".join(f"{key} = {_show(value)}" for key, value in setting)


def _settings(grid: Mapping[str, Sequence[Any]]) -> Iterator[Setting]:
    for key in grid:
        root = key.partition(".")[0]
        known = [*SHORT, *Experiment.model_fields]
        if root not in known:
            raise ConfigError(
                f"grid: {key} is neither a key of the configuration nor a short name.{closest(root, known)} Short "
                f"names are {' and '.join(SHORT)}; any other key is written in full, such as local.steps."
            )
        if root in ("name", "seed", "output", "strategy", "compare") and "." not in key:
            raise ConfigError(f"grid: {key} is no setting: a comparison sets it by itself, from its other options.")
    for values in itertools.product(*grid.values()):
        yield tuple(zip(grid, values, strict=True))


def _strategy(item: str, asked: Comparison, config: Path) -> list[Assignment]:
    """What makes a row's strategy: of its variant, or by name, and what stands in brackets."""
    match = _ITEM.match(item)
    if match is None:
        raise ConfigError(f"strategies: '{item}' is not a name with options in brackets, such as hfedmoe[beta=0].")
    name = match["name"].strip()
    if name in asked.variants:
        origin = f"{config}, variant {name}"
        made = [Assignment(path=path, value=value, origin=origin) for path, value in _flat(asked.variants[name])]
    else:
        made = [Assignment(path=("strategy",), value=name, origin="strategies")]
    for option in split_items(match["options"] or ""):
        key, equals, text = option.partition("=")
        if not equals:
            raise ConfigError(f"strategies: '{option}' in {item} is not an option. Write {name}[key=value].")
        key = key.strip()
        path = key_path(key) if "." in key or key in SHORT else ("strategy", key)
        made.append(Assignment(path=path, value=parse_value(text, f"'{option}'"), origin=f"strategies, {item}"))
    return made


def _flat(section: Mapping[str, Any], above: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Keys and values of nested sections; a list, like an empty section, is a value."""
    for key, value in section.items():
        path = (*above, *key_path(key))
        if isinstance(value, Mapping) and value:
            yield from _flat(value, path)
        else:
            yield path, value


def _spelled_out(one: Assignment, base: Experiment) -> Iterator[Assignment]:
    """Short names become the keys they stand for."""
    match one.path:
        case ("budget",):
            for number in range(len(base.clients.tiers)):
                path = ("clients", "tiers", number, "experts")
                yield Assignment(path=path, value=one.value, origin=f"{one.origin}, budget")
        case ("alpha",):
            yield Assignment(path=("data", "partition", "alpha"), value=one.value, origin=f"{one.origin}, alpha")
        case _:
            yield one


def _checked(config: Path, item: str, assignments: Sequence[str | Assignment], asked: Comparison) -> Experiment:
    """Loads one run's experiment; where its strategy is unknown, says which variants there are too."""
    try:
        return load_experiment(config, assignments)
    except ConfigError as error:
        name = item.partition("[")[0].strip()
        told = f"{item} cannot be compared. {error}"
        if asked.variants and name not in asked.variants and f"strategy is '{name}'" in str(error):
            told += f"{closest(name, list(asked.variants))} Variants of {config} are {', '.join(asked.variants)}."
        raise ConfigError(told) from None


def _run_name(item: str, setting: Setting, seed: int) -> str:
    """hfedmoe-budget0.125-alpha0.1-seed0; a name that would be too long ends in a hash of it."""
    parts = [_slug(item), *(_slug(f"{key.rpartition('.')[2]}{_show(value)}") for key, value in setting), f"seed{seed}"]
    name = "-".join(parts)
    if len(name) <= _LONGEST:
        return name
    return f"{name[: _LONGEST - 13]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-.") or "x"


def _show(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _check_names(runs: Sequence[Run]) -> None:
    """Refuses two runs that would write to the same directory."""
    seen: dict[str, Run] = {}
    for run in runs:
        other = seen.setdefault(run.experiment.name, run)
        if other is not run:
            raise ConfigError(
                f"'{run.strategy}' ({show_setting(run.setting) or 'no grid'}) and '{other.strategy}' "
                f"({show_setting(other.setting) or 'no grid'}) would both be run in {run.experiment.name}. Give one of "
                "them another name, as a variant."
            )
