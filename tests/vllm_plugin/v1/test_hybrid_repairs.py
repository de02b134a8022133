"""Verifiers with Mamba layers in vLLM's model runner V1: each repair beside the fault that it repairs."""

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.nemotron_h import save_nemotron_h
from tests.vllm_plugin.hybrid import replaying, run_hybrid

pytestmark = pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM")

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
def verifier(tmp_path_factory: pytest.TempPathFactory, mamba_layers: None) -> Path:
    return save_nemotron_h(tmp_path_factory.mktemp("verifier") / "model")


@pytest.fixture(scope="module")
def texts(verifier: Path) -> list[list[int]]:
    """Without drafts, in an engine with room; no text repeats itself."""
    found: list[list[int]] = run_hybrid(verifier, lengths=SHORT, max_tokens=120)["texts"]
    assert all(len(set(text)) > 60 for text in found)
    return found


def ragged(verifier: Path, texts: list[list[int]], **given: Any) -> dict[str, Any]:
    return run_hybrid(verifier, replaying(7), known=texts, drafts="ragged", **given)


@pytest.mark.slow
def test_request_that_a_step_leaves_out_goes_on_from_its_own_state(verifier: Path, texts: list[list[int]]) -> None:
    expected = [text[: length + 64] for text, length in zip(texts, SHORT, strict=True)]
    found = ragged(verifier, texts, **NARROW)
    assert found["left_out"] > 5 and found["texts"] == expected
    stock = ragged(verifier, texts, **NARROW, without=["keeping_accepted_counts"])
    assert stock["texts"] != expected


@pytest.mark.slow
@pytest.mark.parametrize("prefix_caching", [False, True])
def test_output_that_is_read_again_after_a_preemption_is_a_prefill(
    verifier: Path, texts: list[list[int]], prefix_caching: bool
) -> None:
    engine = {**FULL, "enable_prefix_caching": prefix_caching}
    found = ragged(verifier, texts, **engine)
    assert found["preemptions"] > 1 and found["told"] > 3 and found["texts"] == texts
    stock = ragged(verifier, texts, **engine, without=["ordering_by_what_rows_do"])
    assert stock["texts"] != texts


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("num_prompt_tokens", "num_tokens", "drafts", "uniform"),
    [(4, 8, [], False), (4, 8, [1] * 7, None), (33, 8, [-1] * 7, None), (33, 8, [], None)],
    ids=["read again", "drafts", "padded prompt", "piece of a prompt"],
)
def test_only_what_is_read_again_stays_out_of_graphs_of_uniform_decoding(
    num_prompt_tokens: int, num_tokens: int, drafts: list[int], uniform: bool | None
) -> None:
    """A stub of the runner: there are no CUDA graphs on a CPU."""
    from vllm_twotower.v1.hybrid_repairs import ordering_by_what_rows_do, running_prefill_as_such

    computed = 20 if num_prompt_tokens < 20 else num_prompt_tokens - 1
    request = SimpleNamespace(num_prompt_tokens=num_prompt_tokens, num_computed_tokens=computed, num_tokens=40)
    runner = SimpleNamespace(
        model_config=SimpleNamespace(is_hybrid=True),
        num_spec_tokens=7,
        requests={"one": request},
        input_batch=SimpleNamespace(req_id_to_index={"one": 0}, num_prompt_tokens=[num_prompt_tokens]),
    )
    step = SimpleNamespace(
        num_scheduled_tokens={"one": num_tokens}, scheduled_spec_decode_tokens={"one": drafts} if drafts else {}
    )
    ordering_by_what_rows_do(lambda self, scheduler_output: None)(runner, step)
    assert runner.input_batch.num_prompt_tokens == [num_prompt_tokens]
    asked = running_prefill_as_such(lambda self, **kwargs: kwargs.get("force_uniform_decode"))(runner, num_reqs=1)
    assert asked is uniform
