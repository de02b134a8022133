"""The product of tokens with a weight, in every order of operands."""

import pytest
import torch
from torch import Tensor

from tests.support.tolerances import BFLOAT16_RELATIVE
from twotower_kernels.linear import linear, op
from twotower_kernels.linear.op import MOST_TOKENS_ON_THE_RIGHT
from twotower_kernels.linear.reference import linear_reference


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("num_tokens", [1, 3, 64, MOST_TOKENS_ON_THE_RIGHT, MOST_TOKENS_ON_THE_RIGHT + 1])
@pytest.mark.parametrize("amx", [False, True])
def test_every_number_of_tokens_gives_the_same_product(
    num_tokens: int, amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op, "has_amx", lambda: amx)
    x, weight = randn(num_tokens, 24), randn(17, 24, seed=1)
    got = linear(x.bfloat16(), weight.bfloat16())
    error = (got.double() - x @ weight.t()).norm() / (x @ weight.t()).norm()
    assert got.shape == (num_tokens, 17) and float(error) < BFLOAT16_RELATIVE


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_autocast_may_mix_the_dtypes(num_tokens: int) -> None:
    """So it is with a frozen float32 tower in training: activations are bfloat16 and weights float32."""
    x, weight = torch.ones(num_tokens, 8, dtype=torch.bfloat16), torch.ones(5, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x, weight), torch.full((num_tokens, 5), 8.0, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0,), (1,), (2,), (2, 3), (1, 17), (70,)])
def test_linear_equals_its_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = randn(*shape, 33).to(dtype), randn(21, 33, seed=1).to(dtype)
    actual, expected = linear(x, weight), linear_reference(x, weight)
    assert actual.shape == expected.shape and actual.dtype == dtype
    if actual.numel():
        assert ((actual - expected).double().norm() / expected.double().norm()).item() < BFLOAT16_RELATIVE
