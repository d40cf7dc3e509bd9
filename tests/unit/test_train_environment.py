"""What processes of clients are started with stays theirs."""

import gc
import importlib
import os
import subprocess
import sys

import pytest

from hfedmoe_ray.train.environment import ENVIRONMENT, UNUSED, absent, inherited, quick_imports

CLIENT = """
import sys
from hfedmoe_ray.train.environment import UNUSED, lean_imports
with lean_imports():
    import hfedmoe_ray.train.local
print(*(name for name in UNUSED if name in sys.modules))
import scipy.optimize
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
    done = subprocess.run([sys.executable, "-c", CLIENT], capture_output=True, text=True, check=True)
    assert UNUSED
    assert done.stdout.split() == [], "and scipy was found again afterwards"


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
