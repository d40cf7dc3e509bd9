"""What a shell completes: commands, options and files by click, and here the keys and values of overrides."""

import os
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class, split_arg_string

Schema = Mapping[str, Any]

# Readline cuts words at "=" too, and takes what is offered for what follows it. Therefore the whole line is read, and
# of key=value the value alone is offered. After a section or a key more is to come, so no space is set.
_BASH = """\
%(complete_func)s() {
    local IFS=$'\\n'
    local completion type value
    for completion in $(env COMP_LINE="${COMP_LINE:0:COMP_POINT}" %(complete_var)s=bash_complete "$1"); do
        IFS=',' read -r type value <<< "$completion"
        case $type in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain)
                [[ $value == *[.=] ]] && compopt -o nospace
                [[ $value == *=?* && $COMP_WORDBREAKS == *=* ]] && value=${value#*=}
                COMPREPLY+=("$value") ;;
        esac
    done
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""


@add_completion_class
class Bash(BashComplete):
    """click's completion for bash, for words that hold a "="."""

    source_template: ClassVar[str] = _BASH

    def get_completion_args(self) -> tuple[list[str], str]:
        """The complete words after the program's name, and the one that is being written."""
        line = os.environ["COMP_LINE"]
        words = split_arg_string(line)
        incomplete = words.pop() if words and not line[-1].isspace() else ""
        return words[1:], incomplete


def complete_override(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offers, of KEY=VALUE, the next part of the key, or the values of a key that has few."""
    from hfedmoe_ray.config.json_schema import configuration_schema

    schema = configuration_schema()
    key, equals, value = incomplete.partition("=")
    if equals:
        found = dict(_keys(schema, schema, key.split(".")[:-1])).get(key.rpartition(".")[2], {})
        return [CompletionItem(f"{key}={one}") for one in _values(schema, found) if one.startswith(value)]
    *above, begun = key.split(".")
    prefix = "".join(f"{part}." for part in above)
    return [
        CompletionItem(f"{prefix}{name}{'.' if any(_keys(schema, inner, [])) else '='}", help=_first(inner))
        for name, inner in _keys(schema, schema, above)
        if name.startswith(begun) and name != "extends"
    ]


def _keys(schema: Schema, section: Schema, path: list[str]) -> Iterator[tuple[str, Schema]]:
    """Keys of the section at `path` below a section, each once; of a list, item 0."""
    found: dict[str, Schema] = {}
    for branch in _branches(schema, section):
        inner = branch.get("properties", {"0": branch["items"]} if "properties" in _item(schema, branch) else {})
        if path:
            at = path[0] if "properties" in branch else "0"
            found |= dict(_keys(schema, inner[at], path[1:])) if at in inner else {}
        else:
            found |= {key: value for key, value in inner.items() if found.get(key) is None}
    yield from found.items()


def _item(schema: Schema, branch: Schema) -> Schema:
    """What a list's items are, if sections of their own."""
    return next(_branches(schema, branch["items"])) if isinstance(branch.get("items"), dict) else {}


def _branches(schema: Schema, value: Schema) -> Iterator[Schema]:
    """What a value may be, references followed."""
    if "$ref" in value:
        value = schema["$defs"][value["$ref"].rpartition("/")[2]]
    for branch in value.get("anyOf", [value]):
        if branch is value:
            yield value
        else:
            yield from _branches(schema, branch)


def _values(schema: Schema, value: Schema) -> Iterator[str]:
    for branch in _branches(schema, value):
        yield from map(str, branch.get("enum", ()))
        if branch.get("type") == "boolean":
            yield from ("true", "false")


def _first(value: Schema) -> str:
    """The first sentence of what a key means."""
    return str(value.get("description", "")).partition(". ")[0].splitlines()[0] if value.get("description") else ""
