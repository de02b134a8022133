"""The number of drafts on model runner V2, which is one for the whole batch: as many as the policy plans, or none."""

from importlib.util import find_spec
from typing import Any

import pytest

from tests.vllm_plugin.engine import ROOMY, run_engine, two_tower
from tests.vllm_plugin.model.test_same_text import T
from tests.vllm_plugin.v2.engine import run_v2_engine

pytestmark = [
    pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM"),
    pytest.mark.slow,
]


SETTINGS = two_tower(7, policy="adaptive", block_size=8)


@pytest.fixture(scope="module")
def changing() -> dict[str, Any]:
    settings = {**SETTINGS, "num_speculative_tokens_per_batch_size": [[1, 10, 5]]}
    found: dict[str, Any] = run_v2_engine(["plans_that_change"], settings, **ROOMY)["plans_that_change"]
    return found


def test_steps_verify_what_the_policy_plans_and_the_users_table_allows(changing: dict[str, Any]) -> None:
    assert changing["verified"] == [0, 2, 5]


def test_text_stays_the_verifiers_while_the_number_of_drafts_changes(changing: dict[str, Any]) -> None:
    assert changing["text"] == run_engine(["long_text"], None, **ROOMY)["long_text"]
    assert changing["accepted"] > 50


def test_text_stays_that_of_a_verifier_with_mamba_layers() -> None:
    expected = run_engine(["long_text"], None, **ROOMY, **T)["long_text"]
    found = run_v2_engine(["plans_that_change"], SETTINGS, **ROOMY, **T)["plans_that_change"]
    assert found["text"] == expected and found["accepted"] > 50


def test_where_nothing_is_drafted_nothing_is_verified() -> None:
    found = run_v2_engine(["verified_drafts"], two_tower(7, policy="off"), **ROOMY)["verified_drafts"]
    assert found["verified"] == [0]
    assert found["text"] == run_engine(["long_text"], None, **ROOMY)["long_text"]
