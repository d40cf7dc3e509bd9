"""The configuration as a JSON schema, so that editors complete keys, show what they mean and mark mistakes.

Pydantic draws it from the models; what it cannot know is added here: the docstring below each key, `extends`, which
lets every key of a section be missing, and the short forms `strategy: NAME` and `rules: NAME`.
"""

import ast
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

from pydantic import BaseModel

from hfedmoe_ray.config.explain import models_in
from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.config.section import Section
from hfedmoe_ray.config.server import PRESETS

Schema = dict[str, Any]

MODELINE = "# yaml-language-server: $schema="
"""Begins the comment by which a YAML file names its schema to editors."""
_STRATEGY_OF_YOUR_OWN = {
    "type": "object",
    "description": 'A strategy of your own: name is "package.module:Class", the other keys are its options.',
    "properties": {"name": {"type": "string", "pattern": ":"}},
    "required": ["name"],
}


def configuration_schema() -> Schema:
    """Returns the schema of what a configuration file may hold (JSON Schema, draft 2020-12)."""
    drawn = Experiment.model_json_schema()
    sections = {model.__name__: model for model in _all_sections(Experiment)}
    definitions: dict[str, Schema] = {name: drawn["$defs"][name] for name in sorted(sections) if name in drawn["$defs"]}
    for name, section in definitions.items():
        _describe(section, sections[name])
    _describe(drawn, Experiment)
    keys: dict[str, Schema] = drawn["properties"]
    keys["strategy"] = _strategy(keys["strategy"], definitions)
    keys["rules"] = keys["rules"] | {"anyOf": [{"enum": sorted(PRESETS)}, {"$ref": keys["rules"].pop("$ref")}]}
    needed = _needed(drawn | {"$defs": definitions}, definitions)
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A configuration of hfedmoe",
        "description": drawn["description"],
        "type": "object",
        "properties": {
            "extends": {
                "type": "string",
                "description": "A YAML file whose keys hold where this one does not set them.",
            },
            **keys,
        },
        "additionalProperties": False,
        "if": {"not": {"required": ["extends"]}},
        "then": needed,
        "$defs": definitions,
    }
    _tidy(schema)
    return schema


def schema_text() -> str:
    """The schema as it is committed and printed."""
    return json.dumps(configuration_schema(), indent=1, ensure_ascii=False) + "\n"


def schema_comment(path: str | Path) -> str:
    """The comment that makes editors use the schema in this file."""
    return f"{MODELINE}{path}"


# ------------------------------------------------------------------------------------------------------- what it adds


def _all_sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """The model's sections at every depth, strategies among them."""
    for info in model.model_fields.values():
        for inner in models_in(info.annotation):
            yield inner
            yield from _all_sections(inner)


def _describe(schema: Schema, model: type[BaseModel]) -> None:
    """Gives every key the docstring that stands below it, in place."""
    schema["description"] = _unwrapped(model.__doc__ or "")
    for base in reversed(model.__mro__):
        if issubclass(base, Section):
            for key, text in _docstrings(base):
                if key in schema.get("properties", {}):
                    schema["properties"][key]["description"] = text


def _docstrings(model: type[BaseModel]) -> Iterator[tuple[str, str]]:
    [parsed] = ast.parse(dedent(inspect.getsource(model))).body
    assert isinstance(parsed, ast.ClassDef)
    for key, below in zip(parsed.body, parsed.body[1:], strict=False):
        if isinstance(key, ast.AnnAssign) and isinstance(key.target, ast.Name):
            match below:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    yield key.target.id, _unwrapped(text)


def _unwrapped(docstring: str) -> str:
    """Its paragraphs, each in one line: editors wrap them as they like."""
    return re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(docstring))


def _strategy(drawn: Schema, definitions: dict[str, Schema]) -> Schema:
    """A name, or a name with options of that strategy; without a name, options of any (as `extends` may name it)."""
    references = drawn["anyOf"][0]["oneOf"]
    del definitions["StrategyOptions"]
    options: dict[str, Schema] = {}
    names = []
    for reference in references:
        one = definitions[reference["$ref"].rpartition("/")[2]]
        one["required"] = ["name"]
        names.append(one["properties"]["name"]["const"])
        options |= {key: {"description": value.get("description", "")} for key, value in one["properties"].items()}
    del options["name"]
    unnamed = {"type": "object", "properties": options, "additionalProperties": False}
    own = {"type": "string", "pattern": ":"}
    return {
        "description": drawn.get(
            "description", "Which experts a client holds and trains, and how updates are averaged."
        ),
        "anyOf": [{"enum": names}, own, *references, _STRATEGY_OF_YOUR_OWN, unnamed],
    }


def _needed(schema: Schema, definitions: dict[str, Schema]) -> Schema:
    """Takes `required` out of the sections that `extends` can complete, in place; returns it as a condition.

    Items of a list are replaced as a whole, so that their keys stay required.
    """
    needed: Schema = {}
    if required := schema.pop("required", None):
        needed["required"] = required
    inner = {}
    for key, value in schema["properties"].items():
        for branch in (value, *value.get("anyOf", ())):
            name = branch.get("$ref", "").rpartition("/")[2]
            if name and key != "strategy" and (found := _needed(definitions[name], definitions)):
                inner[key] = found
    if inner:
        needed["properties"] = inner
    return needed


def _tidy(schema: Any) -> None:
    """Takes away, in place, what says nothing: titles made of keys, and defaults that repeat a whole section."""
    if isinstance(schema, list):
        for one in schema:
            _tidy(one)
    elif isinstance(schema, dict):
        for key, value in list(schema.items()):
            if key == "properties":
                for inner in value.values():
                    inner.pop("title", None)
                    if isinstance(inner.get("default"), dict):
                        del inner["default"]
                    _tidy(inner)
            elif key == "$defs":
                for inner in value.values():
                    inner.pop("title", None)
                    _tidy(inner)
            elif key not in ("default", "required", "enum"):
                _tidy(value)
