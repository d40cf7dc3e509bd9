"""Turns the equations of the pages into MathML when they are built: browsers draw that by themselves, without a script.

What is understood is the part of TeX that the pages use, between single dollars in a line or double ones around it;
anything else is an error, which fails the build. GitHub shows the same sources as equations.
"""

import html
import re
from collections.abc import Iterator

SYMBOLS = {
    **{name: chr(code) for name, code in {"alpha": 945, "beta": 946, "gamma": 947, "lambda": 955, "mu": 956}.items()},
    **{"rho": "ρ", "tau": "τ", "sum": "∑", "log": "log", "max": "max", "leftarrow": "←", "propto": "∝", "in": "∈"},
    **{"ge": "≥", "le": "≤", "cdot": "·", "sqrt": "√", "bar": "‾", ",": "\u2009", "{": "{", "}": "}", "mid": "∣"},
    **{"subseteq": "⊆", "dots": "…", "quad": "\u2003", "times": "×"},
}
OPERATORS = set("+-=()[]<>,/:;·∑←∝∈≥≤{}∣⊆…×!") | {"|"}
_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|[0-9]+(?:\.[0-9]+)?|[^\s\\]")
# Code comes first, so that it is left alone: fenced blocks, and what stands between backticks.
_PLACES = re.compile(
    r"^ *(?P<fence>`{3,}).*?^ *(?P=fence) *$|`[^`\n]+`"
    r"|\$\$(?P<block>.+?)\$\$|(?<![\w$])\$(?P<inline>[^$\n]+?)\$(?![\w$])",
    re.MULTILINE | re.DOTALL,
)


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replaces the equations of a page (an event of MkDocs)."""
    return _PLACES.sub(_drawn, markdown)


def _drawn(place: re.Match[str]) -> str:
    if place["block"]:
        return f'<div class="equation">{mathml(place["block"], block=True)}</div>'
    return mathml(place["inline"], block=False) if place["inline"] else place[0]


def mathml(tex: str, *, block: bool) -> str:
    """The equation as MathML.

    Raises:
        ValueError: It holds a command or a brace that is not understood.
    """
    tokens = iter(_TOKEN.findall(tex))
    row = _row(tokens, until=None, tex=tex)
    display = ' display="block"' if block else ""
    return f"<math{display}><mrow>{row}</mrow></math>"


def _row(tokens: Iterator[str], *, until: str | None, tex: str) -> str:
    """Everything up to a closing brace, or to the end."""
    parts: list[str] = []
    for token in tokens:
        if token == until:
            return "".join(parts)
        if token in ("_", "^"):
            if not parts:
                raise ValueError(f"nothing to put {token} on in ${tex}$")
            parts.append(_script(parts.pop(), token, _one(next(tokens), tokens, tex)))
        else:
            parts.append(_one(token, tokens, tex))
    if until is not None:
        raise ValueError(f"no closing brace in ${tex}$")
    return "".join(parts)


def _script(base: str, mark: str, raised: str) -> str:
    """Sets something below or above; a sum that has one of both already gets the other too."""
    below, above = ("munder", "munderover") if "∑" in base else ("msub", "msubsup")
    if mark == "^" and base.startswith(f"<{below}>"):
        inner = base.removeprefix(f"<{below}>").removesuffix(f"</{below}>")
        return f"<{above}>{inner}{raised}</{above}>"
    tag = below if mark == "_" else "msup"
    return f"<{tag}>{base}{raised}</{tag}>"


def _one(token: str, tokens: Iterator[str], tex: str) -> str:
    """One symbol, group or command with its arguments."""
    if token == "{":
        return f"<mrow>{_row(tokens, until='}', tex=tex)}</mrow>"
    if token == r"\frac":
        return f"<mfrac>{_one(next(tokens), tokens, tex)}{_one(next(tokens), tokens, tex)}</mfrac>"
    if token in (r"\text", r"\mathrm"):
        letters = _one(next(tokens), tokens, tex)
        return f"<mtext>{''.join(re.findall(r'>([^<]+)<', letters))}</mtext>"
    symbol = SYMBOLS.get(token[1:]) if token.startswith("\\") else token
    if symbol is None or token == "}":
        raise ValueError(f"{token} of ${tex}$ is not understood; docs/hooks/equations.py lists what is")
    if symbol[0].isdecimal():
        return f"<mn>{symbol}</mn>"
    if symbol in OPERATORS:
        # A bar would end the cell of a table.
        return f"<mo>{html.escape(symbol).replace('|', '∣')}</mo>"
    return f"<mi>{html.escape(symbol)}</mi>"
