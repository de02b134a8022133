"""Routing, and the experts that tokens chose: kernels and CPU paths beside PyTorch as people write it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.harness import OURS, Case, Systems, one_by_one, side_by_side
from benchmarks.shapes import MID_SIZE, REAL_SIZE
from twotower_kernels.experts import ExpertChoice, ExpertScales, grouped_experts, quantise, route, route_tokens
from twotower_kernels.experts.quantisation import dequantise, quantised_shapes, scales_dtype
from twotower_spec import TwoTowerConfig
from twotower_spec.config import EXPERT_DTYPES

# One bfloat16 rounding of hidden activations and one of outputs, in the Frobenius norm.
AGREEMENT = 2e-2


def cases(device: torch.device) -> list[Case]:
    """Numbers of tokens that each kernel is made for; on a CPU the mid-size model."""
    if device.type == "cpu":
        return [_routing(MID_SIZE, 16, device), *(_experts(MID_SIZE, n, "product_few", device) for n in (1, 16, 64))]
    return [
        *(_routing(REAL_SIZE, num_tokens, device) for num_tokens in (1, 16, 256, 1024)),
        _choice(REAL_SIZE, 16, device),
        _experts(REAL_SIZE, 1, "product_one", device),
        *(_experts(REAL_SIZE, num_tokens, "product_few", device) for num_tokens in (4, 16, 32, 128)),
        *(_experts(REAL_SIZE, num_tokens, "product_some", device) for num_tokens in (256, 1024)),
        *(_experts(REAL_SIZE, num_tokens, "product_many", device) for num_tokens in (2048, 8192)),
        *(
            _quantised(REAL_SIZE, num_tokens, f"quantised_{kind}", device, dtype)
            for kind, num_tokens in (("one", 1), ("few", 16), ("few", 128), ("some", 1024), ("many", 8192))
            for dtype in EXPERT_DTYPES
        ),
    ]


@cache
def _weights(experts: int, width: int, hidden: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Makes both weight stacks of one layer in bfloat16, 2.4 GiB at real size, once for all cases."""
    generator = torch.Generator(device).manual_seed(0)
    made = [
        torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(std=shape[-1] ** -0.5, generator=generator)
        for shape in ((experts, width, hidden), (experts, hidden, width))
    ]
    return made[0], made[1]


def _tokens(config: TwoTowerConfig, num_tokens: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(1)
    return torch.randn(num_tokens, config.hidden_size, generator=generator, device=device).bfloat16()


def _router(config: TwoTowerConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Makes router [experts, hidden] and score correction [experts] in float32, as loaded."""
    generator = torch.Generator(device).manual_seed(2)
    experts, hidden = config.n_routed_experts, config.hidden_size
    router = torch.randn(experts, hidden, generator=generator, device=device) / hidden**0.5
    return router, torch.randn(experts, generator=generator, device=device) * 0.01


def _choose(config: TwoTowerConfig, scores: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Chooses experts as the published router does, for one group."""
    ids = (scores + bias).topk(config.num_experts_per_tok, dim=-1).indices
    weights = scores.gather(1, ids)
    return ids, weights / (weights.sum(-1, keepdim=True) + 1e-20) * config.routed_scaling_factor


def _expert_choice(config: TwoTowerConfig) -> ExpertChoice:
    return ExpertChoice(config.num_experts_per_tok, 1, 1, True, config.routed_scaling_factor)


def _agree(systems: dict[str, Callable[[], tuple[Tensor, Tensor]]], num_experts: int) -> Systems:
    """Checks that systems choose the same experts with the same weights, and returns them."""
    ours, *others = (
        torch.zeros(len(ids), num_experts, dtype=weights.dtype, device=ids.device).scatter_(1, ids, weights)
        for ids, weights in (system() for system in systems.values())
    )
    for other in others:
        torch.testing.assert_close(ours, other, rtol=1e-9, atol=1e-12)
    return dict(systems)


def _routing(config: TwoTowerConfig, num_tokens: int, device: torch.device) -> Case:
    experts, hidden, top_k = config.n_routed_experts, config.hidden_size, config.num_experts_per_tok

    def make() -> Systems:
        x, (router, bias) = _tokens(config, num_tokens, device), _router(config, device)

        def composition() -> tuple[Tensor, Tensor]:
            return _choose(config, F.linear(x.double(), router.double()).sigmoid(), bias.double())

        ours = {OURS: lambda: route_tokens(x, router, bias, _expert_choice(config)), "torch composition": composition}
        return _agree(ours, experts)

    moved = 4 * experts * hidden + 2 * num_tokens * hidden + 16 * num_tokens * top_k
    return Case("experts", "router_logits", f"route {num_tokens} tokens to {top_k} of {experts}", moved, make)


def _choice(config: TwoTowerConfig, num_tokens: int, device: torch.device) -> Case:
    experts, top_k = config.n_routed_experts, config.num_experts_per_tok

    def make() -> Systems:
        router, bias = _router(config, device)
        scores = F.linear(_tokens(config, num_tokens, device).double(), router.double()).sigmoid()
        wide = bias.double()
        return _agree(
            {
                OURS: lambda: route(scores, wide, _expert_choice(config)),
                "torch composition": lambda: _choose(config, scores, wide),
            },
            experts,
        )

    moved = num_tokens * (8 * experts + 16 * top_k)
    return Case("experts", "choose_experts", f"choose {top_k} of {experts} by scores, {num_tokens} tokens", moved, make)


def _experts(config: TwoTowerConfig, num_tokens: int, kernel: str, device: torch.device) -> Case:
    experts, top_k = config.n_routed_experts, config.num_experts_per_tok
    hidden, width = config.hidden_size, config.moe_intermediate_size

    def make() -> Systems:
        x, (up, down) = _tokens(config, num_tokens, device), _weights(experts, width, hidden, device)
        router, bias = _router(config, device)
        ids, weights = route_tokens(x, router, bias, _expert_choice(config))
        systems: dict[str, Callable[[], Tensor]] = {
            OURS: lambda: grouped_experts(x, up, down, ids, weights),
            "torch composition": lambda: _expert_by_expert(x, up, down, ids, weights),
        }
        if device.type == "cuda":
            systems["torch grouped_mm"] = lambda: _grouped_mm(x, up, down, ids, weights)
            systems |= _vllm(x, up, down, ids, weights)
        expected = systems["torch composition"]().double()
        for name, system in systems.items():
            error = (system().double() - expected).norm() / expected.norm()
            assert error < AGREEMENT, f"{name} is {error:.3g} away from the torch composition"
        return dict(systems)

    visited = experts * (1 - (1 - top_k / experts) ** num_tokens)
    moved = int(4 * visited * width * hidden + 4 * num_tokens * hidden)
    shape = f"{num_tokens} tokens, {top_k} of {experts} experts [{hidden}, {width}] bf16"
    return Case("experts", kernel, shape, moved, make)


def _quantised(config: TwoTowerConfig, num_tokens: int, kernel: str, device: torch.device, name: str) -> Case:
    dtype = EXPERT_DTYPES[name]
    experts, top_k = config.n_routed_experts, config.num_experts_per_tok
    hidden, width = config.hidden_size, config.moe_intermediate_size

    def make() -> Systems:
        x, wide = _tokens(config, num_tokens, device), _weights(experts, width, hidden, device)
        ids, weights = route_tokens(x, *_router(config, device), _expert_choice(config))
        (up, up_scales), (down, down_scales) = (quantise(weight, dtype) for weight in wide)
        scales = ExpertScales(up_scales, down_scales)
        expected = _expert_by_expert(
            x, dequantise(up, up_scales, x.dtype), dequantise(down, down_scales, x.dtype), ids, weights
        ).double()
        error = (grouped_experts(x, up, down, ids, weights, None, scales).double() - expected).norm() / expected.norm()
        assert error < AGREEMENT, f"quantised experts are {error:.3g} away from the torch composition"
        return {
            OURS: lambda: grouped_experts(x, up, down, ids, weights, None, scales),
            "ours, bf16": lambda: grouped_experts(x, *wide, ids, weights),
        }

    visited = experts * (1 - (1 - top_k / experts) ** num_tokens)
    weights_of_an_expert = sum(
        math.prod(shape) * kind.itemsize
        for weight in ((width, hidden), (hidden, width))
        for shape, kind in zip(quantised_shapes(weight, dtype), (dtype, scales_dtype(dtype)), strict=True)
    )
    moved = int(visited * weights_of_an_expert + 4 * num_tokens * hidden)
    shape = f"{num_tokens} tokens, {top_k} of {experts} experts [{hidden}, {width}] {name}"
    return Case("experts", kernel, shape, moved, make)


def _expert_by_expert(x: Tensor, up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Computes experts as the published model does: in a loop over those that some token chose."""
    out = torch.zeros_like(x, dtype=weights.dtype)
    for expert in ids.unique().tolist():
        tokens, slots = (ids == expert).nonzero(as_tuple=True)
        outputs = F.linear(F.linear(x[tokens], up[expert]).relu().square(), down[expert])
        out.index_add_(0, tokens, outputs.to(weights.dtype) * weights[tokens, slots, None])
    return out.to(x.dtype)


def _grouped_mm(x: Tensor, up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Computes experts with PyTorch's grouped product, which does not wait for the device either."""
    ordered, order = ids.flatten().sort(stable=True)
    ends = torch.searchsorted(ordered, torch.arange(len(up), device=x.device), right=True, out_int32=True)
    hidden = F.grouped_mm(x[order // ids.shape[1]], up.transpose(1, 2), offs=ends).relu().square()
    outputs = torch.empty(len(order), x.shape[1], dtype=weights.dtype, device=x.device)
    outputs[order] = F.grouped_mm(hidden, down.transpose(1, 2), offs=ends).to(weights.dtype)
    return torch.bmm(weights[:, None], outputs.view(*ids.shape, -1))[:, 0].to(x.dtype)


def _vllm(x: Tensor, up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Fused experts of vLLM, where a CUDA build of it is installed; it weighs in float32."""
    try:
        from vllm.model_executor.layers.fused_moe.activation import MoEActivation
        from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts
    except ImportError:
        return {}
    narrow_weights, narrow_ids = weights.float(), ids.int()

    def fused() -> Tensor:
        out: Tensor = fused_experts(x, up, down, narrow_weights, narrow_ids, activation=MoEActivation.RELU2_NO_MUL)
        return out

    try:
        fused()
    except (AttributeError, NotImplementedError, RuntimeError):  # a build without its CUDA operators
        return {}
    return {"vLLM fused_experts": fused}


@one_by_one(cases(torch.device("cpu")))
def test_experts(benchmark: BenchmarkFixture, case: Case) -> None:
    side_by_side(benchmark, case)
