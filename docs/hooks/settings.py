"""Makes the page `reference/configuration.md` out of the configuration's own schema whenever the pages are built.

Keys, types, bounds and defaults are pydantic's; what a key means is the docstring below it. So the page cannot say
anything else than what the package does, and nobody has to keep it up to date.
"""

import types
import typing
from collections.abc import Iterator
from typing import Any

import annotated_types as bounds
import griffe
import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from hfedmoe_ray.config.schema import Experiment

PAGE = "reference/configuration.md"
INTRODUCTION = """\
# Configuration

Every key an experiment may have, made from `hfedmoe_ray/config/` when these pages were built. A file is YAML 1.2; a key
can be overridden on the command line by its path, `clients.tiers.0.experts=0.25`; `extends: other.yaml` takes another
file's keys first. Lists are replaced, sections are merged. An unknown key is refused, with the nearest known one.
`hfedmoe validate` checks a file, and the `config.yaml` of a run has every key with its value.
"""
SIMPLE = {bool: "true or false", int: "whole number", float: "number", str: "text", Any: "anything"}


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the page (an event of MkDocs)."""
    files.append(File.generated(config, PAGE, content=page()))
    return files


def page() -> str:
    """The whole page, as Markdown."""
    package = griffe.load("hfedmoe_ray.config")
    # Strategies last: they are many, and a reader looks for one of them.
    sections = sorted(_sections(Experiment, ""), key=lambda section: section[0].startswith("strategy"))
    return INTRODUCTION + "\n".join(text for path, section in sections for text in _section(package, section, path))


def _sections(section: type[BaseModel], path: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """A section and those below it, each with its place in a file."""
    yield path, section
    for name, field in section.model_fields.items():
        for below in sections_in(field.annotation):
            key = f"{path}.{name}" if path else name
            if typing.get_origin(field.annotation) is tuple:
                key += ".0"
            chosen = below.model_fields.get("name")
            if key != "strategy":
                yield from _sections(below, key)
            elif chosen is not None and isinstance(chosen.default, str):
                yield from _sections(below, f"strategy: {chosen.default}")


def _section(package: Any, section: type[BaseModel], path: str) -> Iterator[str]:
    """A section's heading and keys."""
    heading = f"`{path}` {{#{_anchor(path)}}}" if path else "The whole file"
    yield f"\n## {heading}\n\n{_docstring(package, section)}\n"
    for name, field in section.model_fields.items():
        yield _key(package, section, name, field, f"{path}.{name}" if path else name)


def _key(package: Any, section: type[BaseModel], name: str, field: FieldInfo, path: str) -> str:
    """One key, as a term with its meaning."""
    below, listed = sections_in(field.annotation), typing.get_origin(field.annotation) is tuple
    meaning = _attribute(package, section, name)
    if below:
        kind = "list of sections" if listed else "section"
        where = f"#{_anchor('strategy: hfedmoe' if name == 'strategy' else path + '.0' * listed)}"
        meaning = f"{meaning or _docstring(package, below[0]).splitlines()[0]} [Its keys]({where})"
        if name == "strategy":
            meaning = f"The method, as a name or with its options: [each has a section below]({where})."
    else:
        kind = describe(field.annotation, field.metadata)
    if field.is_required():
        default = "required"
    elif below or field.default is None or field.default is PydanticUndefined:
        default = "optional"
    else:
        default = f"default `{_written(field.default)}`"
    term = f"`{name}` — {kind}; {default}\n"
    return term + (":   " + meaning.replace("\n", "\n    ") + "\n" if meaning else "")


def _anchor(path: str) -> str:
    return path.replace(": ", "-").replace(".", "-")


def describe(annotation: Any, metadata: typing.Iterable[Any] = ()) -> str:
    """A type and its bounds in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return describe(arguments[0], [*arguments[1:], *metadata])
    limits = [limit for item in metadata for limit in _limits(item)]
    if origin is typing.Literal:
        kind = " \\| ".join(f"`{one}`" for one in arguments)
    elif origin in (typing.Union, types.UnionType):
        kind = " or ".join(describe(one) for one in arguments if one is not types.NoneType)
    elif origin is tuple:
        kind = f"list of: {describe(arguments[0])}"
    elif origin is dict:
        kind = "mapping of names to values"
    else:
        kind = SIMPLE.get(annotation, getattr(annotation, "__name__", str(annotation)))
    return ", ".join([kind, *limits])


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a type names, below optional, list and union."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [one for part in typing.get_args(annotation) for one in sections_in(part)]


def _limits(item: Any) -> Iterator[str]:
    words = {"gt": "greater than {:g}", "ge": "at least {:g}", "lt": "less than {:g}", "le": "at most {:g}"}
    if isinstance(item, FieldInfo):
        for one in item.metadata:
            yield from _limits(one)
    for kind, word in words.items():
        if isinstance(item, (bounds.Gt, bounds.Ge, bounds.Lt, bounds.Le)) and hasattr(item, kind):
            yield word.format(getattr(item, kind))
    if isinstance(item, bounds.MinLen):
        yield f"at least {item.min_length} of them"


def _written(value: Any) -> str:
    """A value as YAML writes it."""
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True).removesuffix("...\n").strip()


def _docstring(package: Any, section: type[BaseModel]) -> str:
    found = package[f"{section.__module__.removeprefix('hfedmoe_ray.config.')}.{section.__qualname__}"].docstring
    return found.value if found else ""


def _attribute(package: Any, section: type[BaseModel], name: str) -> str:
    """The docstring below a key, in the section itself or in one that it derives from."""
    for one in section.__mro__:
        if one.__module__.startswith("hfedmoe_ray.config."):
            members = package[f"{one.__module__.removeprefix('hfedmoe_ray.config.')}.{one.__qualname__}"].members
            if name in members and members[name].docstring:
                return str(members[name].docstring.value)
    return ""
