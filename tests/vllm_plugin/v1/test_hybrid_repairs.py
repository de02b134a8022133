"""Verifiers with Mamba layers in vLLM's model runner V1: each repair beside the fault that it repairs."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support.nemotron_h import save_nemotron_h
from tests.vllm_plugin.hybrid import replaying, run_hybrid

pytestmark = [pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM"), pytest.mark.slow]

SHORT = [4, 5, 6, 4, 5, 6, 4, 5]
# More requests run than the budget of a step has tokens for, once they have drafts.
NARROW: dict[str, Any] = {"lengths": SHORT, "max_num_batched_tokens": 24}
# Blocks run out, and what is read again comes in pieces as small as drafts.
FULL: dict[str, Any] = {
    "lengths": SHORT,
    "max_tokens": 120,
    "max_model_len": 192,
    "max_num_batched_tokens": 16,
    "num_gpu_blocks_override": 72,
}


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_nemotron_h(tmp_path_factory.mktemp("verifier") / "model")


@pytest.fixture(scope="module")
def texts(verifier: Path) -> list[list[int]]:
    """Without drafts, in an engine with room; no text repeats itself."""
    found: list[list[int]] = run_hybrid(verifier, lengths=SHORT, max_tokens=120)["texts"]
    assert all(len(set(text)) > 60 for text in found)
    return found


def ragged(verifier: Path, texts: list[list[int]], **given: Any) -> dict[str, Any]:
    return run_hybrid(verifier, replaying(7), known=texts, drafts="ragged", **given)


def test_request_that_a_step_leaves_out_goes_on_from_its_own_state(verifier: Path, texts: list[list[int]]) -> None:
    expected = [text[: length + 64] for text, length in zip(texts, SHORT, strict=True)]
    found = ragged(verifier, texts, **NARROW)
    assert found["left_out"] > 5 and found["texts"] == expected
    stock = ragged(verifier, texts, **NARROW, without=["keeping_accepted_counts"])
    assert stock["texts"] != expected


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_output_that_is_read_again_after_a_preemption_is_a_prefill(
    verifier: Path, texts: list[list[int]], prefix_caching: bool
) -> None:
    engine = {**FULL, "enable_prefix_caching": prefix_caching}
    found = ragged(verifier, texts, **engine)
    assert found["preemptions"] > 1 and found["told"] > 3 and found["texts"] == texts
    stock = ragged(verifier, texts, **engine, without=["ordering_by_what_rows_do"])
    assert stock["texts"] != texts


def test_padded_prompt_behind_a_short_piece_of_another(verifier: Path) -> None:
    lengths = [5, 33, 40]  # blocks are of 32 tokens: the second time one and eight tokens are not cached
    expected = run_hybrid(verifier, lengths=lengths)["texts"]
    engine: dict[str, Any] = {"lengths": lengths, "enable_prefix_caching": True, "passes": 2}
    found = run_hybrid(verifier, replaying(7), known=expected, drafts="partial", **engine)
    assert found["cached"] == 64 and found["told"] == 1 and found["texts"] == expected
    stock = run_hybrid(
        verifier, replaying(7), known=expected, drafts="partial", without=["ordering_by_what_rows_do"], **engine
    )
    assert stock["texts"] != expected
