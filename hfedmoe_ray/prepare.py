"""From a configuration to a run that can start: data read, model built, both stored where workers map them."""

from pathlib import Path

from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.context import RunContext, cache_dir
from hfedmoe_ray.data.prepare import prepare_data
from hfedmoe_ray.data.sources import RawDataset, load_raw
from hfedmoe_ray.moe.prepare import prepare_model
from hfedmoe_ray.seeds import generator

_CALIBRATION_TEXTS = 256
"""Texts for the router's distillation: layer inputs of some 16 000 tokens."""


def prepare_run(experiment: Experiment, run_dir: Path) -> RunContext:
    """Prepares the data and the model of an experiment, or finds them in the cache.

    A model of the hub is pinned: the run's own configuration, which it records and goes on with, names the commit that
    was fetched.

    Args:
        experiment: The configuration.
        run_dir: Where the run will write; made absolute.

    Raises:
        DataError: The data cannot be read or dealt.
        ModelError: The model cannot be loaded or upcycled.
    """
    raw = load_raw(experiment.data)
    model = prepare_model(
        experiment.model,
        num_labels=len(raw.label_names) if experiment.model.task == "classification" else 0,
        seed=experiment.seed,
        calibration_texts=calibration_texts(raw, experiment.seed),
        cache=cache_dir(),
    )
    data = prepare_data(
        experiment.data,
        raw,
        tokenizer_dir=model.path,
        clients=experiment.clients.count,
        seed=experiment.seed,
        cache=cache_dir(),
        benchmarks=experiment.evaluate.benchmarks,
        translates=experiment.model.task == "seq2seq",
    )
    if model.commit is not None:
        pinned = experiment.model.model_copy(update={"revision": model.commit})
        experiment = experiment.model_copy(update={"model": pinned})
    return RunContext(experiment=experiment, run_dir=run_dir.resolve(), model=model, data=data)


def calibration_texts(raw: RawDataset, seed: int) -> list[str]:
    """Returns a seeded sample of texts the server may read, without their labels.

    Training texts, or where clients read their own files the global test texts; with neither, no texts: the routers
    then start uncalibrated.
    """
    texts, prompts = (raw.train_texts, raw.train_prompts) if raw.train_texts else (raw.test_texts, raw.test_prompts)
    if prompts:
        texts = tuple(f"{prompt}\n{text}".strip() for prompt, text in zip(prompts, texts, strict=True))
    order = generator(seed, "calibration").permutation(len(texts))[:_CALIBRATION_TEXTS]
    return [texts[int(index)] for index in sorted(order)]
