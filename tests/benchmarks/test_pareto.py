"""Points that none other beats in both coordinates."""

from hypothesis import given
from hypothesis import strategies as st

from twotower_bench.pareto import pareto_front

COORDINATE = st.integers(0, 6).map(float)


def test_front_goes_from_the_smallest_first_coordinate_to_the_largest() -> None:
    assert pareto_front([(3, 1), (1, 3), (2, 2), (1, 1), (2, 1)]) == [1, 2, 0]


def test_equal_points_all_stay_and_those_equal_in_one_coordinate_do_not() -> None:
    assert sorted(pareto_front([(2, 2), (2, 2), (2, 1), (1, 2)])) == [0, 1]


def test_no_points_have_no_front() -> None:
    assert pareto_front([]) == []


@given(st.lists(st.tuples(COORDINATE, COORDINATE), max_size=12))
def test_a_point_is_on_the_front_unless_another_is_at_least_as_good_in_both_and_better_in_one(
    points: list[tuple[float, float]],
) -> None:
    def beaten(point: tuple[float, float]) -> bool:
        return any(other != point and other[0] >= point[0] and other[1] >= point[1] for other in points)

    front = pareto_front(points)
    assert sorted(front) == [i for i, point in enumerate(points) if not beaten(point)]
    assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)
