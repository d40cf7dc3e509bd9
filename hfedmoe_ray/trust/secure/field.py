"""Shamir's secret sharing over the field of 2^255 - 19: any `threshold` shares give the secret, fewer give nothing."""

from collections.abc import Mapping, Sequence

PRIME = 2**255 - 19
SECRET_BYTES = 31
"""What is shared is always less than the prime."""
SHARE_BYTES = 32


def split(secret: bytes, coefficients: Sequence[int], points: Sequence[int]) -> dict[int, bytes]:
    """Returns a share of a secret for each point.

    Args:
        secret: `SECRET_BYTES` bytes.
        coefficients: threshold - 1 uniform elements of the field.
        points: Distinct, from 1 on (at 0 lies the secret).
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret of {len(secret)} bytes cannot be shared; it must have {SECRET_BYTES}")
    polynomial = [int.from_bytes(secret, "big"), *coefficients]
    return {point: _at(polynomial, point).to_bytes(SHARE_BYTES, "big") for point in points}


def joined(shares: Sequence[Mapping[int, bytes]], threshold: int) -> list[bytes]:
    """Returns the secrets behind several sets of shares.

    Args:
        shares: For each secret, the share of each point.
        threshold: As many as were needed when it was split.

    Raises:
        ValueError: A secret has too few shares, or they belong to none.
    """
    # Mostly the same clients have answered for all of them.
    known: dict[tuple[int, ...], list[int]] = {}
    secrets = []
    for one in shares:
        points = tuple(sorted(one)[:threshold])
        if len(points) < threshold:
            raise ValueError(f"{len(points)} shares of a secret, of which {threshold} are needed")
        if points not in known:
            known[points] = _at_zero(points)
        value = sum(
            factor * int.from_bytes(one[point], "big") for factor, point in zip(known[points], points, strict=True)
        )
        value %= PRIME
        if value >> (8 * SECRET_BYTES):
            raise ValueError("the shares of a secret do not belong together")
        secrets.append(value.to_bytes(SECRET_BYTES, "big"))
    return secrets


def _at(polynomial: Sequence[int], point: int) -> int:
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * point + coefficient) % PRIME
    return value


def _at_zero(points: Sequence[int]) -> list[int]:
    """Lagrange's factors: what each point's value counts at 0."""
    factors = []
    for point in points:
        above, below = 1, 1
        for other in points:
            if other != point:
                above = above * other % PRIME
                below = below * (other - point) % PRIME
        factors.append(above * pow(below, -1, PRIME) % PRIME)
    return factors
