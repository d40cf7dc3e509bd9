"""What processes of clients are started with stays theirs."""

import gc
import importlib
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest

from hfedmoe_ray.train.environment import ENVIRONMENT, UNUSED, absent, inherited, quick_imports

CLIENT = """
import sys
if "early" in sys.argv:
    import transformers
from hfedmoe_ray.train.environment import UNUSED, lean_imports
with lean_imports():
    import hfedmoe_ray.train.local
print(*(name for name in UNUSED if name in sys.modules))
import scipy.optimize
from transformers.utils import is_scipy_available
print(is_scipy_available(), file=sys.stderr)
"""


@pytest.mark.parametrize("collecting", [True, False])
def test_the_collector_rests_while_libraries_are_imported_and_is_then_as_it_was(collecting: bool):
    (gc.enable if collecting else gc.disable)()
    try:
        with pytest.raises(ImportError), quick_imports():
            assert not gc.isenabled()
            raise ImportError("no module named torch")
        assert gc.isenabled() is collecting
    finally:
        gc.enable()


def test_a_client_s_variables_are_those_of_processes_started_meanwhile():
    before = dict(os.environ)
    with inherited():
        assert ENVIRONMENT.items() <= os.environ.items()
    assert dict(os.environ) == before


def test_a_client_imports_no_library_that_it_never_calls_and_a_plugin_still_can():
    with inherited():
        done = subprocess.run([sys.executable, "-c", CLIENT], capture_output=True, text=True, check=True)
    assert UNUSED
    assert done.stdout.split() == [], "and scipy was found again afterwards"


@pytest.mark.parametrize("started", ["for a client, with transformers imported early", "by a user"])
def test_where_others_may_need_them_libraries_are_found_as_ever(started: str):
    early = ["early"] if "early" in started else []
    with inherited() if early else nullcontext():
        done = subprocess.run([sys.executable, "-c", CLIENT, *early], capture_output=True, text=True, check=True)
    assert "scipy" in done.stdout.split()
    assert done.stderr.split()[-1] == "True"


def test_an_absent_module_cannot_be_imported_and_is_then_as_it_was(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "this", raising=False)
    with absent("this"), pytest.raises(ImportError):
        with absent("this"):
            pass
        importlib.import_module("this")
    assert "this" not in sys.modules
    with absent("gc"):
        assert importlib.import_module("gc") is gc
    assert sys.modules["gc"] is gc
