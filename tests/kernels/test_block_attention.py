"""Attention in PyTorch: against softmax written out, and ragged requests against each of them alone."""

import pytest
import torch

from tests.support.builders import padding_mask
from tests.support.tolerances import FLOAT64
from twotower_kernels.block_attention import attention, causal_mask, ragged_attention
from twotower_kernels.block_attention.reference import attention_reference

HEAD_DIM = 10


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 3), (4, 4), (6, 1)])
@pytest.mark.parametrize(("queries", "prefixes"), [([1], [0]), ([3, 1, 5], [0, 17, 4]), ([1, 1], [3, 3])])
def test_every_request_gets_what_it_gets_alone(
    queries: list[int], prefixes: list[int], heads: int, kv_heads: int, causal: bool
) -> None:
    key_lens = [prefix + length for prefix, length in zip(prefixes, queries, strict=True)]
    query = randn(sum(queries), heads, HEAD_DIM)
    keys = [randn(1, n, kv_heads, HEAD_DIM, seed=1 + i) for i, n in enumerate(key_lens)]
    values = [randn(1, n, kv_heads, HEAD_DIM, seed=9 + i) for i, n in enumerate(key_lens)]
    allowed = [causal_mask(torch.tensor([p]), q, p + q) for p, q in zip(prefixes, queries, strict=True)]
    added = [torch.zeros(mask.shape[1:]).double().masked_fill_(~mask[0], -torch.inf) for mask in allowed]
    together = ragged_attention(
        query,
        [key.transpose(1, 2) for key in keys],
        [value.transpose(1, 2) for value in values],
        queries,
        added if causal else None,
    )
    alone = [
        attention(part[None], key, value, mask if causal else None)[0]
        for part, key, value, mask in zip(query.split(queries), keys, values, allowed, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone), atol=FLOAT64, rtol=FLOAT64)


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
