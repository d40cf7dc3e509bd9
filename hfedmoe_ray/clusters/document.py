"""Strict models of YAML documents, and how they are written: a field's docstring becomes the comment above its key."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel, to_pascal

WIDTH = 120


class Part(BaseModel):
    """A mapping with these keys and no others."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _camel(name: str) -> str:
    """`from_` as from, which Python keeps for itself."""
    return to_camel(name.rstrip("_"))


class CamelPart(Part):
    """The same, its keys written as Kubernetes and Google Cloud do."""

    model_config = ConfigDict(alias_generator=_camel, populate_by_name=True)


class PascalPart(Part):
    """The same, its keys written as AWS does."""

    model_config = ConfigDict(alias_generator=to_pascal, populate_by_name=True)


def write_yaml(header: str, *documents: Part) -> str:
    """The documents as YAML text below a header comment; keys without a value are left out.

    A comment stands where its key is written first. Reading the text back gives the documents.
    """
    told: set[str] = set()
    texts = ["\n".join(_block(one, 0, told)) for one in documents]
    return comment(header) + "\n---\n".join(texts) + "\n"


def comment(text: str) -> str:
    """Text as a comment, its lines kept."""
    return "".join(f"# {line}".rstrip() + "\n" for line in text.strip().splitlines())


def _entries(value: Part | Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """(key, value, comment) of what has a value."""
    if isinstance(value, Part):
        for name, field in type(value).model_fields.items():
            inner = getattr(value, name)
            if inner is not None:
                yield field.alias or name, inner, field.description or ""
    else:
        yield from ((key, inner, "") for key, inner in value.items())


def _plain(value: Any) -> Any:
    """Nested values without models."""
    if isinstance(value, Part | Mapping):
        return {key: _plain(inner) for key, inner, _ in _entries(value)}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def _block(value: Any, indent: int, told: set[str]) -> list[str]:
    """Lines of a mapping or list, in block style."""
    lines: list[str] = []
    pad = " " * indent
    if isinstance(value, Part | Mapping):
        for key, inner, text in _entries(value):
            if text and text not in told:
                told.add(text)
                lines += [f"{pad}# {line}" for line in textwrap.wrap(text, WIDTH - indent - 2)]
            name = _inline(key)
            lines += _entry(f"{pad}{name}:", inner, indent + 2, told)
        return lines
    for inner in value:
        if _fits(inner, indent + 2):
            lines.append(f"{pad}- {_inline(_plain(inner))}")
        elif isinstance(inner, str):
            lines += _text(f"{pad}-", inner, indent + 2)
        else:
            first, *rest = _block(inner, indent + 2, told)
            comments: list[str] = []
            while first.lstrip().startswith("#"):  # a comment stands above the dash
                comments.append(first[2:])
                first, *rest = rest
            lines += [*comments, f"{pad}- {first.lstrip()}", *rest]
    return lines


def _entry(start: str, value: Any, indent: int, told: set[str]) -> list[str]:
    """Lines of one key and its value."""
    if _fits(value, len(start) + 1):
        return [f"{start} {_inline(_plain(value))}"]
    if isinstance(value, str):
        return _text(start, value, indent)
    return [start, *_block(value, indent, told)]


def _text(start: str, text: str, indent: int) -> list[str]:
    """Lines of a long or several-line text."""
    pad = " " * indent
    if "\n" in text:
        style = "|" if text.endswith("\n") else "|-"
        return [f"{start} {style}", *(f"{pad}{line}".rstrip() for line in text.rstrip("\n").split("\n"))]
    folded = textwrap.wrap(text, WIDTH - indent, break_long_words=False, break_on_hyphens=False)
    return [f"{start} >-", *(pad + line for line in folded)]


def _fits(value: Any, indent: int) -> bool:
    """Whether a value is told in one line: short, and nothing in it needs a comment or nests deeply."""
    if isinstance(value, Part) and any(text for *_, text in _entries(value)):
        return False
    plain = _plain(value)
    if isinstance(plain, str) and "\n" in plain:
        return False
    if isinstance(plain, list) and any(isinstance(one, str) and " " in one for one in plain):
        return False  # commands, one a line
    return _depth(plain) <= 1 and len(_inline(plain)) <= WIDTH - indent


def _depth(value: Any) -> int:
    """Nesting: 0 for a scalar, an empty mapping or list."""
    inner: Sequence[Any] = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner)) if inner else 0


def _inline(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")
