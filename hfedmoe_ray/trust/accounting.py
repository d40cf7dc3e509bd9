"""What has been spent of a run's privacy, and how much noise a budget asks for. All figures are dp-accounting's.

A round is a Gaussian mechanism on a Poisson sample of the clients; neighbours differ in one client, added or removed.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hfedmoe_ray.config.privacy import MOST_EPSILON, Central, Examples
from hfedmoe_ray.config.schema import Experiment, LocalTraining
from hfedmoe_ray.errors import ConfigError
from hfedmoe_ray.trust.noise import needs_extra

if TYPE_CHECKING:
    from dp_accounting import DpEvent, PrivacyAccountant

Release = tuple[float, float]
"""(q, z): chance of a client to be asked, noise multiplier."""


def epsilon(central: Central | Examples, releases: Iterable[Release]) -> float:
    """Returns epsilon at the configured delta after some releases; infinite where one had no noise, 0 after none.

    Raises:
        ConfigError: The extra `privacy` is not installed.
    """
    counted = Counter(releases)
    if not counted:
        return 0.0
    if central.delta is None or any(multiplier == 0 for _, multiplier in counted):
        return float("inf")
    _require()
    with _quiet():
        accountant = _accountant(central)
        for (rate, multiplier), times in sorted(counted.items()):
            accountant.compose(_round(rate, multiplier), times)
        found = accountant.get_epsilon(central.delta)
    return float(found)


def noise_multiplier(central: Central, rate: float, rounds: int) -> float:
    """Returns z: as configured, or the least with which so many rounds stay within the configured epsilon.

    Raises:
        ConfigError: The extra `privacy` is not installed.
    """
    if central.noise_multiplier is not None:
        return central.noise_multiplier
    assert central.epsilon is not None
    assert central.delta is not None
    _require()
    import dp_accounting as dp

    with _quiet():
        found = dp.calibrate_dp_mechanism(
            lambda: _accountant(central),
            lambda multiplier: dp.SelfComposedDpEvent(_round(rate, multiplier), rounds),
            central.epsilon,
            central.delta,
            dp.LowerEndpointAndGuess(0.0, 1.0),
            tol=1e-4,
        )
    return float(found)


def planned(experiment: Experiment) -> Mapping[str, float] | None:
    """Returns what a whole run spends: epsilon, delta, noise_multiplier, rate and rounds; None without noise or bounds.

    Raises:
        ConfigError: That is more than `MOST_EPSILON`, or the extra `privacy` is not installed.
    """
    central = experiment.privacy.central
    if central is None or not central.active:
        return None
    rate = sampling_rate(experiment)
    multiplier = noise_multiplier(central, rate, experiment.rounds + central.repeats)
    spent = epsilon(central, [(rate, multiplier)] * experiment.rounds)
    if spent > MOST_EPSILON and not central.unprotected:
        raise ConfigError(
            f"privacy.central: with noise_multiplier {multiplier:g}, {experiment.clients.cohort} of "
            f"{experiment.clients.count} clients a round and {experiment.rounds} rounds, epsilon is {spent:.3g}; above "
            f"{MOST_EPSILON:g} it promises next to nothing. Write a larger noise_multiplier (or `epsilon`, to which it "
            "is calibrated), have more clients or fewer rounds; or, to measure all the same, `unprotected: true`."
        )
    return {
        "epsilon": spent,
        "delta": central.delta or 0.0,
        "noise_multiplier": multiplier,
        "rate": rate,
        "rounds": float(experiment.rounds),
    }


def example_epsilon(options: Examples, local: LocalTraining, examples: Iterable[int], rounds: int) -> float:
    """Returns the largest epsilon of any client's examples after so many rounds, if it was asked in each.

    Args:
        options: The noise.
        local: Steps of a round, and the batch size that is expected.
        examples: Training examples of each client; how many there are is taken to be known.
        rounds: So far.
    """
    rate = min(1.0, local.batch_size / max(1, min(examples)))
    return epsilon(options, [(rate, options.noise_multiplier)] * (rounds * local.steps))


def check_examples(experiment: Experiment, examples: Iterable[int]) -> None:
    """Raises ConfigError where a whole run's epsilon of single examples would be meaningless."""
    options = experiment.privacy.examples
    if options is None or options.unprotected:
        return
    spent = example_epsilon(options, experiment.local, examples, experiment.rounds)
    if spent > MOST_EPSILON:
        raise ConfigError(
            f"privacy.examples: with noise_multiplier {options.noise_multiplier:g} the client with fewest examples "
            f"spends epsilon {spent:.3g} in {experiment.rounds} rounds of {experiment.local.steps} steps; above "
            f"{MOST_EPSILON:g} it promises next to nothing. Write a larger noise_multiplier, a smaller "
            "local.batch_size or fewer rounds; or, to measure all the same, `unprotected: true`."
        )


def told(experiment: Experiment) -> str:
    """Returns a line on what a whole run spends; empty where nothing is protected."""
    found = planned(experiment)
    central = experiment.privacy.central
    if found is None or central is None:
        return ""
    words = (
        f"privacy: epsilon {found['epsilon']:.3g} at delta {found['delta']:g} for a client in the whole run, by "
        f"noise of {found['noise_multiplier']:.3g} x clip and a chance of {found['rate']:.3g} a round "
        f"({central.accountant})"
    )
    return words + ("; void, as noise_seed is given" if central.noise_seed is not None else "")


def sampling_rate(experiment: Experiment) -> float:
    """Returns q, each client's chance to be asked in a round."""
    return experiment.clients.cohort / experiment.clients.count


def _round(rate: float, multiplier: float) -> "DpEvent":
    import dp_accounting as dp

    gaussian = dp.GaussianDpEvent(multiplier)
    return gaussian if rate == 1.0 else dp.PoissonSampledDpEvent(rate, gaussian)


def _accountant(central: Central | Examples) -> "PrivacyAccountant":
    from dp_accounting import NeighboringRelation, pld, rdp

    relation = NeighboringRelation.ADD_OR_REMOVE_ONE
    if central.accountant == "pld":
        return pld.PLDAccountant(relation)
    return rdp.RdpAccountant(neighboring_relation=relation)


def _require() -> None:
    try:
        import dp_accounting  # noqa: F401
    except ImportError as missing:
        raise ConfigError(needs_extra(missing)) from missing


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings of fractional orders whose divergence did not converge: they are left out, which is sound."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
