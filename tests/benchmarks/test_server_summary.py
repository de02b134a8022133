"""Points of servers under load, and the figures of hand-made ones."""

import json
from dataclasses import asdict, replace

import pytest

from twotower_bench.records import LatencyBound, LoadPoint, Quantiles, System, Traffic, read_row
from twotower_bench.summary import highest_within_bound, summarise_points
from twotower_spec.errors import ArgumentError

NONE, AGAIN = System("none", "no speculation"), System("none_again", "none again (A/A)")
TWO_TOWER = System("twotower", "TwoTower", {"model": "T", "num_speculative_tokens": 15})
FOUR, EIGHT, RATE = Traffic(concurrency=4), Traffic(concurrency=8), Traffic(request_rate=2.0)
SECOND = Quantiles(1.0, 2.0)


def point(
    system: System, traffic: Traffic = FOUR, repeat: int = 0, seconds: float = 2.0, num_good: int = 4
) -> LoadPoint:
    return LoadPoint(
        system=system,
        traffic=traffic,
        repeat=repeat,
        bound=LatencyBound(ttft=500, tpot=50),
        temperature=0.0,
        seconds=seconds,
        num_good=num_good,
        num_output_tokens=100,
        ttft=SECOND,
        tpot=SECOND,
        itl=SECOND,
        e2el=Quantiles(seconds, 2 * seconds),
        num_drafts=10 if system is TWO_TOWER else 0,
        num_accepted_tokens=30 if system is TWO_TOWER else 0,
        texts=("a", "b", "c", "d"),
    )


def rounds(traffic: Traffic, candidate_seconds: float) -> list[LoadPoint]:
    return [
        point(system, traffic, repeat, seconds * (1 + 0.01 * repeat))
        for repeat in range(3)
        for system, seconds in ((NONE, 2.0), (TWO_TOWER, candidate_seconds), (AGAIN, 2.02))
    ]


def test_point_comes_back_from_its_json_line() -> None:
    before = replace(point(TWO_TOWER, RATE), texts=("a", None))
    assert read_row(LoadPoint, json.loads(json.dumps({"index": 3, **asdict(before)}))) == before


def test_rates_of_a_point_follow_from_its_counts() -> None:
    one = replace(point(TWO_TOWER, num_good=2), texts=("a", "b", "c", None))
    assert (one.num_completed, one.num_failed) == (3, 1)
    assert (one.requests_per_s, one.goodput, one.tokens_per_s, one.good_share) == (1.5, 1.0, 50.0, 0.5)


@pytest.mark.parametrize("traffic", [FOUR, RATE])
def test_faster_system_is_called_so_in_closed_and_open_loops(traffic: Traffic) -> None:
    figures = {one.system.name: one for one in summarise_points(rounds(traffic, candidate_seconds=1.0))}
    assert figures["twotower"].speed_up == pytest.approx(2.0)
    assert figures["twotower"].verdict == "faster"
    assert figures["none"].verdict == "-"


def test_speed_up_inside_the_noise_of_the_same_again_is_no_difference() -> None:
    figures = {one.system.name: one for one in summarise_points(rounds(FOUR, candidate_seconds=1.99))}
    assert figures["twotower"].verdict == "no difference"


def test_fewer_than_three_repeats_give_a_ratio_without_a_verdict() -> None:
    both = [point(NONE), point(TWO_TOWER, seconds=1.0)]
    _, ours = summarise_points(both)
    assert ours.speed_up == pytest.approx(2.0)
    assert ours.comparison is None and ours.verdict == "too few repeats"


def test_systems_with_failed_requests_are_not_compared() -> None:
    points = rounds(FOUR, candidate_seconds=1.0)
    failed = [replace(one, texts=("a", "b", "c", None)) if one.repeat == 1 else one for one in points]
    for name in ("none", "twotower", "none_again"):
        mixed = [bad if one.system.name == name else one for one, bad in zip(points, failed, strict=True)]
        ours = next(one for one in summarise_points(mixed) if one.system is TWO_TOWER)
        assert (ours.speed_up, ours.comparison, ours.verdict) == (None, None, "-")


def test_repeats_are_compared_with_the_same_repeat_of_no_speculation() -> None:
    points = [point(NONE, repeat=1, seconds=4.0), point(TWO_TOWER, repeat=0), point(TWO_TOWER, repeat=1, seconds=1.0)]
    assert summarise_points(points)[1].speed_up == pytest.approx(4.0)


def test_acceptance_length_counts_one_token_of_the_verifier_per_draft() -> None:
    none, ours = summarise_points([point(NONE), point(TWO_TOWER)])
    assert none.acceptance_length is None
    assert ours.acceptance_length == 4.0


def test_prompts_with_another_text_are_counted_once_and_failed_ones_not() -> None:
    other = [
        replace(point(TWO_TOWER, repeat=repeat), texts=texts)
        for repeat, texts in enumerate([("a", "B", None, "d"), ("a", "B", "c", "D")])
    ]
    assert summarise_points([point(NONE), *other])[1].num_different == 2


def test_drawn_texts_are_not_compared() -> None:
    none, ours = (replace(point(system), temperature=0.7) for system in (NONE, TWO_TOWER))
    assert [one.num_different for one in summarise_points([none, ours])] == [None, None]


def test_highest_load_is_the_last_with_nine_in_ten_requests_within_the_bound() -> None:
    texts = ("a",) * 10
    points = [
        replace(point(NONE, traffic, num_good=good), texts=texts)
        for traffic, good in ((FOUR, 10), (EIGHT, 9), (Traffic(concurrency=16), 8), (RATE, 0))
    ]
    figures = summarise_points(points)
    assert highest_within_bound(figures, "none", is_closed=True) == EIGHT
    assert highest_within_bound(figures, "none", is_closed=False) is None


def test_load_is_kept_where_every_repeat_keeps_it() -> None:
    texts = ("a",) * 10
    repeats = [
        replace(point(NONE, FOUR, repeat, num_good=good), texts=texts) for repeat, good in enumerate((10, 8, 10))
    ]
    (one,) = summarise_points(repeats)
    assert one.lowest_good_share == 0.8 and one.good_share == 1.0
    assert not one.keeps_bound and highest_within_bound([one], "none", is_closed=True) is None


def test_goodput_is_the_good_share_of_the_requests_per_second() -> None:
    repeats = [point(NONE, FOUR, i, seconds, good) for i, (seconds, good) in enumerate(((1.0, 4), (2.0, 2), (4.0, 3)))]
    (one,) = summarise_points(repeats)
    assert one.goodput.value == pytest.approx(one.good_share * one.requests_per_s.value)


def test_bound_is_read_from_pairs_in_any_order() -> None:
    bound = LatencyBound.parse("tpot:50, ttft:500")
    assert bound == LatencyBound(ttft=500, tpot=50)
    assert bound.pairs == ("ttft:500", "tpot:50")


@pytest.mark.parametrize("text", ["", "ttft", "ttft:fast", "itl:3", "ttft:-1", "ttft:1,ttft:2", "e2el:inf"])
def test_bound_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ArgumentError, match="give ttft, tpot and e2el in milliseconds"):
        LatencyBound.parse(text)


@pytest.mark.parametrize(("concurrency", "rate"), [(None, None), (4, 2.0), (0, None), (None, 0.0), (None, -1.0)])
def test_traffic_is_a_number_of_requests_or_a_rate(concurrency: int | None, rate: float | None) -> None:
    with pytest.raises(ArgumentError, match="give"):
        Traffic(concurrency, rate)
