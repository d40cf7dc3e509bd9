"""Where every random number comes from: (run seed, purpose, round, client), hashed.

No generator of this project is shared between purposes and no library-wide seed is ever set, so a result does not
depend on which process computed it, in which order, or how often something else drew a number.
"""

import hashlib

import numpy as np


def derive_seed(seed: int, purpose: str, *parts: int) -> int:
    """Returns a 63-bit seed that is a pure function of the run seed, a purpose such as "batches", and integers."""
    text = ":".join([str(seed), purpose, *map(str, parts)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, purpose: str, *parts: int) -> np.random.Generator:
    """Returns a NumPy generator seeded with `derive_seed(seed, purpose, *parts)`."""
    return np.random.default_rng(derive_seed(seed, purpose, *parts))
