"""What a client tells of its use of experts, so that its choice of them does not tell its topics.

Each mechanism is epsilon-differentially private for the one answer of one client, whatever its data were (local
privacy): no two clients of the same budget can be told apart by more than a factor of e^epsilon. Legend: L MoE layers,
E experts, n = L E, K a client's residents, T its K best experts, S the set it answers.

    response   P(S) ~ exp(epsilon |S & T| / (K - max(0, 2K - n))). The overlaps of all sets with any T of K experts are
               distributed alike, so the normaliser tells nothing, and the exponential mechanism needs no factor 2.
    gumbel     the K largest of score + Gumbel(2 R K / epsilon), scores clipped to [0, R]: the exponential mechanism K
               times in turn, each with epsilon / K.
    usage      usage + Laplace(2 L / epsilon): two clients' usage differs by at most 2 in L1 in each layer.

The server makes its plan of the answer as it would of a profile; all it does with it is post-processing.
"""

from math import comb

import numpy as np

from hfedmoe_ray.config.privacy import Selection
from hfedmoe_ray.strategies.scores import Scope, mask, top_experts
from hfedmoe_ray.trust.noise import Source, source
from hfedmoe_ray.types import Array, FloatArray, RoutingProfile


def answer(
    options: Selection, profile: RoutingProfile, score: FloatArray, residents: int, scope: Scope, *, client: int
) -> RoutingProfile:
    """Returns what a client sends in place of its routing profile, once in a run.

    Args:
        options: The mechanism and its epsilon.
        profile: As measured.
        score: Of every expert by that profile, [L, E]: what the strategy would choose by.
        residents: K.
        scope: How the strategy spends them.
        client: Its number; only draws of tests depend on it.
    """
    draws = source(options.noise_seed, "private-selection", client)
    match options.how:
        case "usage":
            return as_profile(noisy_usage(profile.usage, options.epsilon, draws))
        case "gumbel":
            return as_profile(noisy_top(score, residents, options.epsilon, options.score_range / score.shape[1], draws))
        case "response":
            best = top_experts(score, np.ones(score.shape, dtype=bool), residents, scope)
            return as_profile(random_response(mask(score.shape, best), options.epsilon, draws))


def nothing(shape: tuple[int, int]) -> RoutingProfile:
    """Returns the profile of a client that tells nothing: every expert is used alike."""
    return as_profile(np.full(shape, 1.0 / shape[1]))


def random_response(best: Array, epsilon: float, draws: Source) -> FloatArray:
    """Returns a set of as many experts as `best`, bool [L, E], has: 1.0 in it, else 0.0, [L, E]."""
    inside, outside = (np.flatnonzero(best.ravel() == member) for member in (True, False))
    size, others = len(inside), len(outside)
    least = max(0, size - others)
    if size == least:  # all experts: there is nothing to hide
        return best.astype(np.float64)
    overlaps = np.arange(least, size + 1)
    # As shares of the largest, since how many sets there are no float may hold.
    counts = [comb(size, int(j)) * comb(others, size - int(j)) for j in overlaps]
    sets = np.array([count / max(counts) for count in counts])
    chances = np.cumsum(sets * np.exp(epsilon * (overlaps - size) / (size - least)))
    overlap = int(overlaps[np.searchsorted(chances / chances[-1], draws.random(1)[0], side="right")])
    chosen = np.zeros(best.size)
    chosen[_some(inside, overlap, draws)] = 1.0
    chosen[_some(outside, size - overlap, draws)] = 1.0
    return chosen.reshape(best.shape)


def noisy_top(score: FloatArray, size: int, epsilon: float, most: float, draws: Source) -> FloatArray:
    """Returns the `size` best by noised scores, which count from 0 to `most`: 1.0 for those, else 0.0, [L, E]."""
    gumbel = -np.log(-np.log1p(-draws.random(score.size)) + 1e-300)
    noised = np.clip(score, 0.0, most).ravel() + (2.0 * most * size / epsilon) * gumbel
    chosen = np.zeros(score.size)
    chosen[np.argsort(-noised)[:size]] = 1.0
    return chosen.reshape(score.shape)


def noisy_usage(usage: FloatArray, epsilon: float, draws: Source) -> FloatArray:
    """Returns usage [L, E] with Laplace noise for all layers together."""
    uniform = draws.random(usage.size) - 0.5
    laplace = -np.sign(uniform) * np.log1p(-2.0 * np.abs(uniform) * (1 - 2.0**-53))
    noised: FloatArray = usage + (2.0 * usage.shape[0] / epsilon) * laplace.reshape(usage.shape)
    return noised


def as_profile(usage: FloatArray) -> RoutingProfile:
    """Returns a profile that says this and no more."""
    zeros = np.zeros_like(usage)
    return RoutingProfile(usage=usage, specific=usage.copy(), kl=zeros, routed=zeros.copy(), tokens=1)


def _some(of: Array, count: int, draws: Source) -> Array:
    """Returns so many of them, all subsets alike."""
    return of[np.argsort(draws.random(len(of)))[:count]]
