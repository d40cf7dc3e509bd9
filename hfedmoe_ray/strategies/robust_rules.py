"""Rules that put something else in the place of a weighted mean, so that a minority cannot move it at will.

Each looks at the n contributors of one group - an expert, a router or a row of it, the shared parameters - as n
vectors x_i of changes with weights w_i. Two kinds: the median and the trimmed mean look at every number by itself; the
others weigh whole vectors anew by the distances between them, for which their inner products are enough.

    median            of each number, half of the weight on either side (Yin et al., arXiv 1803.01498)
    trimmed_mean      of each number, without the weight of the f heaviest at either end (the same)
    krum              x_i with the least sum of squared distances to its n - f - 2 closest, f = `suspects`; of those
                      that have the same the closest to all, then the shortest (Blanchard et al., NeurIPS 2017);
                      weights are not asked
    multi_krum        the weighted mean of the n - f with the least such sums (the same; the weights are ours)
    geometric_median  argmin_z sum_i w_i |x_i - z|, by Weiszfeld's iteration, smoothed (RFA, arXiv 1912.13445)

Where clients' data differ, so do honest changes, and what is in their middle is close to none of them. So before the
rule each x_i gives way to the weighted mean of the n - f that are closest to it, itself among them (nearest-neighbour
mixing, Allouah et al., arXiv 2302.01772; weights are ours). Who is close is asked of changes before they are clipped:
one that was scaled down to the others' length no longer stands out by it.

Of one contributor all give what it sent, of two the median and the geometric median something between them, and krum,
which cannot tell two apart, the median (ours).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from hfedmoe_ray.config.robust import Robust
from hfedmoe_ray.types import Array, FloatArray

Tensors = Mapping[str, Array]
Mixture = FloatArray | None
_STEPS, _CLOSE = 100, 1e-10
"""Of Weiszfeld's iteration: at most, and the relative change of its weights at which it has arrived."""
_SMOOTH = 1e-6
"""Distances count as at least so much of the largest there is."""


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What one client has made of a group, and how much it weighs."""

    tensors: Tensors
    weight: float
    scale: float = 1.0
    """What its change was scaled down by. Distances, other than the geometric median's own, are those without it."""


def combined(contributions: Sequence[Contribution], old: Tensors, options: Robust) -> dict[str, Array]:
    """Returns the new tensors of a group, in the old ones' types.

    Args:
        contributions: At least one, of positive weight.
        old: The published tensors, from which changes are taken.
        options: The rule.
    """
    weights = np.array([one.weight for one in contributions])
    columns = {name: [one.tensors[name] for one in contributions] for name in old}
    by_number = _by_number(weights, options)
    if by_number is not None:
        mixture = _mixture(contributions, old, weights, options)
        new = {name: by_number(_mixed(np.stack(column), mixture)) for name, column in columns.items()}
    else:
        weights = _anew(contributions, old, weights, options)
        new = {name: _mean(column, weights) for name, column in columns.items()}
    return {name: value.astype(old[name].dtype) for name, value in new.items()}


def suspects(count: int, share: float) -> int:
    """Returns how many of a group's contributors are taken for hostile: at least one of three, never half of them."""
    return min(ceil(share * count - 1e-9), (count - 1) // 2)


def trimmed_share(weights: FloatArray, share: float) -> float:
    """Returns the share of the weight to cut at either end: that of the heaviest suspects, and at least `share`."""
    heaviest = np.sort(weights)[::-1][: suspects(len(weights), share)].sum() / weights.sum()
    return float(max(share if len(weights) > 2 else 0.0, heaviest))


# -------------------------------------------------------------------------------------------------- number by number


def median(values: Array, weights: FloatArray) -> FloatArray:
    """Returns the weighted median of [n, ...] along the first axis, float64; halfway where the weight is split evenly.

    Args:
        values: Of every contributor.
        weights: Theirs, [n], positive.
    """
    order = np.argsort(values, axis=0, kind="stable")
    ordered = np.take_along_axis(values, order, axis=0).astype(np.float64)
    below, half = np.cumsum(weights[order], axis=0), weights.sum() / 2
    # Sums of weights are rounded: what is half of them within that counts as half.
    split = np.isclose(below, half, rtol=1e-12, atol=0.0)
    lower = np.argmax((below >= half) | split, axis=0)[None]
    upper = np.minimum(lower + np.take_along_axis(split, lower, axis=0), len(values) - 1)
    low, high = (np.take_along_axis(ordered, place, axis=0)[0] for place in (lower, upper))
    middle: FloatArray = low + (high - low) / 2
    return middle


def trimmed_mean(values: Array, weights: FloatArray, share: float) -> FloatArray:
    """Returns the weighted mean of [n, ...] along the first axis, float64, without a share of the weight at each end.

    Args:
        values: Of every contributor.
        weights: Theirs, [n], positive.
        share: At either end, below 1/2; of a value that lies across the cut the rest counts.
    """
    order = np.argsort(values, axis=0, kind="stable")
    ordered = np.take_along_axis(values, order, axis=0).astype(np.float64)
    total = weights.sum()
    above = np.cumsum(weights[order], axis=0)
    kept = np.minimum(above, (1 - share) * total) - np.maximum(above - weights[order], share * total)
    kept = np.maximum(kept, 0.0)
    mean: FloatArray = (ordered * kept).sum(axis=0) / kept.sum(axis=0)
    # A mean of values lies between them, which rounding need not respect: equal ones give just that value.
    return np.clip(mean, ordered[0], ordered[-1])


# ------------------------------------------------------------------------------------------------------ whole vectors


def krum_scores(squared: FloatArray, hostile: int) -> FloatArray:
    """Returns for each of n vectors the sum of squared distances to its n - f - 2 closest others (at least one), [n].

    Args:
        squared: Squared distances, [n, n].
        hostile: f.
    """
    closest = max(1, len(squared) - hostile - 2)
    others = np.sort(np.where(np.eye(len(squared), dtype=bool), np.inf, squared), axis=1)
    scores: FloatArray = others[:, :closest].sum(axis=1)
    return scores


def weiszfeld(products: FloatArray, weights: FloatArray) -> FloatArray:
    """Returns the weights, summing to 1, of the mean that is the weighted geometric median, [n].

    Args:
        products: Inner products of the vectors, [n, n].
        weights: Theirs, [n], positive.
    """
    own = np.diag(products)
    new: FloatArray = weights / weights.sum()
    for _ in range(_STEPS):
        squared = own - 2 * products @ new + new @ products @ new
        distances = np.sqrt(np.maximum(squared, 0.0))
        # Relative to a middle distance, not to the largest, which who lies farthest out has in hand.
        middle = float(median(distances, weights))
        if middle == 0.0:
            break  # at a point that has half of the weight: there is no better one
        before, new = new, weights / np.maximum(distances, _SMOOTH * middle)
        new = new / new.sum()
        if np.abs(new - before).max() < _CLOSE:
            break
    return new


def nearest(squared: FloatArray, weights: FloatArray, hostile: int) -> FloatArray:
    """Returns the rows by which each of n vectors is mixed with its n - f closest, itself among them, [n, n].

    Args:
        squared: Squared distances, [n, n].
        weights: Of the vectors in every mean, [n], positive.
        hostile: f.
    """
    count = len(weights)
    order = np.argsort(np.where(np.eye(count, dtype=bool), -1.0, squared), axis=1, kind="stable")
    rows = np.zeros((count, count))
    np.put_along_axis(rows, order[:, : count - hostile], 1.0, axis=1)
    rows *= weights
    shares: FloatArray = rows / rows.sum(axis=1, keepdims=True)
    return shares


# ------------------------------------------------------------------------------------------------------- put together


def _by_number(weights: FloatArray, options: Robust) -> Callable[[Array], FloatArray] | None:
    """The rule of [n, ...], if it is one that looks at every number by itself."""
    if options.rule == "trimmed_mean":
        share = trimmed_share(weights, options.hostile)
        if share < 0.5:
            return lambda values: trimmed_mean(values, weights, share)
    elif options.rule != "median" and not (options.rule == "krum" and len(weights) == 2):
        return None
    return lambda values: median(values, weights)


def _mixture(contributions: Sequence[Contribution], old: Tensors, weights: FloatArray, options: Robust) -> Mixture:
    """How contributions are mixed before the rule; None: they are not, as where nobody is suspected."""
    hostile = suspects(len(weights), options.hostile)
    if not options.mix or hostile == 0:
        return None
    return nearest(_distances(_products(contributions, old, unclipped=True)), weights, hostile)


def _mixed(values: Array, mixture: Mixture) -> Array:
    """Contributions [n, ...] put together by the rows of a mixture."""
    if mixture is None:
        return values
    # Not a matrix product, here and below: how many threads take one decides its last bits.
    mixed: Array = np.einsum("ij,j...->i...", mixture, values.astype(np.float64), optimize=False)
    return mixed


def _anew(contributions: Sequence[Contribution], old: Tensors, weights: FloatArray, options: Robust) -> FloatArray:
    """The weights that a rule gives whole contributions, summing to 1."""
    if len(weights) == 1 or options.rule == "mean":
        alone: FloatArray = weights / weights.sum()
        return alone
    mixture = _mixture(contributions, old, weights, options)
    # Once they are mixed nobody's length is left to tell.
    unclipped = mixture is None and options.rule != "geometric_median"
    products = _products(contributions, old, unclipped=unclipped)
    if mixture is not None:
        products = np.einsum("ik,kl,jl->ij", mixture, products, mixture, optimize=False)
        products = (products + products.T) / 2
    shares = _of_vectors(products, weights, options)
    if mixture is not None:
        shares = np.einsum("i,ij->j", shares, mixture, optimize=False)
    return shares


def _of_vectors(products: FloatArray, weights: FloatArray, options: Robust) -> FloatArray:
    """The weights that a rule gives vectors with these inner products, summing to 1."""
    if options.rule == "geometric_median":
        return weiszfeld(products, weights)
    hostile = suspects(len(weights), options.hostile)
    squared = _distances(products)
    # Two that are each other's closest have the same score, and pairs of them, once mixed, the same sums but for
    # rounding: which comes first must not depend on their numbers, so the shorter does, then the one that weighs less.
    sums = squared.sum(axis=1)
    sums = np.round(sums / (np.median(sums) or 1.0), 9)
    order = np.lexsort((weights, np.diag(products), sums, krum_scores(squared, hostile)))
    kept = 1 if options.rule == "krum" else len(weights) - hostile
    chosen = np.zeros(len(weights))
    chosen[order[:kept]] = 1.0
    if options.rule == "multi_krum":
        chosen *= weights
    shares: FloatArray = chosen / chosen.sum()
    return shares


def _distances(products: FloatArray) -> FloatArray:
    """Squared distances, [n, n]."""
    own = np.diag(products)
    squared: FloatArray = np.maximum(own[:, None] + own - 2 * products, 0.0)
    return squared


def _products(contributions: Sequence[Contribution], old: Tensors, *, unclipped: bool) -> FloatArray:
    """Inner products of the contributors' changes, [n, n]."""
    total = np.zeros((len(contributions), len(contributions)))
    for name, published in old.items():
        start = published.astype(np.float64)
        changes = np.stack([(one.tensors[name] - start).ravel() for one in contributions])
        total += np.einsum("ik,jk->ij", changes, changes, optimize=False)
    if unclipped:
        scales = np.array([one.scale for one in contributions])
        total /= scales[:, None] * scales
    return total


def _mean(values: Sequence[Array], weights: FloatArray) -> FloatArray:
    """The mean of arrays with weights that sum to 1; an array that has all of it is the mean, to the bit."""
    total = np.zeros(values[0].shape)
    for value, weight in zip(values, weights, strict=True):
        if weight:
            total += value.astype(np.float64) * weight
    mean: FloatArray = total / weights.sum()
    return mean
