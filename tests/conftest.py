"""What every test may rely on: no network, one cache of prepared models, further datasets where there are any."""

import gc
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from hub_server import Hub

REPOSITORY = Path(__file__).parents[1]


def pytest_configure() -> None:
    # Read by huggingface_hub when it is imported, which collecting the tests already does.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Read by torch when it is imported, in here and in the processes that tests start. On a busy machine threads wait
    # for each other in turns: steps that take 1.4 s of one thread took 37 s of two beside other work.
    os.environ["OMP_NUM_THREADS"] = "1"
    # Ray's workers give way to all else, by 15: beside the other half of the tests (`make test`) they got a thirtieth
    # of a core, and an actor that starts in a second took up to half a minute.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # A shell's background jobs ignore Ctrl-C, and so would every process that a test starts.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Collecting the tests imports torch and the rest, which stays: garbage is looked for afterwards, and not in there.
    gc.disable()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Puts tests that share one Ray last: others need a process that no Ray is connected to."""
    session.items.sort(key=lambda item: isinstance(item, pytest.Function) and "cluster" in item.fixturenames)
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` where there is none; torch is only imported if some test is so marked."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """$HFEDMOE_CACHE of all tests and their subprocesses, new in each session: models are prepared once, by this code.

    Set $HFEDMOE_CACHE to keep prepared models between sessions while working on something else.
    """
    path = Path(os.environ.get("HFEDMOE_CACHE") or tmp_path_factory.mktemp("cache"))
    os.environ["HFEDMOE_CACHE"] = str(path)
    return path


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """What the runs of `tiny_federation` are made of."""
    del cache  # set before anything is prepared
    from tiny_federation import write_sources

    root = tmp_path_factory.mktemp("sources")
    write_sources(root)
    return root


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Directory of further datasets ($HFEDMOE_DATA, or shared/data beside the checkout); skips where there is none."""
    path = Path(os.environ.get("HFEDMOE_DATA") or REPOSITORY.parent / "shared" / "data")
    if not path.is_dir():
        pytest.skip("no further datasets here: set HFEDMOE_DATA to their directory")
    return path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Iterator[Hub]":
    """A hub on this machine, as HF_ENDPOINT and HF_TOKEN name one; nothing of the user's own hub is read."""
    from hub_server import TOKEN, running_hub
    from huggingface_hub import constants

    with running_hub() as server:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        # Its own way of uploading needs a second service; without it large files go by Git LFS.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread computes, as in a client: how many there are decides the last bits of a matrix product."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def quickstart() -> Path:
    """The configuration everything starts with."""
    return REPOSITORY / "configs" / "quickstart.yaml"


@contextmanager
def importable_by_actors() -> Iterator[None]:
    """Actors inherit PYTHONPATH, and unpickle `tiny_worker` by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        yield


@pytest.fixture(scope="module")
def workers_import_tests() -> Iterator[None]:
    """The actors of a test's own cluster can import what is beside this file."""
    with importable_by_actors():
        yield


@pytest.fixture(scope="module")
def ray_directory() -> Iterator[str]:
    """Where the nodes of a test's own cluster write, the file with its address included.

    Ray's test clusters write that file below $RAY_TMPDIR, else /tmp, into a directory `ray` that only another Ray on
    this machine would have made. Paths of sockets are limited to 107 bytes, so it is not pytest's own.
    """
    with tempfile.TemporaryDirectory(prefix="hfedmoe-", dir="/tmp", ignore_cleanup_errors=True) as directory:
        (Path(directory) / "ray").mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_TMPDIR", directory)
            yield directory


@pytest.fixture(scope="session")
def cluster(cache: Path) -> Iterator[None]:
    """A private Ray instance, the same for all tests that use it, which is why they come last."""
    del cache  # set before Ray starts: its processes inherit it
    os.environ.setdefault("RAY_metrics_report_interval_ms", "1000")  # a test waits for what is reported
    from hfedmoe_ray.runtime.cluster import connected

    with importable_by_actors(), connected(None):
        yield
