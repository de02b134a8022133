"""Mixture of experts with a shared expert, and the dense MLP: squared ReLU, no gate projection."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from twotower_kernels.experts import (
    ExpertChoice,
    ExpertOutputs,
    ExpertScales,
    SharedExpert,
    expert_outputs,
    quantised_shapes,
    route_tokens,
    scales_dtype,
)
from twotower_kernels.linear import mlp
from twotower_spec.checkpoint.quantised import scale_name
from twotower_spec.config import EXPERT_DTYPES, TwoTowerConfig, accumulation_dtype
from twotower_spec.towers.layers.weights import matrix, parameter, prefixed


class DenseMLP(nn.Module):
    """`down(relu(up(x))^2)`: the `-` layer and the shared expert."""

    def __init__(self, hidden_size: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.up = matrix(width, hidden_size, dtype=dtype, device=device)
        self.down = matrix(hidden_size, width, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] to [..., hidden]."""
        return mlp(x, self.up, self.down)

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Views under the published names."""
        yield "up_proj.weight", self.up
        yield "down_proj.weight", self.down


class MixtureOfExperts(nn.Module):
    """Routed experts, weighed and summed in float64, plus the unscaled shared expert in the model's dtype.

    Source: modeling_nemotron_h.py, NemotronHMOE, with the float64 router of the two-tower release.
    """

    def __init__(self, config: TwoTowerConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.choice = ExpertChoice(
            top_k=config.num_experts_per_tok,
            num_groups=config.n_group,
            top_groups=config.topk_group,
            normalise=config.norm_topk_prob,
            scale=config.routed_scaling_factor,
        )
        experts, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        wide = accumulation_dtype(dtype)
        self.router = parameter(experts, hidden, dtype=wide, device=device)
        self.score_correction = parameter(experts, dtype=wide, device=device)
        up: tuple[int, ...] = (experts, width, hidden)
        down: tuple[int, ...] = (experts, hidden, width)
        self.up_scales: nn.Parameter | None = None
        self.down_scales: nn.Parameter | None = None
        held = dtype
        if config.experts_dtype:
            held = EXPERT_DTYPES[config.experts_dtype]
            (up, up_scales), (down, down_scales) = quantised_shapes(up, held), quantised_shapes(down, held)
            self.up_scales = parameter(*up_scales, dtype=scales_dtype(held), device=device)
            self.down_scales = parameter(*down_scales, dtype=scales_dtype(held), device=device)
        self.up = matrix(*up, dtype=held, device=device)
        self.down = matrix(*down, dtype=held, device=device)
        self.shared = DenseMLP(hidden, config.moe_shared_expert_intermediate_size, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor | ExpertOutputs:
        """[..., hidden] to [..., hidden]; on a GPU to outputs of experts, which the next norm sums as it reads them."""
        tokens = x.flatten(0, -2)
        if tokens.shape[0] == 0:
            return x
        expert_ids, expert_weights = self.route(tokens)
        shared = SharedExpert(self.shared.up, self.shared.down)
        made = expert_outputs(tokens, self.up, self.down, expert_ids, expert_weights, shared, self.scales)
        return made.view_as(x) if isinstance(made, Tensor) else made

    @property
    def scales(self) -> ExpertScales | None:
        """Scales of quantised experts."""
        if self.up_scales is None or self.down_scales is None:
            return None
        return ExpertScales(self.up_scales, self.down_scales)

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Expert ids and float64 weights [num_tokens, top_k] of tokens [num_tokens, hidden]."""
        return route_tokens(tokens, self.router, self.score_correction, self.choice)

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Views under the published names; each expert is a slice of the stacked tensors."""
        yield "gate.weight", self.router
        yield "gate.e_score_correction_bias", self.score_correction
        for expert in range(len(self.up)):  # one by one: iterating over a tensor makes all of its slices first
            for name, weight, scales in (("up", self.up, self.up_scales), ("down", self.down, self.down_scales)):
                yield f"experts.{expert}.{name}_proj.weight", weight[expert]
                if scales is not None:
                    yield scale_name(f"experts.{expert}.{name}_proj.weight"), scales[expert]
        yield from prefixed("shared_experts", self.shared.checkpoint_tensors())
