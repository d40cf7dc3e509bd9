"""Secure aggregation: the server learns the sum of what clients send, and of no client what it sent.

The double-masking protocol of Bonawitz et al. (CCS 2017) against a server that follows it and is curious
("semi-honest"): no signatures, no consistency check, so a server that lies about who is there can learn more.

    keys      every client sends two public keys                                            U1: who did
    shares    and, encrypted to each other one, shares of its two secrets                   U2: who did
    masked    its vector + a mask of its own + one mask for each other client of U2,
              which that one subtracts                                                      U3: who did
    reveal    for each of U3 a share of its own mask's seed; for each other one of U2,
              whose masks nobody subtracted, a share of its key's seed. Never both.         at least the threshold

A round does this twice: first clients' participation in each expert is counted, then the updates of those experts are
added up that enough clients took part in.

`field` shares secrets, `keys` agrees on them, `masks` stretches them, `client` and `server` are the two sides, `vault`
keeps what a client must not forget, `fixed_point` writes numbers into a ring, `layout` an update into a vector, and
`aggregate` reads the sum of them. Nothing here knows of rounds or Ray.
"""
