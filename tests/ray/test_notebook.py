"""The example notebook, executed as a reader would, in a kernel of this very Python."""

import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from hfedmoe_ray import Run, federate

pytestmark = pytest.mark.ray
REPOSITORY = Path(__file__).parents[2]
NOTEBOOK = REPOSITORY / "examples" / "quickstart.ipynb"


class ThisPython(AsyncKernelManager):
    """Starts the interpreter that runs the tests, whatever kernels are installed on the machine."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"])


def test_the_example_notebook_runs_and_makes_the_run_of_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    (tmp_path / "examples").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit the notebook without outputs"
    place = {"metadata": {"path": str(tmp_path / "examples")}}
    NotebookClient(notebook, timeout=240, kernel_manager_class=ThisPython, resources=place).execute()

    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pages = [output["data"]["text/html"] for output in shown if "text/html" in output.get("data", {})]
    progress = next(page for page in pages if page.startswith("<pre"))
    assert "round 2/2" in progress
    assert "━" not in progress, "the bar is still there"
    assert any(page.startswith("<iframe srcdoc=") for page in pages)
    assert any("Did you mean learning_rate?" in output.get("text", "") for output in shown)
    # In Ray actors there, in this process here: the same bits.
    done = Run(tmp_path / "examples" / "runs" / "notebook")
    again = federate(done.experiment, "backend=local", "name=again", f"output={tmp_path}", progress=False)
    assert again.summary["model_sha256"] == done.summary["model_sha256"]
