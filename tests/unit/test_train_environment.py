"""What processes of clients are started with stays theirs."""

import gc
import importlib
import os
import sys

import pytest

from hfedmoe_ray.train.environment import ENVIRONMENT, absent, inherited, quick_imports


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


def test_an_absent_module_cannot_be_imported_and_is_then_as_it_was(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "this", raising=False)
    with absent("this"), pytest.raises(ImportError):
        importlib.import_module("this")
    assert "this" not in sys.modules
    with absent("gc"):
        assert importlib.import_module("gc") is gc
    assert sys.modules["gc"] is gc
