"""Branch, train, mix: copies of a dense model's feed-forward layers learn a domain each, then become experts (ours).

After the idea of Branch-Train-MiX (arXiv 2403.07816), with two differences that keep everything but the experts as it
was: of each copy the feed-forward layers alone train, so that nothing else has to be averaged; and the routers are not
trained but computed, from the domains' centroids.

**Router.** Row d of a layer's router is tau (M + lambda I)^-1 mu_d: the centroid mu_d of domain d's tokens as they
enter the dense layer, whitened by their second moment M, domains weighing alike. That is the ridge regression that
tells a token's domain from its state, so a logit is about tau for a domain that is certain and 0 for one that is ruled
out.

Legend: N tokens, B batch, S sequence, H hidden, D domains, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from hfedmoe_ray.context import PreparedModel
from hfedmoe_ray.data.tokenize import load_tokenizer, tokenize
from hfedmoe_ray.errors import DataError
from hfedmoe_ray.moe.quiet import quiet_transformers
from hfedmoe_ray.moe.store import read_meta
from hfedmoe_ray.moe.threads import one_thread
from hfedmoe_ray.moe.upcycle.dense import family_of
from hfedmoe_ray.seeds import derive_seed, generator
from hfedmoe_ray.types import Array, ExpertKey, Weights

_TOKENS = 128
"""Tokens of a text that are read."""
_BATCH = 8
_CENTROID_TEXTS = 64
"""Texts of each domain from which the centroids are taken."""
_SHARPNESS = 10.0
"""tau: what separates the logits of a domain that is certain from those of the others."""
_RIDGE = 1e-3
"""lambda, as a share of the mean second moment of a coordinate."""


@dataclass(frozen=True, kw_only=True)
class Domains:
    """Texts by domain."""

    names: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    """Of each domain [D]."""


def domains_of(texts: Sequence[str], labels: Sequence[int], names: Sequence[str], experts: int) -> Domains:
    """Sorts texts by domain.

    Raises:
        DataError: There is one domain only, or more than experts.
    """
    by_domain = [tuple(text for text, of in zip(texts, labels, strict=True) if of == d) for d in range(len(names))]
    if not 2 <= len(names) <= experts:
        raise DataError(
            f"--by names {len(names)} domains, but {experts} experts need 2 to {experts}. Choose another column, or "
            "another --experts."
        )
    return Domains(names=tuple(names), texts=tuple(by_domain))


def specialise(
    source: Path,
    prepared: PreparedModel,
    weights: Weights,
    domains: Domains,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
) -> Weights:
    """Returns the weights of an upcycled model whose experts have each learned a domain, with routers that tell them.

    Expert e of every layer learns domain e mod D. With 0 steps nothing has been learned that routers could tell apart:
    the weights are returned as they are.

    Args:
        source: Directory of the dense model.
        prepared: The model upcycled from it by `copy`.
        weights: Its weights, in which experts and routers train.
        domains: Texts by domain.
        steps: Optimizer steps of each expert.
        learning_rate: Of AdamW.
        seed: Decides the batches.
    """
    if steps == 0:
        return weights
    tokenizer = load_tokenizer(source)
    tokens = [_tokenized(tokenizer, texts) for texts in domains.texts]
    with one_thread(), quiet_transformers():
        dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=False).eval()
        layers = list(dense.base_model.get_submodule(family_of(dense).layers_name).children())
        rows = _router_rows(dense, layers, tokens)  # [D, H] for each layer
        experts = {key: dict(arrays) for key, arrays in weights.experts.items()}
        for expert in range(prepared.shape.experts):
            drawn = generator(seed, "specialise", expert)
            learned = _trained(
                dense, layers, tokens[expert % len(tokens)], steps=steps, learning_rate=learning_rate, drawn=drawn
            )
            for layer, arrays in enumerate(learned):
                experts[ExpertKey(layer, expert)] = arrays
    shared = dict(weights.shared)
    for name, layer in read_meta(prepared.path).router_layers.items():
        # Experts of one domain differ as routers of copies do: a little, so that each gets its share.
        chance = torch.Generator().manual_seed(derive_seed(seed, "specialise-router", layer))
        start = 0.02 * torch.randn(shared[name].shape, generator=chance)
        start += rows[layer][torch.arange(prepared.shape.experts) % len(tokens)]
        shared[name] = start.numpy().astype(shared[name].dtype)
    return replace(weights, shared=shared, experts=experts)


def _tokenized(tokenizer: Any, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids and masks of texts, [N, S] each."""
    ids, lengths = tokenize(tokenizer, texts, _TOKENS)
    mask = np.arange(ids.shape[1]) < lengths[:, None]
    return torch.from_numpy(ids).long(), torch.from_numpy(mask).long()


def _trained(
    dense: nn.Module,
    layers: Sequence[nn.Module],
    tokens: tuple[Tensor, Tensor],
    *,
    steps: int,
    learning_rate: float,
    drawn: np.random.Generator,
) -> list[dict[str, Array]]:
    """Trains the feed-forward layers on a domain, and puts them back; returns each layer's as an expert's arrays."""
    family, (ids, mask) = family_of(dense.base_model), tokens
    dense.requires_grad_(False)
    parameters = [parameter for layer in layers for parameter in layer.get_submodule(family.ffn_name).parameters()]
    before = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    for _ in range(steps):
        chosen = torch.from_numpy(drawn.integers(len(ids), size=_BATCH))
        longest = int(mask[chosen].sum(dim=1).max())
        loss = language_loss(dense, ids[chosen, :longest], mask[chosen, :longest])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    made: list[dict[str, Array]] = []
    for layer in layers:
        neurons = {name: tensor.clone() for name, tensor in family.neurons(layer).items()}
        made.append({name: tensor.contiguous().numpy() for name, tensor in family.expert(neurons, 1.0).items()})
    with torch.no_grad():
        for parameter, old in zip(parameters, before, strict=True):
            parameter.copy_(old)
            parameter.requires_grad_(False)
    return made


def language_loss(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean cross entropy of the next token over the real tokens of a batch, [B, S] each."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    return cross_entropy(logits[mask[:, 1:].bool()].float(), ids[:, 1:][mask[:, 1:].bool()])


@torch.no_grad()
def _router_rows(
    dense: nn.Module, layers: Sequence[nn.Module], tokens: Sequence[tuple[Tensor, Tensor]]
) -> list[Tensor]:
    """The router's row of each domain for each layer, [D, H]."""
    family = family_of(dense.base_model)
    states: list[list[Tensor]] = [[] for _ in layers]
    real = torch.zeros(0, dtype=torch.bool)

    def note(layer: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            states[layer].append(args[0][real])

        return layers[layer].get_submodule(family.ffn_name).register_forward_pre_hook(hook)

    handles = [note(layer) for layer in range(len(layers))]
    centroids: list[list[Tensor]] = [[] for _ in layers]
    moments: list[list[Tensor]] = [[] for _ in layers]
    for ids, mask in tokens:
        for start in range(0, min(len(ids), _CENTROID_TEXTS), _BATCH):
            part = slice(start, min(start + _BATCH, _CENTROID_TEXTS))
            real = mask[part].bool()
            dense(input_ids=ids[part], attention_mask=mask[part], use_cache=False)
        for layer, seen in enumerate(states):
            whole = torch.cat(seen).double()  # [N, H]
            centroids[layer].append(whole.mean(dim=0))
            moments[layer].append(whole.T @ whole / len(whole))
            seen.clear()
    for handle in handles:
        handle.remove()
    rows = []
    for means, seconds in zip(centroids, moments, strict=True):
        moment = torch.stack(seconds).mean(dim=0)  # [H, H]
        ridge = _RIDGE * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
        whitened = torch.linalg.solve(moment + ridge, torch.stack(means).T / len(means))  # [H, D]
        rows.append((_SHARPNESS * whitened.T).float())
    return rows
