"""Settings of a sweep: none twice, each asked for as the plugin understands it."""

from itertools import product

import pytest

from twotower_bench.grid import draft_settings, knobs_of, speculative_config, system_of
from twotower_bench.records import DraftSetting
from twotower_spec.errors import ArgumentError
from vllm_twotower.config import DrafterKnobs, adaptive_block_sizes


def test_one_step_is_swept_once_whatever_gamma_and_policy() -> None:
    found = draft_settings(None, [0.5, 0.8], [8], [1], ["fixed", "threshold"])
    assert found == [DraftSetting(8, 8, 1, "fixed", None)]


def test_several_steps_are_swept_with_every_gamma() -> None:
    found = draft_settings(None, [0.5, 0.8], [8], [1, 4], ["threshold"])
    assert [(one.policy, one.steps_per_block, one.confidence_threshold) for one in found] == [
        ("fixed", 1, None),
        ("threshold", 4, 0.5),
        ("threshold", 4, 0.8),
    ]


def test_more_steps_than_positions_are_no_other_setting() -> None:
    assert draft_settings(None, [0.8], [8], [8, 16], ["threshold"]) == [DraftSetting(8, 8, 8, "threshold", 0.8)]


def test_drafts_are_those_of_the_whole_block_or_as_many_as_asked_for_at_most() -> None:
    assert [one.num_speculative_tokens for one in draft_settings(None, block_sizes=[4, 16])] == [4, 16]
    assert [one.num_speculative_tokens for one in draft_settings(7, block_sizes=[4, 16])] == [4, 7]


@pytest.mark.parametrize(("block_size", "drafts"), product((2, 3, 4, 6, 8, 12, 16, 20, 32), (1, 3, 4, 5, 7, 8, 15, 16)))
def test_adaptive_tries_the_blocks_that_it_would_have_tried_with_the_block_size_as_given(
    block_size: int, drafts: int
) -> None:
    (setting,) = draft_settings(drafts, block_sizes=[block_size], policies=["adaptive"])
    most = setting.num_speculative_tokens
    assert adaptive_block_sizes(setting.block_size, most) == adaptive_block_sizes(block_size, drafts)
    assert setting.block_size == max(adaptive_block_sizes(block_size, drafts))


def test_adaptive_with_larger_blocks_than_hold_the_drafts_is_swept_once() -> None:
    assert len(draft_settings(7, [0.8], [8, 16, 32], [4], ["adaptive"])) == 1


def test_every_setting_has_a_name_of_its_own_and_knobs_that_the_plugin_takes() -> None:
    found = [
        setting
        for first_token in ("context", "denoiser")
        for drafts in (3, None)
        for setting in draft_settings(
            drafts, [0.5, 0.85], [4, 16], [1, 4, 16], ["fixed", "threshold", "adaptive"], first_token
        )
    ]
    systems = [system_of(setting, "T") for setting in found]
    assert len({system.name for system in systems}) == len(set(found))
    for system, setting in zip(systems, found, strict=True):
        assert system.setting == setting and system.speculative_config is not None
        knobs = DrafterKnobs.parse({"model": "T", **system.speculative_config["twotower"]})
        knobs.check_num_speculative_tokens(system.speculative_config["num_speculative_tokens"], 16)
        policy = knobs.policy_for(setting.num_speculative_tokens, 16)
        assert policy.num_speculative_tokens >= setting.num_speculative_tokens
        assert policy.most_steps == setting.steps_per_block


def test_names_say_what_differs() -> None:
    assert system_of(DraftSetting(8, 8), "T").name == "fixed-S8-1"
    assert system_of(DraftSetting(16, 16, 4, "threshold", 0.8), "T").name == "threshold-S16-4-g0.8"
    assert system_of(DraftSetting(7, 16, 2, "adaptive", 0.8, "denoiser"), "T").name == "adaptive-S16-K7-2-g0.8-denoiser"


def test_configuration_names_model_drafts_and_knobs() -> None:
    setting = DraftSetting(8, 16, 4, "threshold", 0.8)
    assert speculative_config(setting, "T") == {
        "model": "T",
        "num_speculative_tokens": 8,
        "twotower": {
            "policy": "threshold",
            "block_size": 16,
            "steps_per_block": 4,
            "confidence_threshold": 0.8,
            "first_token": "context",
        },
    }
    assert "confidence_threshold" not in knobs_of(DraftSetting(8, 8))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"gammas": []}, "gammas is empty"),
        ({"policies": ["off"]}, "policy 'off' is not allowed; give one of fixed, threshold, adaptive"),
        ({"first_token": "verifier"}, "first_token 'verifier' is not allowed"),
        ({"gammas": [1.5]}, "confidence_threshold 1.5"),
        ({"block_sizes": [0]}, "block_size 0 is not allowed"),
        ({"steps": [0]}, "steps_per_block 0 is not allowed"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens 0 is not allowed"),
    ],
)
def test_bad_grid_is_refused_with_the_value(change: dict[str, object], named: str) -> None:
    with pytest.raises(ArgumentError, match=named):
        draft_settings(**change)  # type: ignore[arg-type]
