"""What is installed: declared, pinned within its range, and described by the Makefile."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(
        r"^([\w.-]+)==(\S+)$", (REPOSITORY / "constraints-cpu.txt").read_text(), re.MULTILINE
    )
}


def make(*arguments: str) -> str:
    # The tests are started by make themselves: this one must not think it is their child.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", *arguments], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_every_requirement_is_pinned_within_its_range():
    for line in (*PROJECT["dependencies"], *chain(*PROJECT["optional-dependencies"].values())):
        requirement = Requirement(line)
        assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)]), line


def test_every_import_of_the_package_is_a_declared_requirement():
    optional = chain(*(lines for extra, lines in PROJECT["optional-dependencies"].items() if extra != "dev"))
    lines = [*PROJECT["dependencies"], *optional]
    declared = {canonicalize_name(Requirement(line).name) for line in lines} | {"pydantic-core"}
    providers = metadata.packages_distributions()
    for file in (REPOSITORY / "hfedmoe_ray").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for package in {name.partition(".")[0] for name in names} - {*sys.stdlib_module_names, "hfedmoe_ray"}:
                assert declared & {canonicalize_name(one) for one in providers.get(package, [package])}, (
                    f"{file}: {package}"
                )


def test_make_alone_lists_the_targets():
    listed = {line.split()[1] for line in make().splitlines()}
    assert listed == {"help", "install", "quickstart", "test", "check", "audit", "docs", "clean"}


def test_quickstart_test_and_check_install_first_and_only_once():
    for target in ("quickstart", "test", "check", "docs"):
        # -o and -W: as if the environment were up to date, or something it depends on had changed.
        assert "-m venv" not in make("--dry-run", "-o", ".venv/.installed", target)
        assert "-m venv" in make("--dry-run", "-W", "constraints-cpu.txt", target)
        assert "-m venv" in make("--dry-run", "-W", "pyproject.toml", target)
