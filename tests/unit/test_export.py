"""A finished run as a model that transformers, or peft, loads without this package's help."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hub_server import Hub
from huggingface_hub import constants
from moe_models import save_mixtral
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from hfedmoe_ray.cli import main
from hfedmoe_ray.errors import CheckpointError, ConfigError, ModelError
from hfedmoe_ray.export import MERGED
from hfedmoe_ray.federation.checkpoint import load_checkpoint, run_identity
from hfedmoe_ray.moe.peft_format import BASE, load_peft
from hfedmoe_ray.moe.sources import commit_of
from hfedmoe_ray.prepare import prepare_run


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("export")
    save_mixtral(root / "mixtral")
    rows = [{"text": f"word{i % 5} word{i % 3}", "label": f"class {i % 3}"} for i in range(60)]
    (root / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "name": "run",
        "output": str(root),
        "backend": "local",
        "rounds": 1,
        "clients": {"count": 2, "tiers": [{"name": "all", "share": 1.0, "experts": 0.5}]},
        "model": {"source": str(root / "mixtral"), "lora": {"rank": 2, "attention": True}},
        "data": {"source": str(root / "texts.jsonl"), "max_length": 8},
        "local": {"steps": 1, "batch_size": 4, "profile_examples": 4},
        "tracking": {"wandb": {"mode": "disabled"}},
    }
    (root / "config.yaml").write_text(json.dumps(settings))  # JSON is YAML
    return root / "config.yaml"


def test_a_run_is_exported_in_both_forms(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = config.parent / "run"
    assert main(["export", str(run_dir)]) == CheckpointError.exit_code
    assert main(["run", str(config)]) == 0
    capsys.readouterr()
    for form in (["hf"], ["peft", "--merge"]):
        assert main(["export", str(run_dir), "--format", *form]) == 0
    whole, adapter = (Path(line) for line in capsys.readouterr().out.splitlines())
    for directory in (whole, adapter):
        card = (directory / "README.md").read_text()
        header = yaml.safe_load(card.split("---\n")[1])
        assert header["library_name"] == ("transformers" if directory is whole else "peft")
        assert "| all | 100% | 50.0% |" in card and "low-rank factors (rank 2)" in card
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
    merged = AutoModelForSequenceClassification.from_pretrained(whole, dtype=torch.float32).eval()
    base = AutoModelForSequenceClassification.from_pretrained(adapter / BASE, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, str(adapter)).eval()
    torch.testing.assert_close(adapted(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    assert (adapter / MERGED / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()

    from hfedmoe_ray.config.load import load_experiment

    context = prepare_run(load_experiment(run_dir / "config.yaml"), run_dir)
    weights = load_checkpoint(run_dir / "checkpoints", run_identity(context)).weights
    back = load_peft(context.model, adapter)
    for key, factors in weights.experts.items():
        assert all(np.array_equal(back.experts[key][name], array) for name, array in factors.items())

    assert main(["export", str(run_dir)]) == ConfigError.exit_code
    assert "holds something already" in capsys.readouterr().err
    (run_dir / "config.yaml").write_text((run_dir / "config.yaml").read_text().replace("rank: 2", "rank: 3"))
    assert main(["export", str(run_dir), "--output", str(config.parent / "other")]) == CheckpointError.exit_code


def test_whole_experts_have_no_peft_form(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = json.loads(config.read_text())
    settings["model"]["lora"] = None
    directory = config.parent / "whole"
    directory.mkdir()
    (directory / "config.yaml").write_text(json.dumps(settings))
    for asked, told in ((["--format", "peft"], "--format hf"), (["--merge"], "Leave --merge out")):
        assert main(["export", str(directory), *asked]) == ConfigError.exit_code
        assert told in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- the hub


RESOLVE = """
import sys
from hfedmoe_ray.moe.sources import commit_of, resolve
print(resolve(sys.argv[1], sys.argv[2]), commit_of(resolve(sys.argv[1], None, config_only=True)))
"""
"""Says where a model lies, and which commit is the newest."""


@pytest.fixture(scope="module")
def finished(config: Path) -> Path:
    """A run's directory."""
    assert main(["run", str(config), "name=finished"]) == 0
    return config.parent / "finished"


def test_what_is_pushed_is_private_and_comes_back_at_its_commit(
    finished: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["export", str(finished), "--push", "someone/tickets"]) == 0
    directory, address = capsys.readouterr().out.split()
    assert hub.visibility == {"someone/tickets": "private"}
    (commit,) = hub.commits
    assert address.endswith(f"/someone/tickets/commit/{commit}")
    files = {path.name: path.read_bytes() for path in Path(directory).iterdir()}
    assert hub.commits[commit] == files

    # Pushed to once more, the first commit is what its hash goes on to name; two that ask at once fetch it once.
    later = hub.commit("someone/tickets", {"config.json": b"{}"})
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", RESOLVE, "someone/tickets", commit]
    fetching = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = {process.communicate(timeout=60)[0] for process in fetching}
    (path, newest) = told.pop().split()
    assert not told and newest == later
    back = Path(path)
    assert commit_of(back) == commit and commit_of(tmp_path) is None
    assert (back / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert set(hub.downloads.values()) == {1} and f"{commit}/model.safetensors" in hub.downloads


def test_why_something_cannot_be_pushed_is_told_in_one_paragraph(
    finished: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(name: str, told: str) -> int:
        capsys.readouterr()
        code = main(["export", str(finished), "--output", str(tmp_path / told[:5]), "--push", name])
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: --push") and told in error and "\n" not in error
        # What can be known beforehand is told before anything is written; otherwise what was written stays.
        assert (tmp_path / told[:5]).exists() == (code == ModelError.exit_code)
        return code

    assert refused("a/b/c", "OWNER/NAME") == ConfigError.exit_code
    monkeypatch.setenv("HF_TOKEN", "hf_of_someone_else")
    assert refused("someone/tickets", "does not take someone/tickets from you") == ModelError.exit_code
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert refused("someone/tickets", "cannot be reached") == ModelError.exit_code
    monkeypatch.delenv("HF_TOKEN")
    assert refused("someone/tickets", "needs a token") == ConfigError.exit_code
    assert not hub.commits
    assert main(["export", str(finished), "--public"]) == ConfigError.exit_code
