"""What the documentation tells its readers to type: the blocks of its pages, and the commands in them."""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).parents[1]
SHELL = ("bash", "console")
PROGRAMS = ("docker", "hfedmoe", "kubectl", "make", "pip", "python", "ray", "sbatch", "wandb")
_BLOCK = re.compile(r"^(?P<indent> *)```(?P<head>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block."""

    page: str
    """Its page, by the path from the repository's root."""
    language: str
    title: str
    """The name of the file that the reader is told to write; empty where it is none."""
    text: str

    @property
    def commands(self) -> tuple[str, ...]:
        """What is to be typed: lines after a prompt where there are any, else all; without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if any(line.startswith("$ ") for line in lines):
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        elif self.language not in SHELL and not self.text.startswith(PROGRAMS):
            return ()
        return tuple(_commands(lines))


def pages() -> list[Path]:
    """The pages in reading order: README, those of the site's navigation, and what else stands in the repository."""
    # The file names no Python objects, but its loader must not stumble over tags either.
    site = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = [REPOSITORY / "docs" / name for name in _leaves(site["nav"])]
    others = [REPOSITORY / "cluster" / "README.md", REPOSITORY / "examples" / "cross_silo" / "README.md"]
    return [REPOSITORY / "README.md", *(page for page in listed if page.exists()), *others]


def blocks() -> list[Block]:
    """All blocks of all pages, in reading order."""
    found = []
    for page in pages():
        for block in _BLOCK.finditer(page.read_text(encoding="utf-8")):
            language, _, rest = block["head"].strip().partition(" ")
            title = re.search(r'title="([^"]+)"', rest)
            text = re.sub(rf"^{block['indent']}", "", block["body"], flags=re.MULTILINE)
            where = str(page.relative_to(REPOSITORY))
            found.append(Block(page=where, language=language, title=title[1] if title else "", text=text))
    return found


def inline_commands() -> list[str]:
    """`hfedmoe …` within sentences and tables."""
    text = "\n".join(_BLOCK.sub("", page.read_text(encoding="utf-8")) for page in pages())
    return sorted({shlex.join(shlex.split(found)) for found in re.findall(r"`(hfedmoe [^`\n]+)`", text)})


def _commands(lines: Sequence[str]) -> Iterator[str]:
    """Commands in one form of quoting each; one whose quotes are still open goes on in the next line."""
    typed = ""
    for line in lines:
        typed = f"{typed}\n{line}" if typed else line
        try:
            words = shlex.split(typed, comments=True)
        except ValueError:
            continue
        typed = ""
        if words:
            yield shlex.join(words)
    assert not typed, f"never ends: {typed}"


def _leaves(tree: Sequence[object] | object) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict):
        yield from _leaves(list(tree.values()))
    elif isinstance(tree, list):
        for one in tree:
            yield from _leaves(one)
