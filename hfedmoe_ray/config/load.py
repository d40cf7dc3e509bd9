"""From a YAML file and `key=value` overrides to a checked `Experiment`, and back.

YAML is read by the rules of YAML 1.2 (`1e-4` is a number, `off` is a word), every key may occur once, and the place of
each key is remembered, so that a mistake is reported with file and line. `extends: other.yaml` names a file, relative
to this one, whose keys hold wherever this file does not set them: mappings are merged, lists and values replaced.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from hfedmoe_ray.config.credentials import check_credentials
from hfedmoe_ray.config.explain import KeyPath, closest, explain, show_path
from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.errors import ConfigError

COMMAND_LINE = "command line"
STRATEGY: KeyPath = ("strategy",)
DEFAULT_STRATEGY: str = Experiment.model_fields["strategy"].default.name

# The "core schema" of YAML 1.2. PyYAML's own rules read `off` as false, `1e-4` as text and `1:30` as ninety.
_SCALARS = (
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", list("-+.0123456789")),
)


class _Loader(yaml.SafeLoader):
    """Reads plain values by the core schema."""


class _Dumper(yaml.SafeDumper):
    """Writes them so that `_Loader` reads them back."""


for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    for _tag, _pattern, _first in _SCALARS:
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


@dataclass
class _Tree:
    """Plain nested values, and where each key was written ("file:line" or "command line")."""

    values: dict[str, Any]
    origins: dict[KeyPath, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """One key set to a value, by somebody other than the file."""

    path: KeyPath
    value: Any
    origin: str = COMMAND_LINE
    """Where it was written, as a mistake in it is told."""


def load_experiment(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str | Assignment] = (), **sections: Any
) -> Experiment:
    """Reads a configuration file, what it extends, and overrides such as `local.steps=5` or `clients.tiers.0.share=1`.

    Args:
        source: The file, or a mapping of the same keys; what that extends is named relative to the working directory.
        overrides: Keys set last.
        sections: Further top-level keys, laid over those of the source as over a file that is extended.

    Override values are YAML; of two for the same key the later one holds.

    A strategy may be overridden by name (`strategy=random`): the options of another strategy
    are then dropped.

    Raises:
        ConfigError: with one paragraph that says what is wrong, where, and what to write instead.
    """
    if isinstance(source, Mapping):
        place = "configuration"
        tree = _Tree(_plain(source))
        _merge(tree, _Tree(_plain(sections)))
        tree = _extended(tree, Path(), ())
    else:
        place = str(source)
        tree = _read(Path(source), ())
        _merge(tree, _Tree(_plain(sections)))
    # A strategy's name decides which options exist, so it is set before any of them, wherever it stands in the line.
    parsed = [parse_override(one) if isinstance(one, str) else one for one in overrides]
    for one in sorted(parsed, key=lambda one: not _names_strategy(one.path)):
        _assign(tree, one)
    strategy = tree.values.get("strategy")
    if isinstance(strategy, dict):
        strategy.setdefault("name", DEFAULT_STRATEGY)
    check_credentials(tree.values)
    try:
        return Experiment.model_validate(tree.values)
    except ValidationError as error:
        raise ConfigError(explain(error, tree.values, tree.origins, place)) from None


def dump_experiment(experiment: Experiment) -> str:
    """Returns the whole configuration, defaults included, as YAML that `load_experiment` reads back as an equal one."""
    return yaml.dump(experiment.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, width=120)


# ------------------------------------------------------------------------------------------------------- files


def _read(path: Path, extended_by: tuple[Path, ...]) -> _Tree:
    """Reads one file and, below it, the file it extends."""
    if path.resolve() in extended_by:
        chain = " -> ".join(str(one) for one in (*extended_by, path.resolve()))
        raise ConfigError(f"{path} extends itself: {chain}. Remove one `extends`.")
    return _extended(_parse_file(path), path.parent, (*extended_by, path.resolve()))


def _extended(tree: _Tree, directory: Path, extended_by: tuple[Path, ...]) -> _Tree:
    """Lays the keys over those of the file they extend, if any."""
    base = tree.values.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        place = tree.origins.get(("extends",), "configuration")
        raise ConfigError(f"{place}: `extends` is {base!r}; write the name of one YAML file.")
    below = _read(directory / base, extended_by)
    _merge(below, tree)
    return below


def _plain(value: Any) -> Any:
    """A copy as YAML would have it: mappings and sequences as dicts and lists, paths as text."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def _parse_file(path: Path) -> _Tree:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = [str(one) for one in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise ConfigError(f"There is no configuration file {path}.{closest(str(path), siblings)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a configuration: {error}.") from None
    origins: dict[KeyPath, str] = {}
    values = _parse_yaml(text, str(path), origins)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no keys: a configuration is a YAML mapping, such as `name: my-run`.")
    return _Tree(values, origins)


def _parse_yaml(text: str, source: str, origins: dict[KeyPath, str]) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return None if node is None else _construct(loader, node, (), source, origins)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}:{mark.line + 1}, column {mark.column + 1}" if mark else source
        raise ConfigError(f"{place}: this is not valid YAML: {error.problem or error.context}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: this is not valid YAML: {error}.") from None
    finally:
        loader.dispose()


def _construct(loader: _Loader, node: yaml.Node, path: KeyPath, source: str, origins: dict[KeyPath, str]) -> Any:
    """Turns a YAML node into plain values, noting the line of every key and refusing a key written twice."""
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = f"{source}:{key_node.start_mark.line + 1}"
            key = loader.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise ConfigError(f"{place}: the key {key!r} is not a word; put it in quotes if it is meant as text.")
            if key in values:
                first = origins[(*path, key)].rpartition(":")[2]
                raise ConfigError(
                    f"{place}: {show_path((*path, key))} is already set in line {first}. Keep one of the two."
                )
            origins[(*path, key)] = place
            values[key] = _construct(loader, value_node, (*path, key), source, origins)
        return values
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            origins[(*path, index)] = f"{source}:{item.start_mark.line + 1}"
        return [_construct(loader, item, (*path, index), source, origins) for index, item in enumerate(node.value)]
    return loader.construct_object(node, deep=True)


def _merge(below: _Tree, above: _Tree) -> None:
    """Lays the keys of `above` over `below`, in place; a strategy of another name replaces the one below."""
    if "strategy" in above.values and "strategy" in below.values:
        new = above.values["strategy"] = _as_options(above.values["strategy"])
        old = below.values["strategy"] = _as_options(below.values["strategy"])
        if _strategy_name(old) != _strategy_name(new):
            del below.values["strategy"]
    below.values = _laid_over(below.values, above.values)
    below.origins.update(above.origins)


def _laid_over(below: Any, above: Any) -> Any:
    if not (isinstance(below, Mapping) and isinstance(above, Mapping)):
        return above
    return {**below, **{key: _laid_over(below.get(key), value) for key, value in above.items()}}


# --------------------------------------------------------------------------------------------------- overrides


def parse_override(text: str) -> Assignment:
    """Reads `key=value`.

    Raises:
        ConfigError: It is something else.
    """
    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"'{text}' on the command line is not an override. Write key=value, such as local.steps=5.")
    return Assignment(path=key_path(key.strip()), value=parse_value(raw, f"'{text}'"))


def parse_value(text: str, source: str) -> Any:
    """Reads a value by the rules of YAML; `source` says in a refusal where it stands."""
    return _parse_yaml(text, source, {})


def key_path(key: str) -> KeyPath:
    """Splits clients.tiers.0.share into its parts."""
    return tuple(int(part) if part.isdecimal() else part for part in key.split("."))


def _assign(tree: _Tree, one: Assignment) -> None:
    """Sets one key, creating the sections above it, in place."""
    path, value = one.path, one.value
    if _names_strategy(path) and isinstance(value, str):
        old = tree.values.get("strategy")
        if old is not None and _strategy_name(_as_options(old)) == value:
            return
        path, value = STRATEGY, {"name": value}
    if len(path) > 1 and path[:1] == STRATEGY:
        tree.values["strategy"] = _as_options(tree.values.get("strategy"))
    section: Any = tree.values
    for depth in range(len(path) - 1):
        key = _checked_key(section, path, depth, one.origin)
        if isinstance(section, dict) and section.get(key) is None:
            section[key] = {}
        section = section[key]
    section[_checked_key(section, path, len(path) - 1, one.origin)] = value
    tree.origins = {at: line for at, line in tree.origins.items() if at[: len(path)] != path}
    tree.origins[path] = one.origin


def _checked_key(section: Any, path: KeyPath, depth: int, origin: str) -> Any:
    """`path[depth]` as a key of the section or a position in the list that stands there."""
    part = path[depth]
    written = "on the command line" if origin == COMMAND_LINE else f"in {origin}"
    place = f"'{show_path(path)}' {written}: {show_path(path[:depth])}"
    if isinstance(section, dict):
        return str(part)
    if not isinstance(section, list):
        raise ConfigError(f"{place} is the value {section!r}, which has no keys of its own.")
    if not isinstance(part, int) or part >= len(section):
        raise ConfigError(f"{place} is a list of {len(section)}; name an item by its number, 0 to {len(section) - 1}.")
    return part


def _names_strategy(path: KeyPath) -> bool:
    return path in (STRATEGY, (*STRATEGY, "name"))


def _as_options(strategy: Any) -> Any:
    """`strategy: random` is short for `strategy: {name: random}`."""
    return {"name": strategy} if isinstance(strategy, str) else strategy


def _strategy_name(options: Any) -> Any:
    return options.get("name", DEFAULT_STRATEGY) if isinstance(options, Mapping) else options
