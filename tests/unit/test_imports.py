"""Who may import what: the rules that keep the command line quick and every room testable by itself."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "hfedmoe_ray"
LIGHT = ("config", "budget", "estimates", "plan", "types", "wire", "errors", "seeds", "context", "clusters")
"""Modules and packages that must not pull in torch, ray or deepspeed, not even through another module."""
CLUSTER_FREE = (*LIGHT, "federation", "strategies", "trust")
"""Those that must not pull in ray or deepspeed."""


def modules(*rooms: str) -> list[str]:
    """Dotted names of every module of the named rooms that exist."""
    files = [
        file
        for room in rooms
        for file in ([PACKAGE / f"{room}.py"] if (PACKAGE / f"{room}.py").is_file() else (PACKAGE / room).rglob("*.py"))
    ]
    return [".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts) for file in files]


def imported_by(source: Path) -> set[str]:
    """Top-level packages a file imports anywhere in it, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def loaded_by(*names: str) -> set[str]:
    """Top-level packages in memory after a fresh Python has imported the modules."""
    program = f"import {', '.join(names)}, sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    return set(done.stdout.split())


def test_configuration_and_planning_load_neither_torch_nor_ray_nor_deepspeed():
    assert not loaded_by(*modules(*LIGHT)) & {"torch", "ray", "deepspeed", "transformers", "datasets", "wandb"}


def test_the_round_loop_and_the_strategies_load_neither_ray_nor_deepspeed():
    assert not loaded_by(*modules(*CLUSTER_FREE)) & {"ray", "deepspeed"}


@pytest.mark.parametrize(("library", "rooms"), [("ray", ["runtime"]), ("deepspeed", ["train/engine.py"])])
def test_a_library_has_one_room(library: str, rooms: list[str]):
    importers = {str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py") if library in imported_by(file)}
    assert importers, f"nothing imports {library}: the rule tests nothing"
    assert not {one for one in importers if not any(one == room or one.startswith(f"{room}/") for room in rooms)}


@pytest.mark.parametrize("argument", ["import hfedmoe_ray", "import hfedmoe_ray.cli"])
def test_importing_the_package_is_quick(argument: str):
    """Best of three: other processes may be using the machine."""
    program = f"import time; start = time.perf_counter(); {argument}; print(time.perf_counter() - start)"
    seconds = [
        float(
            subprocess.run(
                [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
            ).stdout
        )
        for _ in range(3)
    ]
    assert min(seconds) < 0.3


def test_help_loads_nothing_heavy():
    program = (
        "import sys; from hfedmoe_ray.cli import main; main(['--help']);"
        "print({'torch', 'ray', 'deepspeed', 'transformers', 'pydantic', 'numpy'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert done.stderr.strip() == "set()"
