"""`LLM(model=T)`: vLLM loads the context tower of a TwoTower checkpoint, and its text is the tower's own."""

from importlib.util import find_spec

import pytest
import torch

from tests.vllm_plugin.engine import ROOMY, run_engine
from twotower_spec import TwoTowerModel
from twotower_spec.checkpoint import find_tokenizer
from twotower_spec.demo.trio import held_out_prompts, trio_path

pytestmark = [pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM"), pytest.mark.slow]

T = str(trio_path("twotower"))
END = 2


def prompts(count: int) -> list[list[int]]:
    """Prompts of the scenarios, as token ids."""
    maths, python = held_out_prompts("maths"), held_out_prompts("python")
    texts = [one.prompt for pair in zip(maths, python, strict=False) for one in pair][:count]
    tokenizer = find_tokenizer(T)
    return [tokenizer.encode(text) for text in texts]


@pytest.fixture(scope="module")
def own_text() -> list[list[int]]:
    """Text of `generate_ar` for the requests of the scenario `plain_text`."""
    model = TwoTowerModel.from_pretrained(T, dtype=torch.float32)
    return model.generate_ar(prompts(4), max_new_tokens=40, eos_token_id=END).token_ids


def test_text_is_the_context_towers(own_text: list[list[int]]) -> None:
    found = run_engine(["plain_text"], model=T, **ROOMY)["plain_text"]
    assert [row[0] for row in found] == own_text


def test_text_is_the_same_where_it_drafts_for_itself(own_text: list[list[int]]) -> None:
    settings = {"num_speculative_tokens": 7, "twotower": {"policy": "fixed", "self": True}}
    found = run_engine(["plain_text", "facts"], settings, model=T, **ROOMY)
    assert [row[0] for row in found["plain_text"]] == own_text
    assert found["facts"]["accepted"] > 20 and found["facts"]["errors"] == 0
