"""From a failed validation to one paragraph: what is wrong, where it is written, and what may stand there instead."""

import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from hfedmoe_ray.config.plugins import is_plugin, plugin_options
from hfedmoe_ray.config.schema import Experiment

KeyPath = tuple[str | int, ...]
"""Keys and list positions from the top of the configuration, such as ("clients", "tiers", 0, "share")."""

SHOWN_PROBLEMS = 4

NEEDS = {
    "greater_than": "greater than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "string_type": "text (put it in quotes)",
    "string_pattern_mismatch": "made of letters, digits, dots, dashes and underscores, with a letter or digit first",
    "string_too_long": "at most {max_length} characters long",
    "tuple_type": "a list, such as [a, b]",
    "too_short": "a list of at least {min_length}",
    "model_type": "a section with keys of its own",
    "model_attributes_type": "a section with keys of its own",
    "dict_type": "a section with keys of its own",
}
"""What a value must be, to follow "it must be", by pydantic's type of error and with its context."""


def explain(error: ValidationError, values: Any, origins: Mapping[KeyPath, str], file: str) -> str:
    """Tells the first problem in full and the others briefly.

    Args:
        error: what pydantic found.
        values: the plain nested values that were validated.
        origins: where each key was written.
        file: the file the user named, for keys that were written nowhere.
    """
    problems: dict[KeyPath, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        problems.setdefault(_data_path(details, values), []).append(details)
    first, *others = (
        (f"{_origin(path, origins, file)}: {show_path(path)}", *_sentence(path, details, values))
        for path, details in problems.items()
    )
    text = "{}{}.{}".format(*first)
    if others:
        more = "; ".join(f"{place}{what}" for place, what, _ in others[: SHOWN_PROBLEMS - 1])
        rest = len(others) - (SHOWN_PROBLEMS - 1)
        text += f" Also: {more}" + (f"; and {rest} more." if rest > 0 else ".")
    return text


def closest(word: str, known: Sequence[str]) -> str:
    """Returns " Did you mean X?" for the known word nearest to a mistyped one, or nothing."""
    near = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {near[0]}?" if near else ""


def show_path(path: KeyPath) -> str:
    """Writes a key as overrides name it: clients.tiers.0.share."""
    return ".".join(map(str, path))


def _data_path(details: ErrorDetails, values: Any) -> KeyPath:
    """The keys of pydantic's location, without the names of union branches that it puts between them."""
    path: list[str | int] = []
    location = details["loc"]
    for depth, part in enumerate(location):
        listed = isinstance(values, list) and isinstance(part, int)
        if listed or (isinstance(values, Mapping) and part in values):
            values = values[part]
            path.append(part)
        elif details["type"] == "missing" and depth == len(location) - 1:
            path.append(part)
    return tuple(path)


def _origin(path: KeyPath, origins: Mapping[KeyPath, str], file: str) -> str:
    """Where the key, or else the nearest section above it, was written."""
    for depth in range(len(path), 0, -1):
        if path[:depth] in origins:
            return origins[path[:depth]]
    return file


def _sentence(path: KeyPath, problems: Sequence[ErrorDetails], values: Any) -> tuple[str, str]:
    """Returns what is wrong, to follow the key's name, and advice to follow as sentences of its own."""
    details = problems[0]
    context: Mapping[str, Any] = details.get("ctx", {})
    match details["type"]:
        case "extra_forbidden":
            return " is not a known key", _advise_key(path, values)
        case "missing":
            return " is required and not set", ""
        case "value_error":
            return f": {context['error']}", ""
        case "union_tag_invalid":
            allowed = _quoted_words(context["expected_tags"])
            wrong = str(context["tag"])
            return f" is '{wrong}'; it must be one of {', '.join(allowed)}", closest(wrong, allowed)
        case "literal_error" if len(problems) == 1:
            allowed = _quoted_words(context["expected"])
            wrong = str(details["input"])
            return f" is '{wrong}'; it must be {_one_of(allowed)}", closest(wrong, allowed)
    needs = " or ".join(dict.fromkeys(_need(problem) for problem in problems))
    return f" is {_show_value(details['input'])}; it must be {needs}", ""


def _need(details: ErrorDetails) -> str:
    """What may stand there, as the end of "it must be …"."""
    context: Mapping[str, Any] = details.get("ctx", {})
    if details["type"] == "literal_error":
        return _one_of(_quoted_words(context["expected"]))
    if details["type"] in NEEDS:
        return NEEDS[details["type"]].format(**context)
    return details["msg"][0].lower() + details["msg"][1:]


def _advise_key(path: KeyPath, values: Any) -> str:
    """For an unknown key: the same key in another section, or else the nearest here and all that are known here."""
    *above, wrong = path
    elsewhere = {name for name in all_keys(Experiment, "") if name.rpartition(".")[2] == wrong} - {show_path(path)}
    # What one strategy does not know is rather another strategy's option than another section's.
    if len(elsewhere) == 1 and above != ["strategy"]:
        return f" Did you mean {elsewhere.pop()}?"
    known = list(_fields(above, values))
    return f"{closest(str(wrong), known)} Known here: {', '.join(known)}."


def _fields(path: Sequence[str | int], values: Any) -> Iterator[str]:
    """Keys that may be written in the section at `path`; of the strategies only the one that is named there."""
    models: tuple[type[BaseModel], ...] = (Experiment,)
    for part in path:
        values = values[part]
        if isinstance(part, str):
            models = models_in(models[0].model_fields[part].annotation)
    if models[1:]:
        name = values["name"]
        models = (
            (plugin_options(name),)
            if is_plugin(name)
            else tuple(model for model in models if model.model_fields["name"].default == name)
        )
    return iter(models[0].model_fields)


def all_keys(model: type[BaseModel], prefix: str) -> Iterator[str]:
    """Every key of the schema with the sections above it; a list's items are written as item 0."""
    for name, info in model.model_fields.items():
        inner = models_in(info.annotation)
        if not inner:
            yield prefix + name
        listed = typing.get_origin(info.annotation) is tuple
        for section in inner:
            yield from all_keys(section, f"{prefix}{name}{'.0' if listed else ''}.")


def models_in(annotation: Any) -> tuple[type[BaseModel], ...]:
    """Sections named by a type, below optional, tuple and union."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return (annotation,) if issubclass(annotation, BaseModel) else ()
    return tuple(model for part in typing.get_args(annotation) for model in models_in(part))


def _quoted_words(text: str) -> list[str]:
    """The words of pydantic's "'a', 'b' or 'c'"."""
    return [word for index, word in enumerate(text.split("'")) if index % 2]


def _one_of(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"one of {', '.join(words)}"


def _show_value(value: Any) -> str:
    if value is None:
        return "empty"
    text = "a section" if isinstance(value, Mapping) else "a list" if isinstance(value, list) else repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
