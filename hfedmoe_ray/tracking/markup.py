"""The HTML pieces a report is made of: text is escaped here, so that sections need not think of it."""

from collections.abc import Iterable, Sequence
from html import escape

from hfedmoe_ray.tracking.svg import colour


def section(title: str, intro: str, *content: str) -> str:
    """A section: its title and introduction as text, its content as HTML."""
    paragraph = f"<p>{escape(intro)}</p>" if intro else ""
    return f"<section><h2>{escape(title)}</h2>{paragraph}{''.join(content)}</section>\n"


def figure(caption: str, content: str) -> str:
    """A captioned figure of HTML content, which scrolls sideways where it is too wide."""
    heading = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure>{heading}<div class="scroll">{content}</div></figure>'


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
