"""Coverage: bounds below the holders of every expert, so that unpopular ones are trained too (ours).

Chosen by importance alone, residents are the same popular experts on every client; the others are held, and so
trained, by nobody. With `coverage` c, of all places that clients' budgets have had so far - those of the round that
is planned among them - the share c is dealt evenly over the L E experts. By the end of the round each expert must have
had as many holders as that, whoever they were:

    lower_e = floor(c (mean(H) + T) + phase_e) - H_e,       T = sum k_c / (L E)

with H_e the holders e has had in earlier rounds, and T the mean number of holders in this one. Why not floor(c T) in
every round by itself: under small budgets T is near 1 or below it, where that floor is 0 for every c < 1, and a cohort
could not hold all experts at once anyway. Carried over rounds, an expert that is due 0.3 holders a round gets one every
third or fourth round. The phases, spread evenly over 0..1 within each layer and shifted between layers, let experts
come due one after another instead of all in the same round: in the first round the bounds claim exactly c sum k_c
places, rounded; later at most about as many, as an expert that was chosen often enough of itself claims none.

c = 0 is importance alone; c = 1 deals all places evenly: then every expert has had the same number of holders, within
one. In between 1 - c of the places are left to the clients' own choice, exploration included. What an expert misses
because clients failed is made up for later.

To hold an expert is not yet to be averaged into it: with its usage threshold tau / E, HFedMoE leaves out of the mean
what clients trained of experts they use little - the very ones that are covered (of the quickstart's 32 experts, all
trained at c = 0.5, tau = 1 averages 12). So the threshold is 0 with coverage, unless `tau` is given.

Nor is it good to be averaged whole. A covered expert has one or two trainers in a round; their mean is what these few
clients made of it, from few tokens, while AdamW's steps are as long as for any other. Taken as it is, that undoes in a
round what the expert was: in one run at c = 0.5 the global model ended five points below the untrained one. So with
coverage an expert moves in proportion to the share of the cohort that trained it (`rules.RuleSet.anchor` = 1, unless
`anchor` is given): the published value stands in for clients that did not.
"""

from collections.abc import Mapping

import numpy as np

from hfedmoe_ray.seeds import generator
from hfedmoe_ray.strategies.assignment import mean_holders
from hfedmoe_ray.types import Array, FloatArray


def holders_due(
    coverage: float, budgets: Mapping[int, int], holders: Array | None, *, shape: tuple[int, int], seed: int
) -> FloatArray:
    """Returns how many holders each expert must get in this round, before rounding down, [L, E].

    Args:
        coverage: c, 0..1.
        budgets: k_c of this round's clients.
        holders: H: clients that have held each expert in earlier rounds, int [L, E]. None: no rounds yet.
        shape: (L, E).
        seed: Of the run, which decides who comes first.
    """
    before = np.zeros(shape) if holders is None else holders
    due: FloatArray = coverage * (before.mean() + mean_holders(budgets, shape)) + phases(shape, seed) - before
    return due


def phases(shape: tuple[int, int], seed: int) -> FloatArray:
    """Returns (rank + (l + 1/2) / L) / E of every expert, its rank in layer l drawn once a run, [L, E].

    By Hermite's identity the floors of x + phase sum to L E x, rounded, for any x.
    """
    layers, experts = shape
    ranks = [generator(seed, "coverage", layer).permutation(experts) for layer in range(layers)]
    shift = (np.arange(layers)[:, None] + 0.5) / layers
    spread: FloatArray = (np.stack(ranks) + shift) / experts
    return spread


def kept_share(score: FloatArray, budget: int) -> FloatArray:
    """Scales a client's scores so that its total is the share it keeps of what it could have chosen, [L, E].

    The total of its best k experts is larger by 1 than that of its worst k. Clients' scores are on different scales: a
    gate that is sure of itself has larger importances than one that is not, and in a plain sum it would keep its
    favourites while the unsure client held what nobody wants. The shift that is missing does not matter, as every
    client holds k experts in any case; a client that holds all has nothing to choose, and keeps its scores.
    """
    ranked = np.sort(score, axis=None)
    span = float(ranked[len(ranked) - budget :].sum() - ranked[:budget].sum())
    return score / span if span > 0 else score
