"""Whether an experiment's data and model are what its configuration says, found without preparing or training."""

from collections.abc import Iterator

from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.data.partition import deal
from hfedmoe_ray.data.sources import draw_subset, load_raw
from hfedmoe_ray.moe.shape import read_shape
from hfedmoe_ray.moe.sources import is_pinned


def check_sources(experiment: Experiment) -> Iterator[str]:
    """Reads the data, deals it to the clients and reads the model's shape; yields a line about each.

    The files of clients that read their own are not looked at: they are on the clients' nodes.

    Raises:
        DataError: a file or column is missing, a label unknown, or the examples do not suffice for the clients.
        ModelError: the model cannot be found, or not be made what the configuration asks for.
    """
    data, clients = experiment.data, experiment.clients.count
    raw = draw_subset(load_raw(data), data, experiment.seed)
    test = f"{len(raw.test_texts)} test examples, {len(raw.label_names)} classes"
    if data.partition.how == "files":
        yield f"data: {test}; {clients} clients read their own files, which are not looked at"
    else:
        sizes = [
            len(part) for part in deal(data.partition, raw.train_labels, raw.train_groups, clients, experiment.seed)
        ]
        yield f"data: {sum(sizes)} training examples ({min(sizes)} to {max(sizes)} a client), {test}"
    shape = read_shape(experiment.model)
    if not is_pinned(experiment.model.source, experiment.model.revision):
        yield (
            f"note: model.revision names no commit: {experiment.model.source} is whatever its repository holds when "
            "the run starts. Write the commit's 40 digits to have the same model always"
        )
    yield f"model: {shape.layers} MoE layers of {shape.experts} experts, {shape.top_k} a token"
