"""T drafts for itself: whatever requests ask for, its text is the one that it writes without drafts."""

from importlib.util import find_spec
from typing import Any

import pytest

from tests.vllm_plugin.engine import ROOMY, run_engine
from tests.vllm_plugin.test_pairs_of_features import ENGINE, GREEDY, SAMPLED, differences
from tests.vllm_plugin.test_same_text import LITTLE_ROOM, PLENTY_OF_ROOM, assert_same_logprobs
from twotower_spec.demo.trio import trio_path

pytestmark = [
    pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM"),
    pytest.mark.slow,
    pytest.mark.usefixtures("mamba_layers"),
]

T: dict[str, Any] = {"model": str(trio_path("twotower")), "enable_prefix_caching": True}


def itself(num_speculative_tokens: int, **knobs: Any) -> dict[str, Any]:
    """Speculative settings of a verifier that drafts for itself."""
    return {"num_speculative_tokens": num_speculative_tokens, "twotower": {"self": True, "log_interval_s": 0, **knobs}}


@pytest.mark.parametrize(
    ("num_speculative_tokens", "knobs", "names"),
    [
        (7, {"policy": "fixed"}, PLENTY_OF_ROOM),
        (15, {"policy": "threshold", "steps_per_block": 3}, ["joining_and_leaving", "lengths", "structured_outputs"]),
    ],
)
def test_with_room_for_all(num_speculative_tokens: int, knobs: dict[str, Any], names: list[str]) -> None:
    expected = run_engine(PLENTY_OF_ROOM, None, **T, **ROOMY)
    found = run_engine([*names, "facts"], itself(num_speculative_tokens, **knobs), **T, **ROOMY)
    for name in names:
        if name == "logprobs":
            assert_same_logprobs(found[name], expected[name])
        else:
            assert found[name] == expected[name], name
    facts = found["facts"]
    assert facts["accepted"] > 200 and facts["errors"] == facts["sampler_fallbacks"] == 0


@pytest.fixture(scope="module")
def drafting() -> dict[str, Any]:
    settings = itself(7, policy="fixed", verification="coupled")
    return run_engine([*LITTLE_ROOM, GREEDY, SAMPLED, "strain", "facts"], settings, **T, **ENGINE)


def test_with_little_room_requests_get_what_they_get_without_speculation(drafting: dict[str, Any]) -> None:
    expected = run_engine([*LITTLE_ROOM, GREEDY], None, **T, **ENGINE)
    for name in LITTLE_ROOM:
        assert drafting[name] == expected[name], name
    assert differences(drafting[GREEDY], expected[GREEDY]) == []
    facts = drafting["facts"]
    assert facts["accepted"] > 1000 and facts["errors"] == facts["sampler_fallbacks"] == 0
    assert drafting["strain"]["preemptions"] > 0 and drafting["strain"]["hits"] > 0


def test_requests_with_a_seed_get_what_they_get_without_drafts(drafting: dict[str, Any]) -> None:
    off = run_engine([SAMPLED], itself(7, policy="off", verification="coupled"), **T, **ENGINE)
    assert differences(drafting[SAMPLED], off[SAMPLED]) == []
