"""T drafts for itself: whatever requests ask for, its text is the one that it writes without drafts."""

from importlib.util import find_spec
from typing import Any

import pytest

from tests.vllm_plugin.engine import ROOMY, TIGHT, run_engine
from tests.vllm_plugin.test_same_text import LITTLE_ROOM, PLENTY_OF_ROOM, assert_same_logprobs
from twotower_spec.demo.trio import trio_path

pytestmark = [pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM"), pytest.mark.slow]

T: dict[str, Any] = {"model": str(trio_path("twotower")), "enable_prefix_caching": True}


def itself(num_speculative_tokens: int, **knobs: Any) -> dict[str, Any]:
    """Speculative settings of a verifier that drafts for itself."""
    return {"num_speculative_tokens": num_speculative_tokens, "twotower": {"self": True, "log_interval_s": 0, **knobs}}


@pytest.mark.parametrize(
    ("num_speculative_tokens", "knobs"), [(7, {"policy": "fixed"}), (15, {"policy": "threshold", "steps_per_block": 3})]
)
def test_with_room_for_all(num_speculative_tokens: int, knobs: dict[str, Any]) -> None:
    expected = run_engine(PLENTY_OF_ROOM, None, **T, **ROOMY)
    found = run_engine([*PLENTY_OF_ROOM, "facts"], itself(num_speculative_tokens, **knobs), **T, **ROOMY)
    for name in PLENTY_OF_ROOM:
        if name == "logprobs":
            assert_same_logprobs(found[name], expected[name])
        else:
            assert found[name] == expected[name], name
    facts = found["facts"]
    assert facts["accepted"] > 400 and facts["errors"] == facts["sampler_fallbacks"] == 0


def test_with_little_room() -> None:
    expected = run_engine(LITTLE_ROOM, None, **T, **TIGHT)
    found = run_engine([*LITTLE_ROOM, "facts"], itself(7, policy="fixed"), **T, **TIGHT)
    for name in LITTLE_ROOM:
        assert found[name] == expected[name], name
    assert found["facts"]["accepted"] > 200 and found["facts"]["errors"] == 0
