import numpy as np
import pytest

from twotower_spec.errors import ArgumentError
from twotower_spec.evaluation import Comparison, Estimate, bootstrap_interval, median_and_spread
from twotower_spec.evaluation.statistics import compare_same_repeats, ratio_of_same_repeats
from twotower_spec.training.quality import Acceptance

TIMES = [1.00, 1.02, 0.99, 1.01, 1.03, 0.98, 1.00]


def noisy(generator: np.random.Generator, rounds: int) -> np.ndarray:
    """Times with 2 % of jitter of which 8 % are disturbed."""
    disturbed = np.where(generator.random(rounds) < 0.08, generator.uniform(1.1, 1.6, rounds), 1)
    return generator.lognormal(0, 0.02, rounds) * disturbed


def test_interval_of_a_mean_is_that_of_the_normal_distribution_for_many_values() -> None:
    values = np.random.default_rng(3).normal(5, 2, 1001).tolist()
    interval = bootstrap_interval(values, seed=1)
    assert interval.value == pytest.approx(np.mean(values), rel=1e-12)
    error = 1.96 * np.std(values) / np.sqrt(1001)
    # 1000 resamples place an end within about a tenth of the half width.
    assert interval.low == pytest.approx(interval.value - error, abs=0.1 * error)
    assert interval.high == pytest.approx(interval.value + error, abs=0.1 * error)


def test_a_ratio_of_sums_weighs_long_prompts_more() -> None:
    interval = bootstrap_interval([30, 2, 9], [10, 2, 3])
    assert interval.value == 41 / 15
    assert 1 <= interval.low <= interval.value <= interval.high <= 3
    assert np.mean([3, 1, 3]) < interval.value


def test_the_interval_depends_on_seed_and_level_alone() -> None:
    tokens, steps = [7, 19, 23, 5, 11], [3, 5, 9, 5, 2]
    assert bootstrap_interval(tokens, steps) == bootstrap_interval(tokens, steps)
    assert bootstrap_interval(tokens, steps) != bootstrap_interval(tokens, steps, seed=1)
    narrow, wide = (bootstrap_interval(tokens, steps, confidence_level=level) for level in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize("values", [[3.0], [2.0, 2.0, 2.0]])
def test_values_that_do_not_differ_give_an_interval_without_width(values: list[float]) -> None:
    assert bootstrap_interval(values) == Estimate(values[0], values[0], values[0])


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for i in range(200):
        steps = generator.integers(5, 40, 40)
        tokens = steps * generator.gamma(9, 3 / 9, 40)
        interval = bootstrap_interval(tokens.tolist(), steps.tolist(), num_resamples=300, seed=i)
        covered += interval.low <= 3 <= interval.high
    assert 0.88 <= covered / 200 <= 0.99  # 95 % less what few prompts cost, and four standard errors of 200 trials


@pytest.mark.parametrize(
    ("values", "denominators", "message"),
    [
        ([], None, "give at least one number"),
        ([1.0, float("nan")], None, "values hold nan"),
        ([1.0, 2.0], [1.0], "2 values came with 1 denominators"),
        ([1.0, 2.0], [1.0, 0.0], "denominator 0 is not above 0"),
    ],
)
def test_values_without_an_interval_are_refused(
    values: list[float], denominators: list[float] | None, message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        bootstrap_interval(values, denominators)


@pytest.mark.parametrize(("level", "resamples"), [(95, 1000), (0.0, 1000), (0.95, 0)])
def test_settings_outside_their_range_are_refused(level: float, resamples: int) -> None:
    with pytest.raises(ArgumentError, match="use"):
        bootstrap_interval([1, 2], confidence_level=level, num_resamples=resamples)


def test_one_disturbed_run_moves_neither_median_nor_quartiles_much() -> None:
    calm, disturbed = median_and_spread([*TIMES, 1.0]), median_and_spread([*TIMES, 9.0])
    assert calm.value == 1.0 and calm.has_width
    assert disturbed.value == pytest.approx(1.0, abs=0.01) and disturbed.high < 1.05
    assert median_and_spread([123.456]) == Estimate(123.456, 123.456, 123.456)
    with pytest.raises(ArgumentError, match="at least one"):
        median_and_spread([])


@pytest.mark.parametrize(("factor", "verdict"), [(0.5, "faster"), (2.0, "slower"), (1.0, "no difference")])
def test_verdict_of_a_clear_difference_and_of_none(factor: float, verdict: str) -> None:
    comparison = Comparison.of_seconds(TIMES, [factor * t for t in reversed(TIMES)], TIMES[3:] + TIMES[:3])
    assert comparison.verdict == verdict
    assert comparison.speed_up.value == pytest.approx(1 / factor, rel=0.03)
    assert str(comparison).startswith(f"{verdict}: ")
    assert comparison.to_json()["verdict"] == verdict


def test_a_speed_up_inside_the_noise_floor_is_no_difference() -> None:
    """The candidate is 4 % faster in every round, but so is the baseline when it runs again."""
    comparison = Comparison.of_seconds(TIMES, [t / 1.04 for t in TIMES], [t / 1.05 for t in TIMES])
    assert comparison.speed_up.low > 1
    assert comparison.noise_floor == pytest.approx(1.05, rel=1e-9)
    assert comparison.verdict == "no difference"
    assert str(comparison) == "no difference: 1.04x (95 % interval 1.04x to 1.04x; A/A noise 1.05x, 7 rounds)"


@pytest.mark.parametrize(("rounds", "name"), [(3, "lowest to highest"), (4, "lowest to highest"), (5, "95 % interval")])
def test_interval_of_few_rounds_is_called_what_it_is(rounds: int, name: str) -> None:
    comparison = Comparison.of_seconds(TIMES[:rounds], [t**3 / 2 for t in TIMES[:rounds]], TIMES[:rounds])
    ratios = [t / (t**3 / 2) for t in TIMES[:rounds]]
    assert (comparison.speed_up.low, comparison.speed_up.high) == pytest.approx((min(ratios), max(ratios)))
    assert comparison.interval_name == comparison.to_json()["interval_name"] == name and name in str(comparison)


def test_repeats_are_compared_with_the_same_repeats_alone() -> None:
    baseline, candidate = {0: 1.0, 1: 2.0, 2: 4.0, 3: 8.0, 5: 1.0}, {0: 2.0, 2: 8.0, 3: 16.0, 4: 1.0, 5: 0.0}
    found = compare_same_repeats(baseline, candidate, baseline)
    assert found == Comparison.of_rates([1.0, 4.0, 8.0], [2.0, 8.0, 16.0], [1.0, 4.0, 8.0])
    assert found is not None and found.verdict == "faster"
    assert compare_same_repeats(baseline, candidate, {0: 1.0, 2: 4.0, 4: 1.0}) is None


def test_ratio_is_the_median_of_the_same_repeats() -> None:
    assert ratio_of_same_repeats({0: 2.0, 1: 9.0, 2: 3.0, 4: 4.0}, {0: 1.0, 2: 1.0, 3: 1.0, 4: 1.0}) == 3.0
    assert ratio_of_same_repeats({0: 2.0}, {1: 1.0}) is None


def test_what_slows_a_whole_round_down_is_no_noise() -> None:
    drift = np.linspace(1, 3, 7)
    calm = Comparison.of_seconds(TIMES, [t / 1.2 for t in TIMES], TIMES[::-1])
    drifting = Comparison.of_seconds(
        *((drift * times).tolist() for times in (TIMES, np.array(TIMES) / 1.2, TIMES[::-1]))
    )
    assert drifting.verdict == "faster"
    assert drifting.speed_up.value == pytest.approx(calm.speed_up.value, rel=1e-9)


def test_rates_and_times_tell_the_same() -> None:
    candidate = [t / 1.3 for t in TIMES[::-1]]
    seconds = Comparison.of_seconds(TIMES, candidate, TIMES[::-1])
    rates = Comparison.of_rates(*([100 / t for t in times] for times in (TIMES, candidate, TIMES[::-1])))
    assert rates.verdict == seconds.verdict == "faster"
    assert rates.speed_up.value == pytest.approx(seconds.speed_up.value, rel=1e-9)
    assert rates.noise_floor == pytest.approx(seconds.noise_floor, rel=1e-9)


@pytest.mark.parametrize(("rounds", "most"), [(3, 0.08), (5, 0.04), (10, 0.04)])
def test_equal_systems_are_seldom_called_different(rounds: int, most: float) -> None:
    """Expected are 4 % with three rounds and 1 % from five on; the bounds add about three standard errors."""
    generator = np.random.default_rng(rounds)
    wrong = 0
    for _ in range(200):
        runs = [noisy(generator, rounds).tolist() for _ in range(3)]
        wrong += Comparison.of_seconds(*runs, num_resamples=300).verdict != "no difference"
    assert wrong / 200 <= most


def test_a_difference_above_the_noise_is_found() -> None:
    generator = np.random.default_rng(8)
    found = 0
    for _ in range(100):
        baseline, candidate, again = (noisy(generator, 7) for _ in range(3))
        comparison = Comparison.of_seconds(*(x.tolist() for x in (baseline, candidate / 1.5, again)), num_resamples=300)
        found += comparison.verdict == "faster"
    assert found >= 90


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (([1.0, 2.0], [1.0, 2.0], [1.0, 2.0]), "2 rounds"),
        (([1.0, 2.0, 3.0], [1.0, 2.0], [1.0, 2.0, 3.0]), "are no rounds"),
        (([1.0, 2.0, 0.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]), "baseline holds 0"),
        (([1.0, 2.0, 3.0], [1.0, 2.0, float("inf")], [1.0, 2.0, 3.0]), "candidate hold inf"),
    ],
)
def test_runs_that_are_no_rounds_are_refused(runs: tuple[list[float], ...], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Comparison.of_seconds(*runs)


def test_the_acceptance_length_of_training_has_the_same_interval() -> None:
    tokens, steps = [29, 16, 40, 7, 3], [6, 4, 8, 7, 1]
    interval = bootstrap_interval(tokens, steps)
    acceptance = Acceptance(tokens, steps, [0.5], 0)
    assert acceptance.interval() == (interval.low, interval.high)
    assert acceptance.length == interval.value
    assert Acceptance([], [], [0.0], 0).interval() == (1.0, 1.0)
