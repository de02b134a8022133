"""Routing and experts over all tokens at once; experts that nobody chose are not touched."""

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower_kernels.backend import use_triton
from twotower_kernels.experts.quantisation import (
    QUANTISED_DTYPES,
    dequantise,
    float_shape,
    quantised_shapes,
    scales_dtype,
)
from twotower_kernels.experts.types import ExpertChoice, ExpertOutputs, ExpertScales, SharedExpert
from twotower_kernels.linear import linear, mlp

# Dtypes that the kernels multiply; float64, which tests and training of tiny models use, is left to PyTorch.
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# With more experts than this per choice of a token, computing all of them costs more than it saves.
MOST_EXPERTS_PER_CHOICE = 2
# Up to this many tokens a CPU spends more time on reading weights than on multiplying.
MOST_TOKENS_BY_ALL_EXPERTS = 8


def route_tokens(x: Tensor, router: Tensor, bias: Tensor, choice: ExpertChoice) -> tuple[Tensor, Tensor]:
    """Chooses and weighs experts for tokens; logits, scores and weights are float64, whatever `x` and `router` are.

    Args:
        x: [num_tokens, hidden].
        router: [num_experts, hidden].
        bias, choice: as `route` takes them.

    Returns:
        Expert ids int64 [num_tokens, top_k] and their weights float64 [num_tokens, top_k].

    Source: the two-tower release, whose router is float64; otherwise as `route`.
    """
    if _on_kernels(x, router, bias):
        from twotower_kernels.experts.kernel import launch_route_tokens

        _check_choice(router.shape[0], bias, choice)
        return launch_route_tokens(x, router, bias, choice)
    scores = F.linear(x.double(), router.double()).sigmoid()
    return _chosen(scores, bias, choice)


def route(scores: Tensor, bias: Tensor, choice: ExpertChoice) -> tuple[Tensor, Tensor]:
    """Chooses experts by corrected scores and weighs them by uncorrected ones.

    Args:
        scores: [num_tokens, num_experts], sigmoid of the router logits, float64 (or float32).
        bias: [num_experts], score correction; it takes part in the choice only.
        choice: number of experts, groups and weights.

    Returns:
        Expert ids int64 [num_tokens, top_k], in no particular order within a token, and their weights in the dtype of
        `scores`. Of experts, and of groups, with equal corrected scores the lower ids go first on a GPU; on a CPU
        torch.topk picks any.

    Source: DeepSeek-V3 (2024), section 2.1.2; modeling_nemotron_h.py, NemotronHTopkRouter.
    """
    if _on_kernels(scores, bias):
        from twotower_kernels.experts.kernel import launch_choose

        _check_choice(scores.shape[1], bias, choice)
        return launch_choose(scores[None], False, bias, choice)
    return _chosen(scores, bias, choice)


def _chosen(scores: Tensor, bias: Tensor, choice: ExpertChoice) -> tuple[Tensor, Tensor]:
    """`route` in PyTorch."""
    corrected = scores + bias
    if choice.num_groups > 1:
        grouped = corrected.unflatten(-1, (choice.num_groups, -1))
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(choice.top_groups, dim=-1).indices
        kept = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(-1, best, True)
        corrected = grouped.masked_fill(~kept[..., None], 0.0).flatten(-2)
    expert_ids = corrected.topk(choice.top_k, dim=-1, sorted=False).indices
    weights = scores.gather(-1, expert_ids)
    if choice.normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return expert_ids, weights * choice.scale


def grouped_experts(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    shared: SharedExpert | None = None,
    scales: ExpertScales | None = None,
) -> Tensor:
    """Weighted sum of `down(relu(up(x))^2)` over the experts each token chose.

    Args:
        x: [num_tokens, hidden].
        up: [num_experts, width, hidden]; any strides; of x's dtype, or as `quantise` gives it, with `scales`.
        down: [num_experts, hidden, width]; likewise.
        expert_ids: int64 [num_tokens, top_k], distinct within a token, each in [0, num_experts).
        expert_weights: [num_tokens, top_k]; the sum over experts runs in this dtype (float64 as published).
        shared: an expert of all tokens, of x's dtype; its output is added unscaled to the sum once that is rounded.
        scales: of quantised experts; a product is multiplied by them before it is rounded.

    Returns:
        [num_tokens, hidden] in the dtype of `x`.
    """
    made = expert_outputs(x, up, down, expert_ids, expert_weights, shared, scales)
    return made if isinstance(made, Tensor) else made.total()


def expert_outputs(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    shared: SharedExpert | None = None,
    scales: ExpertScales | None = None,
) -> Tensor | ExpertOutputs:
    """Computes `grouped_experts`; the kernels leave the sum to the op that reads it next. Arguments as there."""
    tensors = [x, up, down, expert_weights]
    tensors += [weight for held in (shared, scales) if held is not None for weight in (held.up, held.down)]
    if _on_kernels(*tensors) and x.dtype in KERNEL_DTYPES:
        from twotower_kernels.experts.kernel import launch_grouped_experts

        _check_experts(x, up, down, expert_ids, expert_weights, shared, scales)
        return launch_grouped_experts(x, up, down, expert_ids, expert_weights, shared, scales)
    if scales is not None:
        visited, expert_ids = expert_ids.unique(return_inverse=True)
        up = dequantise(up[visited], scales.up[visited], x.dtype)
        down = dequantise(down[visited], scales.down[visited], x.dtype)
    routed = _routed_sum(x, up, down, expert_ids, expert_weights)
    return routed if shared is None else routed + mlp(x, shared.up, shared.down)


def _on_kernels(x: Tensor, *others: Tensor) -> bool:
    """Whether the kernels may take these inputs: they know neither gradients nor autocast."""
    return use_triton(x, *others) and not torch.is_autocast_enabled(x.device.type)


def _check_choice(num_experts: int, bias: Tensor, choice: ExpertChoice) -> None:
    """Refuses sizes that contradict each other, by which the kernel would read beyond its inputs."""
    top_k, num_groups, top_groups = choice.top_k, choice.num_groups, choice.top_groups
    if bias.shape != (num_experts,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; give one number for each of {num_experts} experts")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k {top_k} is not allowed with {num_experts} experts; give 1 to {num_experts}")
    if num_groups == 1:
        return
    if num_experts % num_groups or num_experts < 2 * num_groups:
        raise ValueError(f"{num_groups} groups do not share {num_experts} experts; give a divisor, of two or more each")
    if not 1 <= top_groups <= num_groups:
        raise ValueError(f"top_groups {top_groups} is not allowed with {num_groups} groups; give 1 to {num_groups}")


def _check_experts(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    shared: SharedExpert | None,
    scales: ExpertScales | None,
) -> None:
    """Refuses shapes and dtypes that contradict each other; see `_check_choice`."""
    (num_tokens, hidden), (num_experts, width) = x.shape, up.shape[:2]
    if float_shape(up)[2:] != (hidden,) or float_shape(down) != (num_experts, hidden, width):
        shapes = f"x {tuple(x.shape)}, up {float_shape(up)}, down {float_shape(down)}"
        raise ValueError(
            f"{shapes} do not fit; give [tokens, hidden], [experts, width, hidden], [experts, hidden, width]"
        )
    if scales is None and not x.dtype == up.dtype == down.dtype:
        raise ValueError(f"x is {x.dtype}, up {up.dtype} and down {down.dtype}; give one dtype")
    if scales is not None:
        _check_scales(up, down, scales)
    if expert_ids.shape != expert_weights.shape or expert_ids.shape[0] != num_tokens:
        shapes = f"expert_ids {tuple(expert_ids.shape)}, expert_weights {tuple(expert_weights.shape)}"
        raise ValueError(f"{shapes} do not fit; give one row for each of {num_tokens} tokens")
    if shared is not None:
        _check_shared(x, shared)


def _check_shared(x: Tensor, shared: SharedExpert) -> None:
    """Refuses a shared expert of another size or dtype; see `_check_choice`."""
    (width, _), hidden = shared.up.shape, x.shape[1]
    if (shared.up.shape, shared.down.shape) != ((width, hidden), (hidden, width)):
        shapes = f"up {tuple(shared.up.shape)} and down {tuple(shared.down.shape)}"
        raise ValueError(f"the shared expert has {shapes}; give [width, {hidden}] and [{hidden}, width]")
    if not x.dtype == shared.up.dtype == shared.down.dtype:
        raise ValueError(f"the shared expert is {shared.up.dtype} and {shared.down.dtype}; give {x.dtype}, as x is")


def _check_scales(up: Tensor, down: Tensor, scales: ExpertScales) -> None:
    """Refuses scales of other experts; see `_check_choice`."""
    if up.dtype != down.dtype or up.dtype not in QUANTISED_DTYPES:
        allowed = " or ".join(str(dtype) for dtype in QUANTISED_DTYPES)
        raise ValueError(f"up is {up.dtype} and down {down.dtype}, with scales; give both in {allowed}")
    dtype = scales_dtype(up.dtype)
    for name, weight, scale in (("up", up, scales.up), ("down", down, scales.down)):
        _, shape = quantised_shapes(float_shape(weight), weight.dtype)
        if scale.shape != shape or scale.dtype != dtype:
            raise ValueError(f"scales of {name} are {scale.dtype} {tuple(scale.shape)}; give {dtype} {shape}")


def _routed_sum(x: Tensor, up: Tensor, down: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
    """`grouped_experts` without a shared expert, by the PyTorch path that is fastest for its sizes."""
    num_tokens, top_k = expert_ids.shape
    if torch.is_autocast_enabled(x.device.type) and up.shape[0] <= MOST_EXPERTS_PER_CHOICE * top_k:
        return _one_wide_mlp(x, up, down, expert_ids, expert_weights)
    if num_tokens == 1:
        outputs = _one_token(x, up, down, expert_ids[0].tolist())
        return torch.mm(expert_weights, outputs.to(expert_weights.dtype)).to(x.dtype)
    few = x.device.type == "cpu" and num_tokens <= MOST_TOKENS_BY_ALL_EXPERTS
    if few and up.shape[0] <= MOST_EXPERTS_PER_CHOICE * top_k:
        return _few_tokens(x, up, down, expert_ids, expert_weights)
    # Rows are ordered by expert.
    ordered_ids, order = expert_ids.flatten().sort()
    rows, counts = x[order // top_k], ordered_ids.bincount(minlength=up.shape[0])
    host_counts = counts.tolist()
    visited = sum(count > 0 for count in host_counts)
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and 4 * visited >= 3 * len(host_counts):
        outputs = _all_experts(rows, up, down, ordered_ids, counts, max(host_counts))
    else:
        outputs = _visited_experts(rows, up, down, host_counts)
    per_token = outputs[order.argsort()].view(num_tokens, top_k, -1).to(expert_weights.dtype)
    return torch.bmm(expert_weights[:, None, :], per_token)[:, 0].to(x.dtype)


def _one_wide_mlp(x: Tensor, up: Tensor, down: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
    """Computes all experts for all tokens, weight 0 where not chosen: for training, where few experts are all visited.

    Its products have the same shapes at every step, whereas oneDNN generates code anew for every new number of rows. A
    step of a small context tower (2048 tokens, 4 experts, top 2, one thread) is 1.25 times as fast.
    """
    spread = x.new_zeros(x.shape[0], up.shape[0]).scatter(1, expert_ids, expert_weights.to(x.dtype))
    hidden = linear(x, up.flatten(0, 1)).relu().square()
    weighted = hidden.unflatten(1, up.shape[:2]) * spread[:, :, None]
    return linear(weighted.flatten(1), down.transpose(0, 1).flatten(1)).to(x.dtype)


def _few_tokens(x: Tensor, up: Tensor, down: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
    """Computes all experts for all tokens, weight 0 where not chosen, since nearly all are chosen by some token."""
    spread = expert_weights.new_zeros(x.shape[0], up.shape[0]).scatter_(1, expert_ids, expert_weights)
    hidden = torch.matmul(x, up.transpose(1, 2)).relu().square()  # [experts, tokens, width]
    outputs = torch.bmm(hidden, down.transpose(1, 2)).to(spread.dtype)
    return torch.bmm(spread[:, None], outputs.transpose(0, 1))[:, 0].to(x.dtype)


def _one_token(x: Tensor, up: Tensor, down: Tensor, chosen: list[int]) -> Tensor:
    """Outputs [top_k, hidden] of the chosen experts for x [1, hidden]."""
    hidden = torch.cat([linear(x, up[expert]) for expert in chosen]).relu().square()
    return torch.cat([linear(hidden[i : i + 1], down[expert]) for i, expert in enumerate(chosen)])


def _visited_experts(rows: Tensor, up: Tensor, down: Tensor, counts: list[int]) -> Tensor:
    """Outputs of rows ordered by expert; a loop over the experts that were chosen."""
    visited = [expert for expert, count in enumerate(counts) if count]
    sizes = [counts[expert] for expert in visited]
    hidden = (
        torch.cat([linear(part, up[e]) for e, part in zip(visited, rows.split(sizes), strict=True)]).relu().square()
    )
    return torch.cat([linear(part, down[e]) for e, part in zip(visited, hidden.split(sizes), strict=True)])


def _all_experts(rows: Tensor, up: Tensor, down: Tensor, ordered_ids: Tensor, counts: Tensor, longest: int) -> Tensor:
    """Outputs of rows ordered by expert; one batched product over all experts, padded to the one with the most rows.

    bfloat16 on a CPU spends more time on entering oneDNN than on the few rows of an expert: one call for 16 experts
    takes half the time of 16 calls.
    """
    place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[ordered_ids]
    padded = rows.new_zeros(up.shape[0], longest, rows.shape[1])
    padded[ordered_ids, place] = rows
    hidden = torch.bmm(up, padded.transpose(1, 2)).relu().square()
    return torch.bmm(down, hidden).transpose(1, 2)[ordered_ids, place]
