"""One private Ray instance per module."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hfedmoe_ray.runtime.cluster import connected


@pytest.fixture(scope="module")
def workers_import_tests() -> Iterator[None]:
    """Actors inherit PYTHONPATH, and unpickle `tiny_worker` by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
        yield


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest) -> Iterator[None]:
    request.getfixturevalue("workers_import_tests")
    with connected(None):
        yield
