"""Verifiers with Mamba-2 layers on model runner V2: texts are those that V1 writes without drafts.

V2 keeps how many drafts were accepted by request, and tells a text that is read again from drafts, so that none of the
repairs of V1 is needed there.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support.nemotron_h import save_nemotron_h
from tests.vllm_plugin.engine import TIGHT, run_engine, two_tower
from tests.vllm_plugin.fork_server import V2_ON_CPU
from tests.vllm_plugin.hybrid import run_hybrid
from tests.vllm_plugin.model.test_same_text import T, itself
from tests.vllm_plugin.test_same_text import LITTLE_ROOM
from tests.vllm_plugin.v2.engine import run_v2_engine
from twotower_spec.config import TwoTowerConfig
from twotower_spec.demo.trio import trio_path

pytestmark = [
    pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM"),
    pytest.mark.slow,
]


def test_a_checkpoint_that_drafts_for_itself_with_little_room() -> None:
    names = [*LITTLE_ROOM, "prefix_cache"]
    expected = run_engine(names, None, **T, **TIGHT)
    settings: dict[str, Any] = itself(7, policy="fixed", verification="coupled")
    # Three requests of six fit into a step: the others are left out of it, and go on from what they had accepted.
    found = run_v2_engine([*names, "strain", "facts"], settings, **T, **{**TIGHT, "max_num_batched_tokens": 24})
    for name in names:
        assert found[name] == expected[name], name
    facts = found["facts"]
    assert facts["accepted"] > 500 and facts["errors"] == facts["sampler_fallbacks"] == 0
    assert found["strain"]["preemptions"] > 0 and found["strain"]["hits"] > 0
    assert (
        "a context tower of its own beside the verifier's: the state of this model runner is not read" in found["log"]
    )


def test_drafts_for_a_verifier_on_two_ranks(tmp_path: Path) -> None:
    vocabulary = TwoTowerConfig.from_pretrained(str(trio_path("twotower"))).vocab_size
    verifier = save_nemotron_h(tmp_path / "verifier", vocabulary=vocabulary)
    expected = run_hybrid(verifier, max_tokens=24)["texts"]
    settings = two_tower(7, policy="fixed")
    found = run_hybrid(verifier, settings, V2_ON_CPU, max_tokens=24, tensor_parallel_size=2)
    assert found["texts"] == expected and found["drafted"] > 1000
