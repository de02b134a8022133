"""Attention and products against their references."""

import pytest
import torch
from torch import Tensor

from tests.support.builders import padding_mask
from tests.support.tolerances import BFLOAT16_RELATIVE, FLOAT64
from twotower_kernels.block_attention import attention, causal_mask
from twotower_kernels.block_attention.reference import attention_reference
from twotower_kernels.linear import linear
from twotower_kernels.linear.reference import linear_reference


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (6, 3), (6, 1)])
@pytest.mark.parametrize("masking", ["none", "causal", "padding"])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 9), (5, 9)])
def test_attention_equals_softmax_written_out(
    heads: int, kv_heads: int, masking: str, num_queries: int, num_keys: int
) -> None:
    query = randn(2, num_queries, heads, 4)
    key, value = randn(2, num_keys, kv_heads, 4, seed=1), randn(2, num_keys, kv_heads, 4, seed=2)
    mask = {
        "none": None,
        "causal": causal_mask(torch.tensor([4, 2]), num_queries, num_keys),
        "padding": padding_mask(torch.tensor([9, 3]), num_keys),
    }[masking]
    expected = attention_reference(query, key, value, mask)
    torch.testing.assert_close(attention(query, key, value, mask), expected, atol=FLOAT64, rtol=FLOAT64)


def test_causal_mask_shows_the_context_and_the_block_up_to_the_query() -> None:
    assert causal_mask(torch.tensor([2]), 2, 5).tolist() == [[[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0,), (1,), (2,), (2, 3), (1, 17), (70,)])
def test_linear_equals_its_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = randn(*shape, 33).to(dtype), randn(21, 33, seed=1).to(dtype)
    actual, expected = linear(x, weight), linear_reference(x, weight)
    assert actual.shape == expected.shape and actual.dtype == dtype
    if actual.numel():
        assert ((actual - expected).double().norm() / expected.double().norm()).item() < BFLOAT16_RELATIVE
