"""Sums, differences, products and quotients in the form that worked answers have them, to learn calculating from."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

LINES = 12
LARGEST = 160
LARGEST_FACTOR = 12


def arithmetic_documents(count: int, seed: int) -> Iterator[str]:
    """Documents of calculations; document i does not depend on `count`."""
    for i in range(count):
        rng = Random(f"{seed}/arithmetic/{i}")
        yield "Calculate:\n" + "".join(_calculation(rng) + "\n" for _ in range(LINES))


def _calculation(rng: Random) -> str:
    sign = rng.choice("++--*/")
    if sign in "*/":
        left, right = rng.randint(2, LARGEST_FACTOR), rng.randint(2, LARGEST_FACTOR)
        product = left * right
        return f"{left} * {right} = {product}" if sign == "*" else f"{product} / {left} = {right}"
    # In word problems one of the numbers is mostly small.
    small, large = rng.randint(2, rng.choice((12, 60))), rng.randint(3, LARGEST)
    if sign == "+":
        left, right = rng.sample((small, large), 2)
        return f"{left} + {right} = {left + right}"
    larger, smaller = max(large, small + 1), min(large, small)
    return f"{larger} - {smaller} = {larger - smaller}"
