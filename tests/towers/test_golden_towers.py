"""Both towers against the tensors of the published code: logits, single layers, states, time conditioning."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.golden_files import (
    CONTEXT_TOLERANCE,
    DENOISER_TOLERANCE,
    FLOAT64_TOLERANCE,
    NAMES,
    TIME_TOLERANCE,
    golden_model,
    golden_tensors,
)
from twotower_spec.state import ContextState
from twotower_spec.towers import backbone
from twotower_spec.towers.backbone import Backbone, Layer
from twotower_spec.towers.layers import MixtureOfExperts

PRECISIONS = (("float32", None), ("float64", FLOAT64_TOLERANCE))


def new_state(name: str, dtype: str, num_slots: int = 1) -> ContextState:
    model = golden_model(name, dtype)
    return ContextState(model.config, num_slots, 16 * num_slots, model.dtype)


def expected_logits(name: str, dtype: str, file: str) -> dict[str, Tensor]:
    return golden_tensors(name, "logits_float64" if dtype == "float64" else file)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    assert (actual.double() - expected.double()).abs().max().item() <= tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [1, 2, 7, 17, 64])
def test_context_logits_are_those_of_the_published_code(
    name: str, length: int, dtype: str, tolerance: float | None
) -> None:
    ids = golden_tensors(name, "context")[f"ctx.prompt.{length}"].tolist()
    logits = new_state(name, dtype).extend(golden_model(name, dtype).context, {0: ids}, logits="all").logits
    assert logits is not None
    expected = expected_logits(name, dtype, "context")[f"ctx.logits.{length}"]
    assert_close(logits, expected, tolerance or CONTEXT_TOLERANCE)


class Recorder:
    """Records inputs and outputs of every mixer, and the residual stream."""

    def __init__(self, tower: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
        self.mixer_in: dict[int, Tensor] = {}
        self.mixer_out: dict[int, Tensor] = {}
        self.hidden: dict[int, Tensor] = {}
        self.last_stream = torch.empty(0)
        original_mix, original_read = Layer.mix, backbone.read_stream
        layers = set(tower.layers)

        def read_stream(*arguments: Any) -> tuple[Tensor, Tensor]:
            self.last_stream, h = original_read(*arguments)
            return self.last_stream, h

        def mix(layer: Layer, h: Tensor, prefix: object) -> Tensor:
            stream, out = self.last_stream, original_mix(layer, h, prefix)  # type: ignore[arg-type]
            if layer in layers:
                self.hidden[layer.index] = stream
                self.mixer_in[layer.index], self.mixer_out[layer.index] = h, out
            return out

        monkeypatch.setattr(Layer, "mix", mix)
        monkeypatch.setattr(backbone, "read_stream", read_stream)

    def compare(self, golden: dict[str, Tensor], prefix: str, tolerance: float) -> None:
        self.hidden[len(self.mixer_in)] = self.last_stream  # that the final norm read
        compared = 0
        for key, expected in golden.items():
            match = re.fullmatch(re.escape(prefix) + r"\.(hidden|mixer_in|mixer_out)\.(\d+)", key)
            if match:
                actual = getattr(self, match[1])[int(match[2])]
                assert_close(actual.reshape(expected.shape), expected, tolerance)
                compared += 1
        assert compared == len(self.mixer_in) * 3 + 1


@pytest.mark.parametrize("name", NAMES)
def test_every_context_layer_is_that_of_the_published_code(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = golden_tensors(name, "context")
    tower = golden_model(name).context
    recorder = Recorder(tower, monkeypatch)
    new_state(name, "float32").extend(tower, {0: golden["ctx.prompt.17"].tolist()}, logits="all")
    recorder.compare(golden, "ctx_layers.17", CONTEXT_TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_router_chooses_and_weighs_as_the_published_code(name: str) -> None:
    golden = golden_tensors(name, "context")
    compared = 0
    for layer in golden_model(name).context.layers:
        assert isinstance(layer, Layer)
        if isinstance(layer.mixer, MixtureOfExperts):
            ids, weights = layer.mixer.route(golden[f"ctx_layers.17.mixer_in.{layer.index}"][0])
            order = ids.argsort(dim=-1)
            assert torch.equal(ids.gather(-1, order), golden[f"ctx_layers.17.router_ids.{layer.index}"])
            expected = golden[f"ctx_layers.17.router_weights.{layer.index}"]
            assert_close(weights.gather(-1, order), expected, CONTEXT_TOLERANCE)
            compared += 1
    assert compared


def assert_state(state: ContextState, golden: dict[str, Tensor], prefix: str, ssm: str, conv: str) -> None:
    """Compares Mamba states under the given names, and keys and values, of the only request."""
    config = state.config
    keys, values = (state.kv_cache.span([state.entry(0).pages], state.num_computed_tokens(0)).take(cache)
                    for cache in (state.kv_cache.keys, state.kv_cache.values))  # fmt: skip
    for slot, layer in enumerate(config.mamba_layers):
        # The published history is [channels, taps], newest last, and its oldest column is never read.
        assert_close(state.mamba.conv[slot, 0].T, golden[f"{prefix}.{conv}.{layer}"][:, 1:], CONTEXT_TOLERANCE)
        assert_close(state.mamba.ssm[slot, 0], golden[f"{prefix}.{ssm}.{layer}"], CONTEXT_TOLERANCE)
    if ssm == "ssm":
        for slot, layer in enumerate(config.attention_layers):
            assert_close(keys[slot, 0].transpose(0, 1), golden[f"{prefix}.k.{layer}"], CONTEXT_TOLERANCE)
            assert_close(values[slot, 0].transpose(0, 1), golden[f"{prefix}.v.{layer}"], CONTEXT_TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [2, 17])
def test_prefill_state_is_that_of_the_published_code(name: str, length: int) -> None:
    golden, tower = golden_tensors(name, "state"), golden_model(name).context
    prefix = f"state.prompt{length}"
    ids = golden[f"{prefix}.ids"].tolist()
    state = new_state(name, "float32")
    state.extend(tower, {0: ids[:-1]})
    assert_state(state, golden, f"{prefix}.prefill", "s2_ssm", "s2_conv")
    logits = state.extend(tower, {0: ids[-1:]}).logits
    assert logits is not None
    assert_close(logits, golden[f"{prefix}.prefill.logits"], CONTEXT_TOLERANCE)
    assert_state(state, golden, f"{prefix}.prefill", "ssm", "conv")


def extensions() -> Iterator[tuple[str, int, int]]:
    for name in NAMES:
        for key in golden_tensors(name, "state"):
            match = re.fullmatch(r"state\.prompt(\d+)\.ext(\d+)\.ids", key)
            if match:
                yield name, int(match[1]), int(match[2])


@pytest.mark.parametrize("token_by_token", [True, False])
@pytest.mark.parametrize(("name", "length", "extension"), list(extensions()))
def test_extended_state_is_that_of_the_published_code(
    name: str, length: int, extension: int, token_by_token: bool
) -> None:
    golden, tower = golden_tensors(name, "state"), golden_model(name).context
    prefix = f"state.prompt{length}.ext{extension}"
    state = new_state(name, "float32")
    state.extend(tower, {0: golden[f"state.prompt{length}.ids"].tolist()})
    ids = golden[f"{prefix}.ids"].tolist()
    for chunk in [[i] for i in ids] if token_by_token else [ids]:
        logits = state.extend(tower, {0: chunk}).logits
    assert_state(state, golden, f"{prefix}.{'steps' if token_by_token else 'block'}", "ssm", "conv")
    assert logits is not None
    assert_close(logits, golden[f"{prefix}.steps.logits"], CONTEXT_TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_time_conditioning_is_that_of_the_published_code(name: str) -> None:
    golden, time = golden_tensors(name, "time"), golden_model(name).denoiser.time_conditioning
    times = sorted({key.removeprefix("time.").removesuffix(".sinusoid") for key in golden if key.endswith("sinusoid")})
    assert len(times) == 7
    for t in times:
        fraction = torch.tensor([float(t)])
        sinusoid = time.sinusoid(fraction)
        embedded = time.embed(sinusoid)
        assert_close(sinusoid[0], golden[f"time.{t}.sinusoid"], TIME_TOLERANCE)
        assert_close(embedded[0], golden[f"time.{t}.t_embedder"], TIME_TOLERANCE)
        assert_close(time.project(embedded)[0], golden[f"time.{t}.t_block"], TIME_TOLERANCE)
        assert_close(time.shift_scale_gate(fraction)[0], golden[f"time.{t}.shift_scale_gate"], TIME_TOLERANCE)


def denoiser_cases() -> Iterator[tuple[str, str]]:
    for name in NAMES:
        yield from ((name, key[:-3]) for key in golden_tensors(name, "denoiser") if key.endswith(".xt"))


def run_denoiser(name: str, dtype: str, case: str) -> Tensor:
    match = re.fullmatch(r"den\.p(\d+)_L(\d+)_keep\d+_t(none|[\d.]+)", case)
    assert match
    model, state = golden_model(name, dtype), new_state(name, dtype)
    state.extend(model.context, {0: golden_tensors(name, "context")[f"ctx.prompt.{match[1]}"].tolist()})
    block = golden_tensors(name, "denoiser")[f"{case}.xt"][None]
    t = None if match[3] == "none" else torch.tensor([float(match[3])], dtype=torch.float64)
    with torch.inference_mode():
        return model.denoiser.step(block, state.block_context([0], block.shape[1]), t)[0]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize(("name", "case"), list(denoiser_cases()))
def test_denoiser_logits_are_those_of_the_published_code(
    name: str, case: str, dtype: str, tolerance: float | None
) -> None:
    expected = expected_logits(name, dtype, "denoiser")[f"{case}.logits"]
    assert_close(run_denoiser(name, dtype, case), expected, tolerance or DENOISER_TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_every_denoiser_layer_is_that_of_the_published_code(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = golden_tensors(name, "denoiser")
    prefixes = {key.rsplit(".hidden.", 1)[0] for key in golden if ".hidden." in key}
    assert len(prefixes) == 2
    for prefix in prefixes:
        length, kept = map(int, re.findall(r"_L(\d+)_keep(\d+)", prefix)[0])
        case = f"{prefix.replace('den_layers', 'den')}_t{(length - kept) / length}"
        recorder = Recorder(golden_model(name, "float32").denoiser, monkeypatch)
        run_denoiser(name, "float32", case)
        recorder.compare(golden, prefix, DENOISER_TOLERANCE)
        monkeypatch.undo()


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("name", NAMES)
def test_mock_ar_logits_are_those_of_the_published_code(name: str, dtype: str, tolerance: float | None) -> None:
    golden, model = expected_logits(name, dtype, "mock_ar"), golden_model(name, dtype)
    ids = golden_tensors(name, "context")["ctx.prompt.17"].tolist()
    state = new_state(name, dtype)
    state.extend(model.context, {0: ids[:-1]})
    last = ids[-1]
    extra = golden_tensors(name, "mock_ar")["mock.p17.ext_ids"].tolist()
    for i in range(len(extra) + 1):
        with torch.inference_mode():
            logits = model.denoiser.step(torch.tensor([[last]]), state.block_context([0], 1), None)[0]
        expected = golden["mock.p17.logits" if i == 0 else f"mock.p17.ext{i}.logits"]
        assert_close(logits, expected, tolerance or CONTEXT_TOLERANCE)
        if i < len(extra):
            state.extend(model.context, {0: [last]})
            last = extra[i]


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_layers_stay_within_a_few_percent(name: str) -> None:
    # Layer by layer from the golden inputs: whole models in bfloat16 are not comparable (tests/golden/README.md).
    golden, model = golden_tensors(name, "context"), golden_model(name, "bfloat16")
    for layer in model.context.layers:
        assert isinstance(layer, Layer)
        if layer.stateless:
            expected = golden[f"ctx_layers.17.mixer_out.{layer.index}"]
            with torch.inference_mode():
                actual = layer.mixer(golden[f"ctx_layers.17.mixer_in.{layer.index}"].bfloat16())  # type: ignore[operator]
            assert ((actual.float() - expected).norm() / expected.norm()).item() < 4e-2
