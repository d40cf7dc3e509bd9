"""The documentation builds strictly, says what the package does, and asks nothing of any other site."""

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from documented import REPOSITORY

from hfedmoe_ray.cli.app import commands
from hfedmoe_ray.config.explain import all_keys
from hfedmoe_ray.config.schema import Experiment

LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "link": "href"}
"""Attributes by which a page has something loaded; what `a` names is loaded by nobody but the reader."""
NOT_LOADED = ("canonical", "next", "prev")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
POLICY = "default-src 'self' data: 'unsafe-inline'; report-uri /violation"


class Loaded(HTMLParser):
    """What a page has loaded when it is shown."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        address = given.get(LOADED.get(tag, ""))
        if address and given.get("rel") not in NOT_LOADED:
            self.found.append(address)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, built as `make docs` builds them, elsewhere."""
    target = tmp_path_factory.mktemp("site")
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": path, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return target


def test_no_page_loads_anything_from_elsewhere(site: Path):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        html = page.read_text(encoding="utf-8")
        assert "mermaid" not in html, f"{page}: the theme would fetch a script for its diagrams from elsewhere"
        for address in Loaded(html).found:
            parts = urlsplit(address)
            assert not parts.netloc, f"{page} loads {address}"
            root = site if parts.path.startswith("/") else page.parent
            assert parts.scheme == "data" or (root / parts.path.lstrip("/")).is_file(), f"{page} lacks {address}"
    for sheet in site.rglob("*.css"):
        for address in re.findall(r"url\(([^)]+)\)|@import\s+([^;]+)", sheet.read_text(encoding="utf-8")):
            assert not urlsplit("".join(address).strip("\"'")).netloc, f"{sheet} loads {address}"


def test_the_reference_has_every_key_and_every_command(site: Path):
    keys = (site / "reference" / "configuration.html").read_text(encoding="utf-8")
    for key in all_keys(Experiment, ""):
        assert f"<code>{key.rpartition('.')[2]}</code>" in keys, key
    told = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    for command in commands.commands:
        assert f"Usage: hfedmoe {command} " in told


def test_equations_are_drawn_without_a_script(site: Path):
    for page, equations in (("method", 40), ("howto/time", 2)):
        html = (site / f"{page}.html").read_text(encoding="utf-8")
        assert html.count("<math") == html.count("</math>") >= equations
        assert not re.search(r"\\(frac|sum|alpha)|\$[a-zA-Z]", re.sub(r"<pre.*?</pre>", "", html, flags=re.DOTALL))


class Served(http.server.SimpleHTTPRequestHandler):
    """Serves the pages under a policy by which a browser reports whatever they try to load from elsewhere."""

    asked: list[str]
    violations: list[str]

    def end_headers(self) -> None:
        self.send_header("Content-Security-Policy", POLICY)
        super().end_headers()

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def do_POST(self) -> None:
        self.violations.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(site: Path) -> Iterator[tuple[str, type[Served]]]:
    """(URL, what has come in)."""
    record = type("Record", (Served,), {"asked": [], "violations": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(record, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", record
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_a_browser_shows_pages_with_search_and_no_complaint(served: tuple[str, type[Served]], tmp_path: Path):
    url, record = served
    assert BROWSER is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=3000"]
    options += [f"--user-data-dir={tmp_path}", "--no-first-run", "--disable-background-networking", "--dump-dom"]
    done = subprocess.run([BROWSER, *options, f"{url}/index.html"], capture_output=True, text=True, check=True)
    assert "hfedmoe_ray" in done.stdout
    assert "/search/search_index.json" in record.asked  # the scripts of the page do run
    assert not record.violations
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
