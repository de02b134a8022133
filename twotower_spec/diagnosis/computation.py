"""Computation: results of this machine's ops on the drafter's own weights, beside the references of the kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from twotower_kernels.block_scan import pool_scan
from twotower_kernels.block_scan.op import LONG_SCAN
from twotower_kernels.block_scan.reference import block_scan_reference
from twotower_kernels.experts.reference import route_tokens_reference
from twotower_kernels.time_modulation import rms_norm
from twotower_kernels.time_modulation.reference import modulate_reference, rms_norm_reference
from twotower_spec.checkpoint.shards import read_in_place
from twotower_spec.config import MLP, MOE, accumulation_dtype
from twotower_spec.diagnosis.case import Case
from twotower_spec.diagnosis.finding import Finding
from twotower_spec.diagnosis.sample import Sample
from twotower_spec.state import ContextState
from twotower_spec.state.transfer import moved
from twotower_spec.towers.backbone import Backbone, Layer
from twotower_spec.towers.layers import Mamba2, MixtureOfExperts
from twotower_spec.towers.model import TwoTowers

# Errors relative to the norm of what is right. The orders of sums differ; in narrow dtypes each rounds on its own.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-2}
# Those of many layers one after the other; a state that is lost makes another text of it.
STACK_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 1e-1}
ROUTER_TOLERANCE = 1e-9
# Tokens of the two parts of a sequence; the second one on CUDA is scanned by a library, where there is one.
PARTS, LONG_PARTS = (17, 24), (24, LONG_SCAN)
# Of the whole tower: a prompt in pieces, and a single token, which convolutions and states know best.
CONTEXT_PARTS = (PARTS, (40, 1))
NUM_TOKENS = 64
OF_KERNELS = "set TWOTOWER_KERNELS=torch; if that mends it, report the GPU and the versions of torch and triton"
OF_TORCH = "run it with another version of torch; if that mends it, report both"
OF_WEIGHTS = "download the checkpoint again: numbers that are too large come from its weights, or from a narrow dtype"

note = partial(Finding, "computation")


@torch.inference_mode()
def examine(case: Case) -> Iterator[Finding]:
    """Looks at scans, modulation, routers and the whole context tower, on the devices that serve them."""
    sample = case.sample
    for name, tower in (("context tower", sample.towers.context), ("denoiser", sample.towers.denoiser)):
        layers = [layer for layer in tower.layers if isinstance(layer, Layer)]
        scans = [layer for layer in layers if isinstance(layer.mixer, Mamba2)]
        if scans:
            yield _scans(name, tower, scans)
        routers = [layer for layer in layers if isinstance(layer.mixer, MixtureOfExperts)]
        if routers:
            yield _routers(name, tower, routers, _stored_routers(case, sample, name, routers))
    yield _modulation(sample)
    yield _context_in_parts(sample)


def _scans(name: str, tower: Backbone, layers: list[Layer]) -> Finding:
    """Scans from a state that is carried: two parts one after the other must be the reference's whole."""
    worst = 0.0
    for layer in layers:
        mixer = layer.mixer
        assert isinstance(mixer, Mamba2)
        parts = LONG_PARTS if tower.device.type == "cuda" and layer is layers[0] else PARTS
        _, u, delta = mixer.project(_hidden(tower, layer, sum(parts)))
        u, delta, weights = u[None], delta[None], mixer.scan_weights
        taps, wide = weights.conv_weight.shape[1], accumulation_dtype(tower.dtype)
        heads, head_dim = delta.shape[-1], mixer.widths[0] // delta.shape[-1]
        state_size = (mixer.widths[1] - mixer.widths[0]) // (2 * mixer.num_groups)
        conv = u.new_zeros(1, taps - 1, u.shape[-1])
        ssm = u.new_zeros(1, heads, head_dim, state_size, dtype=wide)
        expected, _, expected_ssm = block_scan_reference(u, delta, conv, ssm, weights)
        outputs = []
        for part, end in zip(parts, accumulate(parts), strict=True):
            new_conv, tokens = torch.empty_like(conv), slice(end - part, end)
            outputs.append(
                pool_scan(u[:, tokens], delta[:, tokens], conv, ssm, slice(0, 1), weights, new_conv=new_conv)
            )
            conv = new_conv
        errors = _error(torch.cat(outputs, dim=1), expected), _error(ssm, expected_ssm)
        worst = _worst(worst, *errors)
    what = "two parts with the state carried, token by token"
    return _compared(f"scan of the {name}", worst, what, tower.device, tower.dtype)


def _routers(name: str, tower: Backbone, layers: list[Layer], stored: list[tuple[Tensor, Tensor]]) -> Finding:
    """Chooses experts as the tower does, and in float64 with the router as it is stored."""
    looked_at, num_wrong, num_tied = f"router of the {name}", 0, 0
    for layer, (router, bias) in zip(layers, stored, strict=True):
        mixer = layer.mixer
        assert isinstance(mixer, MixtureOfExperts)
        hidden = _hidden(tower, layer, NUM_TOKENS)
        found, right = (
            # By expert, 0 for those that a token does not visit.
            weights.new_zeros(NUM_TOKENS, len(router), dtype=torch.float64).scatter(1, ids, weights.double())
            for ids, weights in (mixer.route(hidden), route_tokens_reference(hidden, router, bias, mixer.choice))
        )
        scores = (torch.sigmoid(hidden.double() @ router.T) + bias).sort(descending=True).values
        top = mixer.choice.top_k
        is_tied = scores[:, top - 1] == scores[:, min(top, len(router) - 1)] if top < len(router) else scores[:, 0] < 0
        num_tied += int(is_tied.sum())
        num_wrong += int(((found - right).abs().amax(-1) > ROUTER_TOLERANCE)[~is_tied].sum())
    num_tokens = NUM_TOKENS * len(layers)
    if num_wrong:
        detail = f"{num_wrong} of {num_tokens} tokens visit other experts than in float64, or weigh them otherwise"
        return note(looked_at, "fault", detail, f"the published router computes in float64; {_remedy(tower.device)}")
    if num_tied:
        detail = (
            f"for {num_tied} of {num_tokens} tokens the last expert and the next one score the same: chance decides"
        )
        remedy = "the router was rounded when it was saved; save it again in the dtype that it was trained in"
        return note(looked_at, "warning", detail, remedy)
    return note(looked_at, "ok", f"{num_tokens} tokens visit the experts that float64 chooses, by the same weights")


def _stored_routers(case: Case, sample: Sample, name: str, layers: list[Layer]) -> list[tuple[Tensor, Tensor]]:
    """Routers and score corrections in float64, as they are stored."""
    prefix = {"context tower": "context_tower", "denoiser": "denoiser_tower"}[name]
    places = [f"{prefix}.layers.{sample.layers[layer.index]}.mixer.gate" for layer in layers]
    names = [f"{place}.{kind}" for place in places for kind in ("weight", "e_score_correction_bias")]
    read = {
        piece.name: values.double().to(layers[0].norm.device)
        for piece, values in read_in_place({name: case.index[name] for name in names})
    }
    return [(read[f"{place}.weight"], read[f"{place}.e_score_correction_bias"]) for place in places]


def _modulation(sample: Sample) -> Finding:
    """Runs the norms of the denoiser's layers: before experts and MLPs modulation comes after the norm, else before."""
    denoiser, worst = sample.towers.denoiser, 0.0
    tables = denoiser.time_conditioning.for_block_size(16)[8:9]
    for layer in denoiser.layers:
        assert isinstance(layer, Layer)
        x = denoiser.embeddings[_token_ids(denoiser, NUM_TOKENS)][None].to(denoiser.residual_dtype)
        shift, scale_plus_one, _ = tables[:, layer.index].unbind(1)
        probe = copy(layer)
        probe.mix = lambda h, prefix: h  # type: ignore[method-assign]
        _, found = probe(x, None, None, (None, shift, scale_plus_one))
        wide = [tensor.double() for tensor in (x, shift, scale_plus_one, layer.norm)]
        if sample.towers.config.layer_kinds[layer.index] in (MOE, MLP):
            right = modulate_reference(rms_norm_reference(wide[0], wide[3], layer.eps), *wide[1:3])
        else:
            right = rms_norm_reference(modulate_reference(*wide[:3]), wide[3], layer.eps)
        worst = _worst(worst, _error(found, right))
    orders = "after the norm before experts and MLPs, before it elsewhere"
    return _compared("order of modulation", worst, orders, denoiser.device, denoiser.dtype)


def _context_in_parts(sample: Sample) -> Finding:
    """Reads texts at once and in two parts: the logits behind them must be the same.

    Experts keep no state and are left out: where rounding changes which of them a token visits, sound logits differ.
    """
    towers, tolerance = sample.towers, STACK_TOLERANCES[sample.towers.dtype]
    with _without_experts(towers.context):
        worst = _worst(*(_error_of_parts(towers, *parts) for parts in CONTEXT_PARTS))
    what = "texts in two parts, and at once, without experts"
    return _compared("context tower", worst, what, towers.context.device, towers.dtype, tolerance)


@contextmanager
def _without_experts(tower: Backbone) -> Iterator[None]:
    """Lets layers with experts add nothing."""
    layers = [one for one in tower.layers if isinstance(one, Layer) and isinstance(one.mixer, MixtureOfExperts)]
    for layer in layers:
        layer.mix = lambda h, prefix: torch.zeros_like(h)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.mix


def _error_of_parts(towers: TwoTowers, first: int, second: int) -> float:
    tokens = _token_ids(towers.context, first + second).tolist()
    state = ContextState.for_towers(towers, num_slots=2, num_pages=2 * len(tokens))
    state.extend(towers.context, {"parts": tokens[:first]}, "none")
    found = state.extend(towers.context, {"parts": tokens[first:]}).logits
    right = state.extend(towers.context, {"whole": tokens}).logits
    assert found is not None and right is not None
    return _error(found, right)


def _compared(
    looked_at: str, error: float, what: str, device: torch.device, dtype: torch.dtype, tolerance: float | None = None
) -> Finding:
    allowed = tolerance or TOLERANCES[dtype]
    if not math.isfinite(error):
        return note(looked_at, "fault", f"{what}: there are numbers that are not finite", OF_WEIGHTS)
    detail = f"{what}: they differ by {error:.1e} in {str(dtype).removeprefix('torch.')}, {allowed:.0e} is rounding"
    return note(looked_at, "fault", detail, _remedy(device)).unless(error <= allowed)


def _remedy(device: torch.device) -> str:
    return OF_KERNELS if device.type == "cuda" else OF_TORCH


def _error(found: Tensor, right: Tensor) -> float:
    """Norm of the difference, relative to that of what is right."""
    right = right.double()
    return float((found.double() - right).norm() / right.norm().clamp(min=1e-30))


def _worst(*errors: float) -> float:
    """The largest error; NaN where one is, which `max` would lose."""
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _hidden(tower: Backbone, layer: Layer, num_tokens: int) -> Tensor:
    """Input that a layer may read: embeddings of random tokens behind its norm, [num_tokens, hidden]."""
    x = tower.embeddings[_token_ids(tower, num_tokens)].to(tower.residual_dtype)
    return rms_norm(x, layer.norm, layer.eps, layer.dtype)


def _token_ids(tower: Backbone, num_tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    return moved(torch.randint(len(tower.embeddings), (num_tokens,), generator=generator), tower.device)
