"""What packing short texts into rows saves: tokens a second of a client's training step, packed and padded.

hfedmoe bench packing --data FILE [--json FILE]

The model and the data of configs/smollm2_upcycled.yaml: LoRA over the experts of an upcycled SmolLM2-135M, on
instructions with short answers, FILE having its columns. Every figure comes from `ClientWorker.execute`, as in `step`:
the same batches, packed and padded in turns, each form first as often as the other; real tokens alone are counted. The
gain is the median over repetitions of the ratio of both forms' seconds, told with the least and the largest.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import statistics
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import click
from output import Row, json_option, publish
from step import CLOCK

from hfedmoe_ray.config.load import load_experiment
from hfedmoe_ray.context import RunContext
from hfedmoe_ray.data.dataset import FederatedDataset
from hfedmoe_ray.moe.prepare import initial_weights
from hfedmoe_ray.prepare import prepare_run
from hfedmoe_ray.strategies.scores import uniform_plan
from hfedmoe_ray.train.examples import batches
from hfedmoe_ray.train.local import ClientWorker
from hfedmoe_ray.types import ClientTask, Role, TaskWeights

CONFIG = Path(__file__).parents[2] / "configs" / "smollm2_upcycled.yaml"
FORMS = ("padded", "packed")


def prepared(data: Path, size: int, steps: int, directory: Path) -> dict[str, RunContext]:
    """The same run, padded and packed; clients' batches of `size` pass whole."""
    made = {}
    for form in FORMS:
        experiment = load_experiment(
            CONFIG,
            [
                f"data.source={data}",
                f"data.packing={str(form == 'packed').lower()}",
                f"local.batch_size={size}",
                f"local.steps={steps}",
                "evaluate.benchmarks=[]",
                "clients.tiers.0.micro_batch=null",
                "clients.tiers.1.micro_batch=null",
                "clients.tiers.2.micro_batch=null",
            ],
        )
        made[form] = prepare_run(experiment, directory)
    return made


class Client:
    """A worker that serves client 0."""

    def __init__(self, context: RunContext) -> None:
        experiment = context.experiment
        self.context, self.worker = context, ClientWorker(context)
        shape = context.model.shape
        lora = experiment.model.lora
        weights = initial_weights(context.model, experiment.model.trainable, lora=lora, seed=experiment.seed)
        self.weights = TaskWeights(shared=weights.shared, experts=weights.experts, means=weights.means)
        plan = uniform_plan((shape.layers, shape.experts), Role.TRAIN)
        self.task = ClientTask(kind="train", round=1, client=0, seed=0, plan=plan, version=0)

    def seconds(self) -> list[float]:
        """Of each step of the task."""
        asked: list[float] = []

        def should_stop() -> bool:
            asked.append(CLOCK())
            return False

        self.worker.execute(self.task, self.weights, should_stop)
        return [after - before for before, after in pairwise(asked)]

    def batches(self) -> Iterator[tuple[int, int]]:
        """Real tokens and places of each batch."""
        split = FederatedDataset(self.context.data, self.context.experiment.data).train(0)
        for indices in batches(self.context.experiment.local, self.task, len(split)):
            batch = split.batch(indices)
            yield int(batch.attention_mask.sum()), batch.attention_mask.size


@click.command()
@json_option
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--batch-sizes", default="8", show_default=True, help="Examples of a batch, one run each.")
@click.option("--steps", default=10, show_default=True, help="Of a task; the first and the last do not count.")
@click.option("--repetitions", default=4, show_default=True)
def main(json_file: Path | None, data: Path, batch_sizes: str, steps: int, repetitions: int) -> None:
    """Tokens a second of a training step, packed and padded."""
    rows, figures = [], dict[str, Any]()
    for size in map(int, batch_sizes.split(",")):
        clients = {form: Client(context) for form, context in prepared(data, size, steps, Path.cwd()).items()}
        counted = {form: list(islice(client.batches(), 1, steps - 1)) for form, client in clients.items()}
        seconds: dict[str, list[float]] = {form: [] for form in FORMS}
        for repetition in range(repetitions):
            for form in FORMS if repetition % 2 else reversed(FORMS):
                seconds[form].append(sum(clients[form].seconds()[1:]))
        tokens = {form: sum(real for real, _ in ones) for form, ones in counted.items()}
        speed = {form: round(tokens[form] / statistics.median(seconds[form]), 1) for form in FORMS}
        filled = {form: round(tokens[form] / sum(places for _, places in counted[form]), 3) for form in FORMS}
        ratios = [round(one / other, 3) for one, other in zip(seconds["padded"], seconds["packed"], strict=True)]
        gain = round(statistics.median(ratios), 3)
        figures[str(size)] = {
            "batches": steps - 2,
            "tokens_per_second": speed,
            "share_of_places_filled": filled,
            "gain": gain,
            "gains": ratios,
        }
        for form in FORMS:
            told = f"{speed[form]:.0f} tokens/s, {filled[form]:.0%} of the places are tokens"
            rows.append(Row(what=f"batches of {size}, {form}", measured=told))
        told = f"{gain:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        rows.append(Row(what=f"batches of {size}, packed over padded", measured=told))
    publish("Packing", figures, rows, json_file)


if __name__ == "__main__":
    main()
