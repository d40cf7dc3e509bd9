"""What language models trained, of every family, computes the same in transformers and peft alone, by the command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from moe_models import FAMILIES, batch, plan, save_family
from safetensors.torch import load_file
from torch import Tensor

from hfedmoe_ray.cli import main
from hfedmoe_ray.config.load import load_experiment
from hfedmoe_ray.federation.checkpoint import load_checkpoint, run_identity
from hfedmoe_ray.moe.peft_format import BASE
from hfedmoe_ray.moe.subset import SparseModel
from hfedmoe_ray.prepare import prepare_run
from hfedmoe_ray.types import TaskWeights

DECODERS = [family for family in FAMILIES if family != "switch_transformers"]
ELSEWHERE = """
import json, sys, warnings
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

warnings.simplefilter("error", UserWarning)  # peft warns of keys that it does not find
ids, mask = (torch.tensor(rows) for rows in json.loads(sys.argv[1]))
for directory in sys.argv[2:]:
    path, _, base = directory.partition("+")
    model, report = AutoModelForCausalLM.from_pretrained(
        f"{path}/{base}", dtype=torch.float32, output_loading_info=True
    )
    lacking = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    assert not lacking, (directory, lacking)
    if base:
        model = PeftModel.from_pretrained(model, path)
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, attention_mask=mask).logits
    torch.save(logits[mask.bool()], f"{path}/logits.pt")
    AutoTokenizer.from_pretrained(f"{path}/{base}")
assert not any(name.split(".")[0] in ("hfedmoe_ray", "ray", "deepspeed") for name in sys.modules)
"""
"""A program that has nothing of this package: loads each directory, and keeps the logits of the batch's tokens."""

pytestmark = pytest.mark.usefixtures("one_thread")


def ours(run_dir: Path, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of the batch's tokens after the run's last round, by this package's forward pass over all experts."""
    experiment = load_experiment(run_dir / "config.yaml")
    context = prepare_run(experiment, run_dir)
    weights = load_checkpoint(run_dir / "checkpoints", run_identity(context)).weights
    model = SparseModel(context.model.path, lora=experiment.model.lora)
    everything = TaskWeights(shared=weights.shared, experts=weights.experts, means=weights.means)
    model.bind(plan("TTTTTT", "TTTTTT"), everything, experiment.model.trainable)
    with torch.no_grad():
        return model.forward(ids, mask, targets=mask.bool())


def check_rounded(exact: Path, rounded: Path) -> None:
    """Checks that a model says it is in bf16, and that its tensors are those of another, each rounded once."""
    assert json.loads((rounded / "config.json").read_text())["dtype"] == "bfloat16"
    tensors, expected = (load_file(directory / "model.safetensors") for directory in (rounded, exact))
    assert {one.dtype for one in expected.values()} == {torch.float32}
    assert torch.bfloat16 in {one.dtype for one in tensors.values()}
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name


def test_logits_are_the_same_without_this_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"asked": f"word{i % 4} word{i % 7}", "said": f"word{10 + i % 4} word9"} for i in range(60)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ids, mask = batch()
    expected: dict[str, Tensor] = {}
    for family in DECODERS:
        source = save_family(family, tmp_path / family)
        for name, lora in (("whole", None), ("factors", {"rank": 2, "alpha": 8, "attention": True})):
            settings = {
                "name": f"{family}-{name}",
                "output": str(tmp_path / "runs"),
                "backend": "local",
                "rounds": 1,
                "clients": {"count": 2, "tiers": [{"name": "all", "share": 1.0, "experts": 1.0}]},
                "model": {"source": str(source), "task": "causal", "lora": lora},
                "data": {"source": str(tmp_path / "data.jsonl"), "prompt": "asked", "response": "said"}
                | {"max_length": 8},
                "local": {"steps": 4, "batch_size": 8, "profile_examples": 8, "learning_rate": 2e-2},
                "tracking": {"wandb": {"mode": "disabled"}},
            }
            (tmp_path / "config.yaml").write_text(json.dumps(settings))
            assert main(["run", str(tmp_path / "config.yaml")]) == 0
            run_dir = tmp_path / "runs" / f"{family}-{name}"
            for form in ("hf",) if lora is None else ("hf", "peft"):
                directory = tmp_path / "exported" / f"{family}-{name}-{form}"
                export = ["export", str(run_dir), "--format", form]
                assert main([*export, "--output", str(directory)]) == 0
                rounded = directory.with_name(f"{directory.name}-bf16")
                assert main([*export, "--output", str(rounded), "--dtype", "bf16"]) == 0
                base = BASE if form == "peft" else ""
                check_rounded(directory / base, rounded / base)
                expected[f"{directory}+{base}"] = ours(run_dir, ids, mask)
    capsys.readouterr()
    arguments = [json.dumps([ids.tolist(), mask.tolist()]), *expected]
    subprocess.run([sys.executable, "-I", "-c", ELSEWHERE, *arguments], check=True, cwd=tmp_path, timeout=120)
    for name, logits in expected.items():
        theirs = torch.load(Path(name.partition("+")[0]) / "logits.pt")
        torch.testing.assert_close(theirs, logits, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    whole, before = expected[next(iter(expected))], save_family("mixtral", tmp_path / "before")
    from transformers import AutoModelForCausalLM

    untrained = AutoModelForCausalLM.from_pretrained(before, dtype=torch.float32).eval()
    with torch.no_grad():
        assert not torch.allclose(untrained(input_ids=ids, attention_mask=mask).logits[mask.bool()], whole, atol=0.05)
