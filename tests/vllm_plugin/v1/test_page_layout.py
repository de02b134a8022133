"""Keys and values are found where a backend writes them, whatever its layout; what cannot be read is refused."""

from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from twotower_spec import ArgumentError

if not find_spec("vllm"):
    pytest.skip("needs vLLM", allow_module_level=True)

from vllm_twotower.v1.page_layout import paged_views

KV_HEADS, HEAD_DIM = 2, 32


def cpu_layer(dtype: torch.dtype, page_size: int) -> Any:
    """Real attention of vLLM's CPU backend, without a model around it."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl, _get_attn_isa

    impl = object.__new__(CPUAttentionBackendImpl)
    impl.attn_type, impl.kv_cache_dtype = "decoder", "auto"
    return SimpleNamespace(
        impl=impl,
        attn_backend=CPUAttentionBackend,
        isa=_get_attn_isa(dtype, page_size, HEAD_DIM),
        num_kv_heads=KV_HEADS,
        head_size=HEAD_DIM,
        _k_scale_float=1.0,
        _v_scale_float=1.0,
    )


def gpu_layer(write: Any = None, kv_heads: int = KV_HEADS, head_dim: int = HEAD_DIM) -> Any:
    """A layer that writes as vLLM's FlashAttention, FlashInfer and Triton backends do, which run on a GPU alone."""

    def do_kv_cache_update(layer: Any, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
        key_cache, value_cache = cache.transpose(1, 2).split(head_dim, dim=-1)
        page_size = cache.shape[2]
        key_cache[slots // page_size, slots % page_size] = key
        value_cache[slots // page_size, slots % page_size] = value

    return SimpleNamespace(
        impl=SimpleNamespace(do_kv_cache_update=write or do_kv_cache_update),
        attn_backend=SimpleNamespace(get_name=lambda: "FLASH_ATTN"),
        num_kv_heads=kv_heads,
        head_size=head_dim,
    )


def engine_cache(layout: str, dtype: torch.dtype, page_size: int) -> Tensor:
    """Cache of one layer of three in vLLM's layouts, as [num_pages, kv_heads, page_size, content]."""
    sizes = {"L": 3, "B": 5, "H": KV_HEADS, "N": page_size, "C": 2 * HEAD_DIM}
    room = torch.zeros([sizes[axis] for axis in layout], dtype=dtype)
    return room.permute([layout.index(axis) for axis in "LBHNC"])[1]


def check(layer: Any, cache: Tensor) -> None:
    """Writes random keys through the backend, and reads them through the views."""
    keys, values = paged_views(layer, cache)
    page_size = cache.shape[2]
    assert keys.shape == values.shape == (len(cache), page_size, KV_HEADS, HEAD_DIM)
    assert keys.untyped_storage().data_ptr() == cache.untyped_storage().data_ptr()
    generator = torch.Generator().manual_seed(0)
    slots = torch.randperm(len(cache) * page_size, generator=generator)[: 2 * page_size + 1]
    key, value = torch.randn(2, len(slots), KV_HEADS, HEAD_DIM, generator=generator).to(cache.dtype)
    layer.impl.do_kv_cache_update(layer, key, value, cache, slots)
    assert torch.equal(keys[slots // page_size, slots % page_size], key)
    assert torch.equal(values[slots // page_size, slots % page_size], value)


@pytest.mark.usefixtures("mamba_layers")  # without them T's own state is not read
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page_size", [32, 96])
@pytest.mark.parametrize("layout", ["LBHNC", "BLHNC"])
def test_packed_keys_of_the_cpu_backend_are_found(dtype: torch.dtype, page_size: int, layout: str) -> None:
    check(cpu_layer(dtype, page_size), engine_cache(layout, dtype, page_size))


@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC"])
def test_every_layout_of_vllm_is_found(layout: str) -> None:
    check(gpu_layer(), engine_cache(layout, torch.bfloat16, 16))


def tiles_of_pairs(layer: Any, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Packs pairs of dimensions together, as matrix extensions want them: no strides say where a number is."""
    order = torch.arange(HEAD_DIM).view(-1, 4)[:, [0, 2, 1, 3]].flatten()
    cache[..., :HEAD_DIM] = key[..., order].unflatten(0, (len(cache), -1)).transpose(1, 2)
    cache[..., HEAD_DIM:] = value.unflatten(0, (len(cache), -1)).transpose(1, 2)


def rounded(layer: Any, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Keeps keys in fewer bits than they have."""
    cache[..., :HEAD_DIM] = (key // 16 * 16).unflatten(0, (len(cache), -1)).transpose(1, 2)
    cache[..., HEAD_DIM:] = value.unflatten(0, (len(cache), -1)).transpose(1, 2)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (tiles_of_pairs, "in a way that no strides describe"),
        (rounded, "packs or rounds keys"),
        (lambda *_: None, "packs or rounds keys"),
    ],
)
def test_what_cannot_be_read_is_refused(write: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=f"FLASH_ATTN {message}|FLASH_ATTN .*{message}"):
        paged_views(gpu_layer(write), engine_cache("LBHNC", torch.float32, 16))


def test_keys_in_eight_bits_are_refused() -> None:
    with pytest.raises(ArgumentError, match="not as numbers in pages"):
        paged_views(gpu_layer(), engine_cache("LBHNC", torch.uint8, 16))
