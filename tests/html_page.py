"""An HTML page as tests look at it."""

from html.parser import HTMLParser

VOID = {"meta", "link", "br", "hr", "input"}


class Page(HTMLParser):
    """Text by section, tables as lists of rows, and every attribute; fails on tags that do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tables: list[list[list[str]]] = []
        self.tips: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "title" and "svg" in self.open:
            self.tips.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data
        if "title" in self.open and "svg" in self.open:
            self.tips[-1] += data

    def table(self, *headings: str) -> list[dict[str, str]]:
        """The rows of the first table that has these headings."""
        head, *rows = next(table for table in self.tables if set(headings) <= set(table[0]))
        return [dict(zip(head, row, strict=True)) for row in rows]
