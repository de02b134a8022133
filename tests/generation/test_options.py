"""Options are made once: defaults of the mode, refusals, and the published calls that make them."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest

from tests.support.builders import random_ids, tiny_model
from twotower_spec import ArgumentError, TwoTowerModel
from twotower_spec.generation import MODES, GenerationOptions, Mode

BLOCKS = {"block_size": 5, "steps_per_block": 3, "confidence_threshold": 0.15}
# Names, order and defaults of modeling_nemotron_twotower.py.
PUBLISHED_BLOCKS = {
    "max_new_tokens": 128,
    "block_size": 16,
    "steps_per_block": 16,
    "mask_token_id": None,
    "temperature": 0.0,
    "top_k": None,
    "confidence_threshold": 0.9,
    "eos_token_id": None,
    "step_callback": None,
}
PUBLISHED_ONE_BY_ONE = {"max_new_tokens": 128, "temperature": 0.0, "top_k": None, "top_p": None, "eos_token_id": None}


@pytest.mark.parametrize("mode", list(Mode))
def test_a_call_and_its_options_generate_the_same(mode: Mode) -> None:
    model, blocks = tiny_model(), BLOCKS if mode in (Mode.MASK_DIFFUSION, Mode.SELF_SPECULATIVE) else {}
    prompts = [random_ids(5), random_ids(17, seed=1)]
    common: dict[str, Any] = {"max_new_tokens": 9, "temperature": 0.8, "eos_token_id": [4, 9], "seed": [7, 1], **blocks}
    called = getattr(model, f"generate_{mode.replace('-', '_')}")(prompts, **common)
    assert model.generate(prompts, GenerationOptions(mode, **common)).token_ids == called.token_ids


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("generate_ar", PUBLISHED_ONE_BY_ONE),
        ("generate_mock_ar", PUBLISHED_ONE_BY_ONE),
        ("generate_mask_diffusion", PUBLISHED_BLOCKS),
    ],
)
def test_published_arguments_keep_their_order_and_defaults(name: str, published: dict[str, Any]) -> None:
    parameters = list(inspect.signature(getattr(TwoTowerModel, name)).parameters.values())[2:]
    positional = {one.name: one.default for one in parameters if one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert list(positional.items()) == list(published.items())


def test_every_mode_has_an_entry() -> None:
    assert list(MODES) == list(Mode)


@pytest.mark.parametrize("mode", list(Mode))
def test_modes_that_need_no_denoiser_run_without_it(mode: Mode) -> None:
    alone = TwoTowerModel(tiny_model().config, tiny_model().dtype, with_denoiser=False)
    alone.context.load_state_dict(tiny_model().context.state_dict())
    if MODES[mode].needs_denoiser:
        with pytest.raises(ArgumentError, match="has no denoiser"):
            alone.stream([[5]], GenerationOptions(mode, max_new_tokens=3))
    else:
        assert len(alone.generate([[5]], GenerationOptions(mode, max_new_tokens=3)).token_ids[0]) == 3


def test_what_is_left_out_is_the_default_of_the_mode() -> None:
    options = [GenerationOptions(mode) for mode in Mode]
    assert [(one.block_size, one.steps_per_block, one.confidence_threshold) for one in options] == [
        (None, None, None),
        (None, None, None),
        (16, 16, 0.8),
        (8, 1, None),
    ]


@pytest.mark.parametrize("mode", list(Mode))
def test_options_survive_json_and_hash_like_their_equals(mode: Mode) -> None:
    options = GenerationOptions(mode, max_new_tokens=7, eos_token_id={2}, seed=[1, 2])
    again = GenerationOptions(**json.loads(json.dumps(options.to_json())))
    assert again == options and hash(again) == hash(options)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "tree"}, "mode 'tree' is not known; give one of ar, mock-ar, mask-diffusion, self-speculative"),
        ({"mode": "ar", "block_size": 8}, "mode ar denoises no blocks"),
        ({"mode": "mock-ar", "confidence_threshold": 0.5}, "mode mock-ar denoises no blocks"),
        ({"mode": "mask-diffusion", "block_size": 0}, "block_size 0"),
        ({"mode": "self-speculative", "steps_per_block": True}, "steps_per_block True"),
        ({"mode": "mask-diffusion", "confidence_threshold": 1.5}, "confidence_threshold 1.5"),
        ({"mode": "mask-diffusion", "mask_token_id": -1}, "mask_token_id -1"),
        ({"mode": "ar", "max_new_tokens": -1}, "max_new_tokens -1"),
        ({"mode": "ar", "temperature": -0.1}, "temperature -0.1"),
    ],
)
def test_options_out_of_range_are_refused_with_their_value(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        GenerationOptions(**values)
