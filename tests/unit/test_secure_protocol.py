"""Secure aggregation, all sides in this process: exact sums, whoever drops out when; and nothing else to be seen."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, ks_2samp, kstest

from hfedmoe_ray.trust.secure.client import Participant, Revealed, own_mask, shared_mask
from hfedmoe_ray.trust.secure.field import PRIME, joined, split
from hfedmoe_ray.trust.secure.keys import digest, secrets_of
from hfedmoe_ray.trust.secure.masks import Ring, add_mask, ring_dtype
from hfedmoe_ray.trust.secure.server import Sum
from hfedmoe_ray.trust.secure.session import BelowThreshold, Block, Refused, Roster, Session, threshold_of
from hfedmoe_ray.trust.secure.vault import Vault

Arrays = list[np.ndarray]


class Memory:
    """Remembers as a vault does, in memory."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, str], bytes] = {}

    def __call__(self, session: Session, step: str, request: bytes) -> None:
        if self.known.setdefault((session.name, step), request) != request:
            raise Refused(f"it has answered another request for '{step}'")


class Cohort:
    """Clients that take part in one session, up to the step at which each is gone."""

    def __init__(self, clients: Collection[int], threshold: int, ring: Ring = 32, number: int = 1) -> None:
        self.session = Session(number=number, threshold=threshold, ring=ring)
        self.clients = {
            client: Participant(client, digest(b"root %d" % client), self.session, Memory()) for client in clients
        }
        self.roster: Roster = {client: one.advertise() for client, one in self.clients.items()}
        self.letters: dict[int, dict[int, bytes]] = {}

    def share(self, present: Collection[int]) -> None:
        self.letters = {client: self.clients[client].share(self.roster) for client in sorted(present)}

    @property
    def present(self) -> list[int]:
        return sorted(self.letters)

    def masked(self, client: int, blocks: list[Block], plain: Arrays) -> Arrays:
        values = [numbers.copy() for numbers in plain]
        self.clients[client].mask(self.roster, self.present, blocks, values)
        return values

    def reveal(self, client: int, arrived: Collection[int]) -> Revealed:
        inbox = {sender: letters[client] for sender, letters in self.letters.items() if client != sender}
        return self.clients[client].reveal(self.roster, self.present, arrived, inbox)

    def sum(self, blocks: list[Block], plain: Mapping[int, Arrays], answering: Collection[int]) -> Arrays:
        """What the server has in the end, of those in `plain`."""
        total = Sum(self.session, blocks)
        for client, values in plain.items():
            total.add(client, self.masked(client, blocks, values))
        revealed = {client: self.reveal(client, total.arrived) for client in answering}
        return total.unmask(self.roster, self.present, revealed)


def numbers(rng: np.random.Generator, ring: Ring, blocks: list[Block], client: int) -> Arrays:
    """Any numbers of the ring."""
    dtype = ring_dtype(ring)
    return [
        rng.integers(0, 2**ring, size=block.size if client in block.members else 0, dtype=np.uint64).astype(dtype)
        for block in blocks
    ]


def plain_sum(ring: Ring, blocks: list[Block], plain: Mapping[int, Arrays]) -> Arrays:
    totals = [np.zeros(block.size, ring_dtype(ring)) for block in blocks]
    for values in plain.values():
        for total, one in zip(totals, values, strict=True):
            if len(one):
                np.add(total, one, out=total)
    return totals


@settings(max_examples=25, deadline=None)
@given(data=st.data(), ring=st.sampled_from([32, 64]), count=st.integers(3, 8), seed=st.integers(0, 2**32))
def test_the_sum_is_exact_whoever_drops_out_at_any_step_or_nothing_comes_of_it(
    data: st.DataObject, ring: Ring, count: int, seed: int
):
    """Clients leave after keys, after shares or after their vectors; blocks belong to any of them."""
    clients = data.draw(st.lists(st.integers(0, 1000), min_size=count, max_size=count, unique=True))
    left = {client: data.draw(st.sampled_from(["keys", "shares", "masked", "", "", "", ""])) for client in clients}
    threshold = threshold_of(data.draw(st.sampled_from([0.51, 0.6, 0.8])), count)
    shared = [client for client in clients if left[client] != "keys"]
    delivered = [client for client in shared if left[client] != "shares"]
    answering = [client for client in delivered if left[client] != "masked"]
    members = [frozenset(clients), *(frozenset(data.draw(st.sets(st.sampled_from(clients)))) for _ in range(3))]
    # As the server makes them: blocks whose sum would be one client's own are not asked for.
    blocks = [Block(size=n, members=m) for n, m in zip((5, 7, 3, 2), members, strict=True) if len(m & {*shared}) > 1]
    cohort = Cohort(clients, threshold, ring)
    cohort.share(shared)
    rng = np.random.default_rng(seed)
    plain = {client: numbers(rng, ring, blocks, client) for client in delivered}
    if min(len(shared), len(answering)) < threshold:
        with pytest.raises(BelowThreshold):
            cohort.sum(blocks, plain, answering)
        return
    for found, expected in zip(cohort.sum(blocks, plain, answering), plain_sum(ring, blocks, plain), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("gone", [0, 0.1, 0.2, 0.3, 0.4])
def test_up_to_two_fifths_of_thirty_clients_may_be_gone(gone: float):
    clients = range(30)
    block = [Block(size=1000, members=frozenset(clients))]
    cohort = Cohort(clients, threshold_of(0.6, 30), 64)
    cohort.share(clients)
    rng = np.random.default_rng(0)
    here = sorted(rng.permutation(30)[: round(30 * (1 - gone))].tolist())
    plain = {client: numbers(rng, 64, block, client) for client in here}
    np.testing.assert_array_equal(cohort.sum(block, plain, here)[0], plain_sum(64, block, plain)[0])
    with pytest.raises(BelowThreshold, match="only 17 clients answered for the masks, and 18 must"):
        Cohort.sum(cohort, block, plain, here[:17])


INPUTS = {
    "zeros": np.zeros,
    "ones": lambda size: np.full(size, 2**32 - 1),
    "small": lambda size: np.arange(size) % 7,
    "normal": lambda size: np.abs(np.random.default_rng(3).normal(0, 1000, size)),
}


def test_a_masked_vector_is_indistinguishable_from_uniform_whatever_it_hides():
    """p-values of one test for each vector and statistic; at 10^-4 each, some 1 in 600 lists of seeds would fail."""
    size = 50_000
    blocks = [Block(size=size, members=frozenset(range(3)))]
    masked = {}
    for name, made in INPUTS.items():
        cohort = Cohort(range(3), 2)
        cohort.share(range(3))
        masked[name] = cohort.masked(1, blocks, [made(size).astype(np.uint32)])[0]
        seen = masked[name].view(np.uint8)
        assert chisquare(np.bincount(seen, minlength=256)).pvalue > 1e-4, name
        assert kstest(masked[name] / 2**32, "uniform").pvalue > 1e-4, name
        ones = int(np.unpackbits(seen).sum())
        assert abs(ones - 16 * size) < 4 * np.sqrt(8 * size), name  # 32 bits a number, variance 1/4 a bit
        neighbours = np.corrcoef(masked[name][:-1], masked[name][1:])[0, 1]
        assert abs(neighbours) < 4 / np.sqrt(size), name
    assert ks_2samp(masked["zeros"], masked["normal"]).pvalue > 1e-4
    # The mask of another session is another one: nothing is learned from the difference of two rounds.
    again = Cohort(range(3), 2, number=2)
    again.share(range(3))
    difference = again.masked(1, blocks, [np.zeros(size, np.uint32)])[0] - masked["zeros"]
    assert chisquare(np.bincount(difference.view(np.uint8), minlength=256)).pvalue > 1e-4


def test_the_statistics_tell_what_is_not_masked():
    """The checks of the test before can fail: what one mask alone does not hide, they find."""
    seen = INPUTS["normal"](50_000).astype(np.uint32).view(np.uint8)
    assert chisquare(np.bincount(seen, minlength=256)).pvalue < 1e-12


def test_either_mask_alone_hides_a_vector():
    """Of a client that is gone after its upload the server may learn one secret: the other mask is still on."""
    blocks = [Block(size=20_000, members=frozenset(range(3)))]
    cohort = Cohort(range(3), 2)
    cohort.share(range(3))
    zeros = [np.zeros(20_000, np.uint32)]
    total = Sum(cohort.session, blocks)
    total.add(0, cohort.masked(0, blocks, zeros))
    total.add(1, cohort.masked(1, blocks, zeros))
    revealed = {client: cohort.reveal(client, {0, 1}) for client in (0, 1)}
    assert not total.unmask(cohort.roster, cohort.present, revealed)[0].any()
    # It arrives after the server has put its key together, and takes off what it shares with others.
    late = cohort.masked(2, blocks, zeros)[0]
    (secret,) = joined([{client + 1: one.masks[2] for client, one in revealed.items()}], 2)
    for other in (0, 1):
        add_mask(late, shared_mask(secret, cohort.roster[other], cohort.session), 0, 1)
    assert chisquare(np.bincount(late.view(np.uint8), minlength=256)).pvalue > 1e-4
    add_mask(late, own_mask(secrets_of(digest(b"root 2"), cohort.session.name).seed), 0, -1)
    assert not late.any(), "nothing else was on it"


@given(st.binary(min_size=31, max_size=31), st.integers(2, 6), st.integers(0, 4), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_any_threshold_of_shares_gives_the_secret_and_fewer_fit_every_secret(secret, threshold, more, random):
    points = random.sample(range(1, 200), threshold + more)
    polynomial = [random.randrange(PRIME) for _ in range(threshold - 1)]
    shares = split(secret, polynomial, points)
    some = dict(random.sample(sorted(shares.items()), threshold))
    assert joined([some, shares], threshold) == [secret, secret]
    missing = some.popitem()[0]
    with pytest.raises(ValueError, match="are needed"):
        joined([some], threshold)
    # For any other secret there is a share that would complete the same ones: so they tell nothing.
    other = bytes(31) if any(secret) else bytes([1] * 31)
    completed = _completed(some, other, missing)
    assert joined([some | {missing: completed}], threshold) == [other]


def _completed(shares: Mapping[int, bytes], secret: bytes, point: int) -> bytes:
    """The share at a point of the polynomial through these shares and a secret at 0."""
    known = {0: int.from_bytes(secret, "big")} | {x: int.from_bytes(y, "big") for x, y in shares.items()}
    value = 0
    for x, y in known.items():
        part = y
        for other in known.keys() - {x}:
            part = part * (point - other) * pow(x - other, -1, PRIME) % PRIME
        value += part
    return (value % PRIME).to_bytes(32, "big")


def test_a_client_never_reveals_both_secrets_of_another():
    cohort = Cohort(range(4), 3)
    cohort.share(range(4))
    answer = cohort.reveal(0, {0, 1, 2})
    assert sorted(answer.seeds) == [0, 1, 2]
    assert sorted(answer.masks) == [3]
    assert cohort.reveal(0, {0, 1, 2}) == answer
    with pytest.raises(Refused, match="another request"):
        cohort.reveal(0, {0, 1, 2, 3})
    with pytest.raises(BelowThreshold):
        cohort.reveal(1, {1, 2})


def test_a_client_refuses_what_would_show_its_numbers():
    everyone = frozenset(range(4))
    cohort = Cohort(range(4), 3)
    cohort.share(range(3))
    zeros, ones = np.zeros(4, np.uint32), np.ones(4, np.uint32)
    with pytest.raises(Refused, match="nobody else adds to"):
        cohort.masked(0, [Block(size=4, members=frozenset({0, 3}))], [zeros])  # 3 has not shared
    cohort.masked(0, [Block(size=4, members=everyone)], [zeros])
    with pytest.raises(Refused, match="another request"):
        cohort.masked(0, [Block(size=4, members=everyone)], [ones])
    with pytest.raises(Refused, match="half of the clients"):
        Cohort(range(4), 2).share(range(4))
    foreign = Cohort(range(4), 3, number=7).roster
    with pytest.raises(Refused, match="its keys are not those"):
        cohort.clients[0].share(foreign)
    doubled = {**cohort.roster, 3: cohort.roster[2]}
    with pytest.raises(Refused, match="same public key"):
        cohort.clients[0].share(doubled)


def test_a_letter_or_a_share_that_was_changed_is_found_out():
    blocks = [Block(size=4, members=frozenset(range(3)))]
    cohort = Cohort(range(3), 2)
    cohort.share(range(3))
    plain = {client: [np.ones(4, np.uint32)] for client in range(2)}
    total = Sum(cohort.session, blocks)
    for client, values in plain.items():
        total.add(client, cohort.masked(client, blocks, values))
    with pytest.raises(ValueError, match="added before"):
        total.add(0, plain[0])
    with pytest.raises(ValueError, match="4 numbers of uint32"):
        total.add(2, [np.ones(5, np.uint32)])
    letters = cohort.letters[1][0]
    cohort.letters[1][0] = letters[:-1] + bytes([letters[-1] ^ 1])
    with pytest.raises(ValueError, match="letter of client 1 cannot be read"):
        cohort.reveal(0, {0, 1})
    cohort.letters[1][0] = letters
    answers = {client: cohort.reveal(client, {0, 1}) for client in range(2)}
    seeds = {**answers[0].seeds, 1: bytes(32)}
    with pytest.raises(ValueError, match=r"do not belong together|not the seed of client 1"):
        total.unmask(cohort.roster, cohort.present, answers | {0: Revealed(seeds=seeds, masks=answers[0].masks)})


def test_what_a_client_keeps_is_its_users_alone_and_outlives_its_process(tmp_path: Path):
    directory = tmp_path / "secrets"
    vault = Vault(directory, 7)
    root = vault.root()
    assert Vault(directory, 7).root() == root != Vault(directory, 8).root()
    session = Session(number=5, threshold=2, ring=32)
    vault.remember(session, "reveal", b"one")
    Vault(directory, 7).remember(session, "reveal", b"one")
    with pytest.raises(Refused, match="another request for 'reveal'"):
        Vault(directory, 7).remember(session, "reveal", b"two")
    vault.remember(Session(number=6, threshold=2, ring=32), "reveal", b"two")
    with pytest.raises(Refused, match="later session"):
        vault.remember(session, "reveal", b"one")
    with pytest.raises(Refused, match="is not here"):
        vault.kept(session)
    blocks = [np.arange(3, dtype=np.uint32), np.zeros(0, np.uint32)]
    vault.keep(session, blocks)
    again = Vault(directory, 7).kept(replace(session, purpose="values"))
    assert [block.tolist() for block in again] == [[0, 1, 2], []]
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in directory.iterdir()} == {0o600}
