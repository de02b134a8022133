"""Both towers against a second implementation, over geometries that the golden fixtures do not have."""

from copy import deepcopy
from typing import Any

import pytest
import torch

from tests.support.builders import random_ids, tiny_model
from tests.support.plain_model import PlainTower
from tests.support.tolerances import FLOAT32_MODEL, FLOAT64
from twotower_spec import TwoTowerModel
from twotower_spec.state import ContextState
from twotower_spec.towers.backbone import Layer

GEOMETRIES: dict[str, dict[str, Any]] = {
    "every kind of layer": {},
    "no bias after the convolution": {"use_conv_bias": False},
    "one tap": {"conv_kernel": 1},
    "two taps": {"conv_kernel": 2},
    "five taps": {"conv_kernel": 5},
    "weights of experts not normalised": {"norm_topk_prob": False},
    "experts in groups": {"n_routed_experts": 12, "n_group": 3, "topk_group": 2, "num_experts_per_tok": 5},
    "one kv head": {"num_key_value_heads": 1},
    "as many kv heads as heads": {"num_key_value_heads": 6},
    "one Mamba group": {"n_groups": 1},
    "as many groups as Mamba heads": {"n_groups": 4},
    "no attention": {"hybrid_override_pattern": "MEM-"},
    "no Mamba": {"hybrid_override_pattern": "*E*-"},
    "attention last": {"hybrid_override_pattern": "ME*"},
    "experts only": {"hybrid_override_pattern": "E-"},
}


def new_state(model: TwoTowerModel) -> ContextState:
    return ContextState(model.config, 1, 8, model.dtype)


def with_uneven_routing(model: TwoTowerModel) -> TwoTowerModel:
    """A copy whose correction biases change the choice of experts; a random model has zeros there."""
    model = deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    for name, tensor in model.checkpoint_tensors():
        if name.endswith("e_score_correction_bias"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return model


@pytest.mark.parametrize("changes", GEOMETRIES.values(), ids=GEOMETRIES.keys())
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", FLOAT64), ("float32", FLOAT32_MODEL)])
def test_context_tower_is_what_the_formulas_say(changes: dict[str, Any], dtype: str, tolerance: float) -> None:
    model, ids = with_uneven_routing(tiny_model(dtype, **changes)), random_ids(21)
    state = new_state(model)
    first = state.extend(model.context, {0: ids[:8]}, logits="all").logits
    second = state.extend(model.context, {0: ids[8:]}, logits="all").logits
    expected = PlainTower(model, "context_tower").run(ids, {}, t=None, causal=True)
    assert first is not None and second is not None
    assert (torch.cat([first, second]) - expected).abs().max().item() < tolerance


@pytest.mark.parametrize("changes", GEOMETRIES.values(), ids=GEOMETRIES.keys())
@pytest.mark.parametrize("t", [0.75, None])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", FLOAT64), ("float32", FLOAT32_MODEL)])
def test_denoiser_tower_is_what_the_formulas_say(
    changes: dict[str, Any], t: float | None, dtype: str, tolerance: float
) -> None:
    model, ids = with_uneven_routing(tiny_model(dtype, **changes)), random_ids(13)
    block = [3, *random_ids(2, seed=1), 3, 3]
    state = new_state(model)
    state.extend(model.context, {0: ids})
    with torch.inference_mode():
        times = None if t is None else torch.tensor([t])
        logits = model.denoiser.step(torch.tensor([block]), state.block_context([0], len(block)), times)[0]
    memory: dict[int, list[torch.Tensor]] = {}
    PlainTower(model, "context_tower").run(ids, memory, t=None, causal=True)
    expected = PlainTower(model, "denoiser_tower").run(block, memory, t=t, causal=False)
    assert (logits - expected).abs().max().item() < tolerance


@pytest.mark.parametrize(("residual_in_fp32", "expected"), [(False, torch.bfloat16), (True, torch.float32)])
def test_residual_stream_has_the_configured_dtype_and_mixers_the_models(
    residual_in_fp32: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("bfloat16", residual_in_fp32=residual_in_fp32)
    streams, inputs = [], []
    forward, mix = Layer.forward, Layer.mix

    def watch_stream(layer: Layer, x: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        stream, branch = forward(layer, x, *args)
        streams.extend([x.dtype, stream.dtype])
        return stream, branch

    def watch_mixer(layer: Layer, h: torch.Tensor, *args: Any) -> torch.Tensor:
        inputs.append(h.dtype)
        return mix(layer, h, *args)

    monkeypatch.setattr(Layer, "forward", watch_stream)
    monkeypatch.setattr(Layer, "mix", watch_mixer)
    model.generate_mask_diffusion([random_ids(6)], max_new_tokens=4, block_size=4, steps_per_block=2)
    assert set(streams) == {expected}
    assert set(inputs) == {torch.bfloat16}


def test_bfloat16_rounds_the_time_before_the_sinusoid() -> None:
    time = tiny_model("bfloat16").denoiser.time_conditioning
    # 1000 * 15/16 = 937.5 is 936 in bfloat16 (ARCHITECTURE: published behaviour).
    expected = torch.cos(torch.tensor(936.0)).bfloat16()
    assert torch.equal(time.sinusoid(torch.tensor([15 / 16]))[0, 0], expected)


def test_towers_can_be_placed_on_equal_devices() -> None:
    model = TwoTowerModel.from_config(tiny_model().config)
    assert model.place_towers_on_devices("cpu", "cpu") is model
    assert model.context.device == model.denoiser.device == torch.device("cpu")
