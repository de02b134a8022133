"""`vllm serve T` and `LLM(model=T)`: vLLM loads the context tower of a TwoTower checkpoint, whose text it writes."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from tests.vllm_plugin.engine import ROOMY, run_engine
from tests.vllm_plugin.server import serving
from twotower_spec import TwoTowerModel
from twotower_spec.checkpoint import find_tokenizer
from twotower_spec.demo.trio import held_out_prompts, trio_path

pytestmark = [
    pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM"),
    pytest.mark.slow,
    pytest.mark.usefixtures("mamba_layers"),
]

T = str(trio_path("twotower"))
END = 2


def prompts(count: int) -> list[list[int]]:
    """Prompts of the scenarios, as token ids."""
    maths, python = held_out_prompts("maths"), held_out_prompts("python")
    texts = [one.prompt for pair in zip(maths, python, strict=False) for one in pair][:count]
    tokenizer = find_tokenizer(T)
    return [tokenizer.encode(text) for text in texts]


@pytest.fixture(scope="module")
def model() -> TwoTowerModel:
    return TwoTowerModel.from_pretrained(T, dtype=torch.float32)


@pytest.fixture(scope="module")
def own_text(model: TwoTowerModel) -> list[list[int]]:
    """Text of `generate_ar` for the requests of the scenario `plain_text`."""
    return model.generate_ar(prompts(4), max_new_tokens=40, eos_token_id=END).token_ids


def test_text_is_the_context_towers(own_text: list[list[int]]) -> None:
    found = run_engine(["plain_text"], model=T, **ROOMY)["plain_text"]
    assert [row[0] for row in found] == own_text


@pytest.mark.parametrize("arguments", [(), ("--spec-method", "twotower", "--spec-tokens", "7")])
def test_served_over_http(arguments: tuple[str, ...], own_text: list[list[int]]) -> None:
    from openai import OpenAI

    with serving(*arguments, "--max-num-seqs", "8", model=T) as server:
        client = OpenAI(base_url=server.endpoint.url + "/v1", api_key="none")
        found = client.completions.create(
            model=T, prompt=prompts(4), temperature=0, max_tokens=40, extra_body={"return_token_ids": True}
        )
        counted = client.with_options(base_url=server.endpoint.url).get("/metrics", cast_to=str)
    assert [choice.token_ids for choice in found.choices] == own_text
    assert ("vllm:twotower_accepted_tokens_total" in counted) == bool(arguments)


@pytest.mark.parametrize("knobs", [{"policy": "off"}, {"policy": "fixed"}])
def test_a_seed_gives_the_text_of_generate_ar(knobs: dict[str, Any], model: TwoTowerModel) -> None:
    """With coupled verification, whose noise is generate_ar's; vLLM's own sampler draws from the same distribution."""
    settings = {"num_speculative_tokens": 7, "twotower": {"self": True, "verification": "coupled", **knobs}}
    found = run_engine(["seeded_samples"], settings, model=T, **ROOMY)["seeded_samples"]
    cases: list[tuple[int, dict[str, Any]]] = [
        (11, {"temperature": 0.8}),
        (12, {"temperature": 1.1, "top_k": 20}),
        (13, {"temperature": 1.0, "top_p": 0.9}),
    ]
    for rows, (seed, sampling) in zip(found, cases, strict=False):
        own = model.generate_ar(prompts(4), max_new_tokens=40, eos_token_id=END, seed=[seed] * 4, **sampling)
        assert [row[0] for row in rows] == own.token_ids, sampling
    for prompt, samples in zip(prompts(4), found[4], strict=True):  # n is 3, each sample with the next seed
        own = model.generate_ar([prompt] * 3, max_new_tokens=40, eos_token_id=END, seed=15, temperature=0.9)
        assert samples == own.token_ids
