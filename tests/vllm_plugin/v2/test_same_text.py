"""Model runner V2 with drafts writes what V1 writes without: greedy token by token, and one text for a seed.

Asynchronous scheduling is on. Whatever requests do in `tests/vllm_plugin/test_same_text.py` they do here.
"""

from importlib.util import find_spec
from typing import Any

import pytest

from tests.vllm_plugin.engine import ROOMY, TIGHT, digest, run_engine, two_tower
from tests.vllm_plugin.test_same_text import LITTLE_ROOM, PLENTY_OF_ROOM, assert_same_logprobs
from tests.vllm_plugin.v2.engine import run_v2_engine

pytestmark = [
    pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM"),
    pytest.mark.slow,
]

COUNTS = "accepted_after_the_end"


@pytest.fixture(scope="module")
def roomy() -> dict[str, Any]:
    settings = two_tower(7, policy="fixed", block_size=8, verification="coupled")
    return run_v2_engine(
        [*PLENTY_OF_ROOM, "seeded_samples", COUNTS, "host_reads", "facts", "runner"], settings, timeout_s=580, **ROOMY
    )


@pytest.mark.timeout(700)
def test_greedy_text_with_room_for_all(roomy: dict[str, Any], record_property: Any) -> None:
    expected = run_engine(PLENTY_OF_ROOM, None, **ROOMY)
    for name in PLENTY_OF_ROOM:
        if name == "logprobs":
            assert_same_logprobs(roomy[name], expected[name])
        else:
            assert roomy[name] == expected[name], name
    record_property("greedy", digest(roomy["batches"]))
    facts = roomy["facts"]
    assert roomy["runner"] == {"module": "vllm.v1.worker.cpu.model_runner", "async_scheduling": True}
    assert facts["accepted"] > 400 and facts["errors"] == facts["sampler_fallbacks"] == 0
    assert facts["held"] <= 1


def test_the_host_reads_nothing_of_a_step_before_it_is_over(roomy: dict[str, Any]) -> None:
    assert roomy["host_reads"]["steps"] > 5
    assert roomy["host_reads"]["reads"] == []


def test_accepted_drafts_are_those_that_vllm_counts_and_those_of_steps_after_the_end(roomy: dict[str, Any]) -> None:
    counts = roomy[COUNTS]
    # A step is scheduled before vLLM has looked whether the one before it ended a request, and leaves it out then.
    assert counts["steps"] > 0 and counts["vllm"] > 200
    assert counts["ours"] == counts["vllm"] + counts["after_end"]


def test_a_seed_gives_one_text_on_both_runners(roomy: dict[str, Any], record_property: Any) -> None:
    off = run_engine(["seeded_samples"], two_tower(15, verification="coupled", policy="off"), **ROOMY)
    *texts, logprobs, alone = roomy["seeded_samples"]
    *texts_off, logprobs_off, alone_off = off["seeded_samples"]
    assert texts == texts_off and alone == alone_off
    record_property("seeded", digest(texts))
    assert_same_logprobs([[rows] for rows in logprobs], [[rows] for rows in logprobs_off])


def test_greedy_text_with_little_room() -> None:
    expected = run_engine(LITTLE_ROOM, None, **TIGHT)
    found = run_v2_engine([*LITTLE_ROOM, "facts"], two_tower(15, policy="fixed"), **TIGHT)
    for name in LITTLE_ROOM:
        assert found[name] == expected[name], name
    facts = found["facts"]
    assert facts["accepted"] > 300 and facts["errors"] == facts["sampler_fallbacks"] == 0
    assert facts["prefilling"] > 0
