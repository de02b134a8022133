"""Under autocast, where training runs, few experts are computed as one wide MLP."""

import torch

from tests.support.tolerances import BFLOAT16_RELATIVE
from twotower_kernels.experts import grouped_experts

EXPERTS, WIDTH, HIDDEN, TOKENS, TOP_K = 4, 24, 16, 33, 2


def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    up = torch.randn(EXPERTS, WIDTH, HIDDEN, generator=generator)
    down = torch.randn(EXPERTS, HIDDEN, WIDTH, generator=generator)
    ids = torch.rand(TOKENS, EXPERTS, generator=generator).argsort(1)[:, :TOP_K]
    weights = torch.rand(TOKENS, TOP_K, generator=generator, dtype=torch.float64)
    return x, up, down, ids, weights


def test_the_wide_mlp_gives_what_the_chosen_experts_give() -> None:
    arguments = case()
    expected = grouped_experts(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        got = grouped_experts(*arguments)
    assert got.dtype == expected.dtype
    assert float((got - expected).norm() / expected.norm()) < BFLOAT16_RELATIVE


def test_experts_that_nobody_chose_get_no_gradient() -> None:
    x, up, down, ids, weights = case()
    up.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        grouped_experts(x, up, down, ids % 3, weights).sum().backward()
    assert up.grad is not None
    assert float(up.grad[3].abs().sum()) == 0 and float(up.grad[0].abs().sum()) > 0
