"""A finished run as a model that transformers, or peft, loads without this package's help."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from moe_models import save_mixtral
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from hfedmoe_ray.cli import main
from hfedmoe_ray.errors import CheckpointError, ConfigError
from hfedmoe_ray.federation.checkpoint import load_checkpoint, run_identity
from hfedmoe_ray.moe.peft_format import BASE, load_peft
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
    for form in ("hf", "peft"):
        assert main(["export", str(run_dir), "--format", form]) == 0
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
    assert main(["export", str(directory), "--format", "peft"]) == ConfigError.exit_code
    assert "--format hf" in capsys.readouterr().err
