"""Every licence is one that somebody has accepted, the page is current, and an audit says what it is worth."""

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "jobs"))
from audit import told
from licences import SAMPLES, Row, installed, main

REPOSITORY = Path(__file__).parents[2]
PINNED = set(re.findall(r"^([\w.-]+)==", (REPOSITORY / "constraints-cpu.txt").read_text(), re.MULTILINE))
KNOWN = {re.sub(r"[-_.]+", "-", name).lower() for name in PINNED} | set(SAMPLES)


def test_nothing_is_installed_under_a_licence_that_nobody_has_accepted(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 0, capsys.readouterr().out


def test_the_page_is_current():
    text = (REPOSITORY / "docs" / "licences.md").read_text(encoding="utf-8")
    written = dict(re.findall(r"^\| ([a-z0-9-]+) \| (.+?) \|", text, re.MULTILINE))
    written.pop("package")
    here = {row.name: row.licence for row in installed() if row.name in KNOWN}
    assert len(here) > 100
    again = "run `python jobs/licences.py --write docs/licences.md`"
    assert {name: written.get(name) for name in here} == here, again
    assert written.keys() <= KNOWN, again


@pytest.mark.parametrize(
    ("licence", "accepted"),
    [
        ("MIT", True),
        ("Apache-2.0 WITH LLVM-exception AND (MIT OR BSD-3-Clause)", True),
        ("GPL-3.0-only", False),
        ("MIT AND LGPL-2.1-or-later", False),
        ("see LICENSE.txt", False),
        ("", False),
    ],
)
def test_a_licence_is_accepted_by_name(licence: str, accepted: bool):
    assert Row(name="x", licence=licence, needed_by="the project").accepted is accepted


def test_an_audit_that_looked_nothing_up_is_not_a_clean_one():
    skipped = {"name": "a", "skip_reason": "not found"}
    clean = {"name": "b", "version": "1", "vulns": []}
    found = {"name": "c", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}
    assert told("", "no route to host") == (
        "Nothing was audited: the advisories cannot be reached from here (no route to host).",
        0,
    )
    assert told(json.dumps({"dependencies": [skipped]}), "")[0].startswith("Nothing was audited")
    assert told(json.dumps({"dependencies": [skipped, clean]}), "") == ("1 packages audited, 0 findings; 1 unknown", 0)
    words, code = told(json.dumps({"dependencies": [clean, found]}), "")
    assert code == 1
    assert "c 2: CVE-1, mended in 3\n2 packages audited, 1 findings" in words
