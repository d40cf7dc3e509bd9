"""The report in a browser: it draws every figure, fits a phone, asks for nothing, and switches without a script."""

import asyncio
import json
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from recorded_run import record_run

from hfedmoe_ray.tracking.report import write_report

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")

# What `LOOK` finds is empty where all is well.
LOOK = """(() => {
  const shown = [...document.querySelectorAll('svg')].filter(svg => svg.checkVisibility());
  const box = node => node.getBoundingClientRect(), room = document.documentElement.clientWidth;
  const empty = shown.filter(svg => !box(svg).width || !box(svg).height || !svg.querySelector('rect,circle,path,line'));
  const ink = node => getComputedStyle(node);
  const black = [...document.querySelectorAll('svg :is(rect,circle,path)')].filter(
    mark => ink(mark).fill === 'rgb(0, 0, 0)');
  const wide = [...document.querySelectorAll('main *')].filter(
    node => !node.closest('.scroll,pre,svg') && box(node).right > room + 0.5);
  return {
    drawn: shown.length,
    faults: [...empty.map(svg => 'empty: ' + svg.ariaLabel), ...black.map(mark => 'no colour: ' + mark.outerHTML),
      ...wide.map(node => 'too wide: ' + node.outerHTML.slice(0, 80))],
    overflow: document.documentElement.scrollWidth - room,
    paper: ink(document.body).backgroundColor,
  };
})()"""


class Tab:
    """A tab of the browser, told what to do over its debugging port."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._calls = 0
        self.events: list[dict[str, Any]] = []

    async def call(self, method: str, **parameters: Any) -> Any:
        self._calls += 1
        number = self._calls
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            answer = json.loads((await self._socket.receive(timeout=30)).data)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    async def evaluate(self, script: str) -> Any:
        found = await self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def open(self, url: str) -> None:
        await self.call("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            await self.evaluate("1")
            await asyncio.sleep(0.02)

    def told(self, *methods: str) -> list[dict[str, Any]]:
        return [event["params"] for event in self.events if event.get("method") in methods]


@asynccontextmanager
async def browser() -> AsyncIterator[Tab]:
    assert BROWSER is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
        process = await asyncio.create_subprocess_exec(
            BROWSER,
            *arguments,
            f"--user-data-dir={profile}",
            "about:blank",
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            port_file = Path(profile, "DevToolsActivePort")
            async with asyncio.timeout(30):
                while not (port_file.exists() and len(port_file.read_text().splitlines()) == 2):
                    assert process.returncode is None, "the browser ended at once"
                    await asyncio.sleep(0.05)
            port = port_file.read_text().splitlines()[0]
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                    (page,) = [one for one in await answer.json() if one["type"] == "page"]
                async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    yield Tab(socket)
        finally:
            process.terminate()
            await process.wait()


def test_every_figure_is_drawn_on_a_desk_and_on_a_phone_by_day_and_by_night(tmp_path: Path) -> None:
    report = write_report(record_run(tmp_path / "run"))
    labels = report.read_text().count("<svg")

    async def look() -> None:
        async with browser() as tab:
            for domain in ("Page", "Runtime", "Log", "Network"):
                await tab.call(f"{domain}.enable")
            await tab.open(report.as_uri())
            papers = {}
            for width, phone in ((1280, False), (390, True)):
                await tab.call(
                    "Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=phone
                )
                for scheme in ("light", "dark"):
                    media = [{"name": "prefers-color-scheme", "value": scheme}]
                    await tab.call("Emulation.setEmulatedMedia", features=media)
                    found = await tab.evaluate(LOOK)
                    assert found["faults"] == [], f"{width} px, {scheme}"
                    assert found["overflow"] <= 0, f"{width} px, {scheme}"
                    assert found["drawn"] >= 12
                    papers[scheme] = found["paper"]
            assert papers["light"] != papers["dark"]
            await switches(tab)
            asked = [request["request"]["url"] for request in tab.told("Network.requestWillBeSent")]
            assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()]
            assert tab.told("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled") == []

    async def switches(tab: Tab) -> None:
        """Each choice shows other charts, and all are drawn in print."""
        seen = []
        for choice in range(await tab.evaluate("document.querySelectorAll('.switch > input').length")):
            await tab.evaluate(f"document.querySelectorAll('.switch > label')[{choice}].click()")
            shown = "[...document.querySelectorAll('.pane svg')].filter(svg => svg.checkVisibility())"
            seen.append(await tab.evaluate(f"{shown}.map(svg => svg.ariaLabel)"))
        assert len(seen) == 3, "the recorded run has no simulated clock"
        assert all(len(labels) == 2 for labels in seen)
        assert len({label for labels in seen for label in labels}) == 6
        await tab.call("Emulation.setEmulatedMedia", media="print", features=[])
        drawn = "[...document.querySelectorAll('svg')].filter(svg => svg.checkVisibility()).length"
        assert await tab.evaluate(drawn) == labels

    asyncio.run(look())
