"""The HTML pieces a report is made of: text is escaped here, so that sections need not think of it."""

import re
from collections.abc import Iterable, Sequence
from html import escape

from hfedmoe_ray.tracking.svg import colour


def section(title: str, intro: str, *content: str) -> str:
    """A section: its title and introduction as text, its content as HTML."""
    paragraph = f"<p>{escape(intro)}</p>" if intro else ""
    name = anchor(title)
    heading = f'<h2 id="{name}">{escape(title)}</h2>'
    return f'<section aria-labelledby="{name}">{heading}{paragraph}{"".join(content)}</section>\n'


def anchor(title: str) -> str:
    """What a section's heading is called in links: "Where the time went" -> "where-the-time-went"."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def figure(caption: str, content: str, *, note: str = "") -> str:
    """A captioned figure of HTML content, which scrolls sideways where it is too wide; `note` says how to read it."""
    heading = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    below = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<figure>{heading}<div class="scroll">{content}</div>{below}</figure>'


def folded(summary: str, content: str) -> str:
    """HTML content that is shown on request."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def switch(legend: str, panes: Sequence[tuple[str, str]]) -> str:
    """Several panes of HTML of which the reader chooses one by name; without a script, as `report.css` has it."""
    name = anchor(legend)
    if len(panes) == 1:
        return panes[0][1]
    choices = "".join(
        f'<input type="radio" name="{name}" id="{name}-{index}"{" checked" if index == 0 else ""}>'
        f'<label for="{name}-{index}">{escape(choice)}</label>'
        for index, (choice, _) in enumerate(panes)
    )
    shown = "".join(f'<div class="pane">{content}</div>' for _, content in panes)
    return f'<fieldset class="switch"><legend>{escape(legend)}</legend>{choices}{shown}</fieldset>'


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, wrap: bool = False) -> str:
    """A table of HTML cells. A heading beginning with * has its column aligned as numbers; `wrap` breaks the last."""
    kinds = [' class="n"' if heading.startswith("*") else "" for heading in headings]
    if wrap:
        kinds[-1] = ' class="reason"'
    head = "".join(f'<th scope="col"{k}>{escape(h.lstrip("*"))}</th>' for k, h in zip(kinds, headings, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{k}>{cell}</td>" for k, cell in zip(kinds, row, strict=True)) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def key(name: str, index: int) -> str:
    """A name beside the colour of category `index`."""
    return f'<span class="key {colour(index)}"><i></i>{escape(name)}</span>'
