"""Recommendations of a sweep: the goal, the floor, the noise, and the flags."""

import json
import shlex
from dataclasses import replace

import pytest

from tests.support.serving_cells import AGAIN, NONE, drafted, repeats, served_cell
from twotower_bench import recommendation
from twotower_bench.engine_flags import engine_flags
from twotower_bench.recommendation import Goal, Recommendation, best_by_concurrency, front_of
from twotower_bench.records import DraftSetting, ServingCell, System
from twotower_bench.report.engines import sweep_section
from twotower_bench.report.reading import Measurements
from twotower_bench.summary import CellSummary, summarise_cells
from twotower_spec.errors import ArgumentError

FAST, OTHER = drafted(DraftSetting(4, 4)), drafted(DraftSetting(8, 8))
SYSTEMS = {"fast": FAST, "other": OTHER}
# Of duration, by repeat.
JITTER = (1.0, 1.01, 0.99, 1.0, 1.005)


def cells(speeds: dict[tuple[str, int], float], jitter: tuple[float, ...] = JITTER) -> list[ServingCell]:
    """Systems by the speed of all users together at a concurrency; no speculation twice."""
    found = []
    for (name, concurrency), speed in speeds.items():
        one = served_cell(NONE, 1, accepted=[()] * 2, num_plain_tokens=11, speed=speed)
        for system in (NONE, AGAIN) if name == "none" else (SYSTEMS[name],):
            # Noise of each system is its own.
            shift = sum(map(ord, system.name)) % len(jitter)
            rounds = repeats(one, [*jitter[shift:], *jitter[:shift]])
            found += [placed(cell, system, concurrency) for cell in rounds]
    return found


def placed(cell: ServingCell, system: System, concurrency: int) -> ServingCell:
    """Places another system; users at once share its speed."""
    requests = tuple(
        replace(one, seconds=one.first_token_s + (one.seconds - one.first_token_s) * concurrency)
        for one in cell.requests
    )
    return replace(cell, system=system, load=replace(cell.load, concurrency=concurrency), requests=requests)


def recommend(measured: list[ServingCell], goal: Goal) -> Recommendation:
    return recommendation.recommend(summarise_cells(measured), goal)


def point_of(measured: list[ServingCell], system: System, concurrency: int) -> CellSummary:
    (found,) = [p for p in summarise_cells(measured) if (p.system, p.load.concurrency) == (system, concurrency)]
    return found


def test_throughput_is_of_all_users_and_latency_of_one() -> None:
    measured = cells({("none", 1): 1.0, ("none", 4): 3.0, ("fast", 1): 2.0, ("fast", 4): 4.0})
    throughput, latency = recommend(measured, Goal("throughput")), recommend(measured, Goal("latency"))
    assert (throughput.point.system, throughput.point.load.concurrency) == (FAST, 4)
    assert (latency.point.system, latency.point.load.concurrency) == (FAST, 1)
    assert throughput.no_speculation.load.concurrency == 4 and latency.no_speculation.load.concurrency == 1
    assert latency.comparison is not None and latency.comparison.verdict == "faster"
    assert "2.00 times as fast" in latency.sentence and "as no speculation" in latency.sentence


def test_named_concurrency_is_the_only_one_that_counts() -> None:
    measured = cells({("none", 1): 1.0, ("none", 4): 3.0, ("fast", 1): 2.0, ("fast", 4): 4.0})
    assert recommend(measured, Goal("throughput", concurrency=1)).point.load.concurrency == 1
    assert recommend(measured, Goal("latency", concurrency=4)).point.load.concurrency == 4


def test_floor_leaves_out_what_is_too_slow_for_one_user() -> None:
    measured = cells({("none", 1): 1.0, ("none", 4): 3.0, ("fast", 1): 2.0, ("fast", 4): 4.0})
    at_4 = point_of(measured, FAST, 4)
    found = recommend(measured, Goal("throughput", min_user_tokens_per_s=1.2 * at_4.user_tokens_per_s.value))
    assert (found.point.system, found.point.load.concurrency) == (FAST, 1)
    none_at_1 = point_of(measured, NONE, 1)
    found = recommend(measured, Goal("throughput", min_user_tokens_per_s=1.2 * none_at_1.user_tokens_per_s.value))
    assert found.point.system == FAST and "no speculation does not reach that" in found.sentence


def test_floor_that_nothing_reaches_gives_the_fastest_for_one_user_and_says_so() -> None:
    found = recommend(cells({("none", 1): 1.0, ("fast", 1): 2.0}), Goal("throughput", min_user_tokens_per_s=1e6))
    assert found.point.system == FAST
    assert found.sentence.startswith("Nothing that was measured gives throughput with 1e+06 tokens/s for every user.")


def test_gain_within_the_noise_is_no_reason_to_speculate() -> None:
    found = recommend(cells({("none", 1): 1.0, ("fast", 1): 1.004}), Goal())
    assert found.point.system == NONE and found.comparison is not None
    assert "cannot be told from noise" in found.sentence and "A/A noise" in found.sentence
    assert found.runners_up == (point_of(cells({("none", 1): 1.0, ("fast", 1): 1.004}), FAST, 1),)
    assert found.serve_command("V", {"max_num_seqs": 8}) == "vllm serve V"
    assert found.python_call("V", {"max_num_seqs": 8}) == "LLM(model='V')"


def test_what_is_slower_is_not_recommended_either() -> None:
    found = recommend(cells({("none", 1): 1.0, ("fast", 1): 0.5}), Goal())
    assert found.point.system == NONE and "is 0.50 times as fast" in found.sentence and found.runners_up == ()


def test_no_speculation_with_more_users_can_be_the_one_to_beat() -> None:
    found = recommend(cells({("none", 1): 1.0, ("none", 8): 5.0, ("fast", 1): 2.0, ("fast", 8): 4.0}), Goal())
    assert (found.point.system, found.point.load.concurrency) == (NONE, 8)


def test_settings_behind_by_less_than_the_noise_are_runners_up_and_the_best_of_several_is_to_be_confirmed() -> None:
    found = recommend(cells({("none", 1): 1.0, ("fast", 1): 2.0, ("other", 1): 1.999}), Goal())
    assert found.point.system == FAST and [one.system for one in found.runners_up] == [OTHER]
    assert found.sentence.endswith("; it is the best of 2, so measure it anew to confirm.")
    apart = recommend(cells({("none", 1): 1.0, ("fast", 1): 2.0, ("other", 1): 1.8}), Goal())
    assert apart.runners_up == ()


def test_no_speculation_is_no_runner_up() -> None:
    found = recommend(cells({("none", 1): 1.0, ("none", 2): 1.999, ("fast", 1): 2.0}), Goal(concurrency=1))
    assert found.runners_up == ()
    found = recommend(cells({("none", 1): 1.0, ("none", 2): 1.0}), Goal())
    assert found.point.system == NONE and found.runners_up == ()
    assert "nothing that speculates was measured" in found.sentence


def test_few_repeats_give_the_fastest_without_a_verdict() -> None:
    found = recommend(cells({("none", 1): 1.0, ("fast", 1): 2.0}, jitter=(1.0, 1.0)), Goal())
    assert found.point.system == FAST and found.comparison is None
    assert "to tell that from noise takes 3 repeats and an A/A run" in found.sentence


def test_flags_can_be_copied_into_a_shell_and_into_python() -> None:
    found = recommend(cells({("none", 1): 1.0, ("fast", 1): 2.0}), Goal())
    arguments = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 16}
    words = shlex.split(found.serve_command("my verifier", arguments))
    assert words[:4] == ["vllm", "serve", "my verifier", "--speculative-config"]
    assert json.loads(words[4]) == FAST.speculative_config
    assert words[5:] == ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    called = eval(found.python_call("my verifier", arguments), {"LLM": dict})
    del arguments["max_num_seqs"]
    assert called == {"model": "my verifier", "speculative_config": FAST.speculative_config, **arguments}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (True, ["--an-option"]),
        (False, ["--no-an-option"]),
        (None, []),
        (0.5, ["--an-option", "0.5"]),
        ({"a": [True]}, ["--an-option", '{"a": [true]}']),
        (["a", 1, {"b": 2}], ["--an-option", "a", "1", '{"b": 2}']),
    ],
)
def test_arguments_are_flags_of_a_command_line(value: object, words: list[str]) -> None:
    assert engine_flags({"an_option": value}) == words


def test_floor_limits_the_users_at_once() -> None:
    measured = cells({("none", 1): 1.0, ("none", 4): 3.0, ("fast", 1): 2.0, ("fast", 4): 4.0})
    found = recommend(measured, Goal("throughput", min_user_tokens_per_s=1.0))
    assert found.serve_command("V", {"max_num_seqs": 64}).endswith("}' --max-num-seqs 4")
    assert found.python_call("V", {"max_num_seqs": 64}).endswith("}, max_num_seqs=4)")


def test_front_has_the_points_that_are_beaten_in_neither() -> None:
    measured = cells({("none", 1): 1.0, ("none", 4): 3.0, ("fast", 1): 2.0, ("fast", 4): 4.0, ("other", 4): 3.5})
    front = [(one.system, one.load.concurrency) for one in front_of(summarise_cells(measured))]
    assert front == [(FAST, 1), (FAST, 4)]


def test_best_is_found_at_every_concurrency() -> None:
    measured = cells({("none", 1): 1.0, ("none", 4): 3.0, ("fast", 1): 2.0, ("fast", 4): 2.5})
    found = [(one.point.load.concurrency, one.point.system) for one in best_by_concurrency(summarise_cells(measured))]
    assert found == [(1, FAST), (4, NONE)]


def test_temperatures_are_kept_apart() -> None:
    measured, other = cells({("none", 1): 1.0, ("fast", 1): 2.0}), cells({("none", 1): 4.0, ("fast", 1): 3.0})
    warm = [replace(cell, load=replace(cell.load, temperature=0.7)) for cell in other]
    sentences = [
        one for one in sweep_section(Measurements("", serving_cells=[*measured, *warm])).notes if "For " in one
    ]
    assert [one.partition(": ")[2].partition(" at ")[0] for one in sentences] == [FAST.title] * 2 + [NONE.title] * 2


def test_load_that_was_not_measured_without_speculation_is_refused() -> None:
    with pytest.raises(ArgumentError, match="not measured at concurrency 2; known are concurrencies 1"):
        recommend(cells({("none", 1): 1.0, ("fast", 1): 2.0}), Goal(concurrency=2))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"name": "speed"}, "goal 'speed' is not allowed; give one of throughput, latency"),
        ({"concurrency": 0}, "concurrency 0 is not allowed"),
        ({"min_user_tokens_per_s": 0}, "min_user_tokens_per_s 0 is not allowed"),
        ({"name": "latency", "min_user_tokens_per_s": 5}, "has no meaning for the goal latency"),
    ],
)
def test_bad_goal_is_refused(change: dict[str, object], named: str) -> None:
    with pytest.raises(ArgumentError, match=named):
        Goal(**change)  # type: ignore[arg-type]
