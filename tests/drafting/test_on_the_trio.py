"""The bundled models together, in float32: the verifier's text to the token, and blocks that are accepted."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.drafting.models import greedy_texts
from twotower_spec.demo import held_out_prompts, trio_directory
from twotower_spec.drafting import AdaptivePolicy, DraftingSession, FixedPolicy, ThresholdPolicy, shared_token_ids
from twotower_spec.drafting import speculative_loop as decode
from twotower_spec.drafting.policies import DraftPolicy
from twotower_spec.generation.sampling import Sampler
from twotower_spec.training.evaluation import Trio

ROOT = Path(__file__).parents[2]


@cache
def trio() -> Trio:
    return Trio(trio_directory())


@cache
def prompts() -> list[list[int]]:
    rows = [row.prompt for category in ("maths", "python", "real") for row in held_out_prompts(category)[::30]]  # type: ignore[arg-type]
    return [list(ids) for ids in trio().tokenizer(rows)["input_ids"]]


@cache
def expected_texts() -> list[list[int]]:
    return greedy_texts(trio().verifier, prompts(), 64, eos=2)


def test_drafter_and_verifier_share_all_their_tokens() -> None:
    assert shared_token_ids(trio().tokenizer, trio().tokenizer, 2048, 2048) == 2048


@pytest.mark.parametrize(
    "policy", [FixedPolicy(8, 1), ThresholdPolicy(), AdaptivePolicy()], ids=lambda p: type(p).__name__
)
def test_greedy_text_is_that_of_generate(policy: DraftPolicy) -> None:
    drafter = DraftingSession(trio().towers, policy, num_slots=len(prompts()))
    result = decode(trio().verifier, drafter, prompts(), 64, eos_token_id=2)
    assert result.token_ids == expected_texts()
    if isinstance(policy, FixedPolicy):
        assert result.summary.acceptance_length > 2.5


def test_coupled_text_of_a_seed_is_the_same_with_and_without_drafts() -> None:
    sampler = Sampler(0.7, top_p=0.95)
    plain = decode(trio().verifier, None, prompts(), 48, sampler, "coupled", 2, seed=7)
    for noise in ("private", "shared"):
        drafter = DraftingSession(trio().towers, FixedPolicy(8, 1), sampler=sampler, noise=noise)  # type: ignore[arg-type]
        result = decode(trio().verifier, drafter, prompts(), 48, sampler, "coupled", 2, seed=7)
        assert result.token_ids == plain.token_ids


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_self_verified_text_is_that_of_ar(temperature: float) -> None:
    options = {"temperature": temperature, "eos_token_id": 2, "seed": 1}
    expected = trio().towers.generate_ar(prompts(), 96, **options)
    result = trio().towers.generate_self_speculative(prompts(), 96, **options)
    assert result.token_ids == expected.token_ids
    assert (result.tokens_per_context_pass or 0) > 2


def test_the_example_prints_text_and_figures() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "speculative.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "The answer is" in done.stdout and "tokens per verifier pass" in done.stdout
