"""Points that no other point beats in both coordinates."""

from __future__ import annotations

from collections.abc import Sequence


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that are not dominated, by their first coordinate, smallest first.

    Larger is better in both. A point is dominated by one that is at least as good in both and better in one, so that
    equal points all stay.

    Args:
        points: any number.
    """
    # The best first coordinate first: each point needs to be compared only with the best second one so far.
    order = sorted(range(len(points)), key=lambda index: points[index], reverse=True)
    front: list[int] = []
    for index in order:
        if not front or points[index][1] > points[front[-1]][1] or points[index] == points[front[-1]]:
            front.append(index)
    return front[::-1]
