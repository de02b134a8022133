"""Sizes of what the layers of a language model keep of a request, by its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from twotower_spec.config import ATTENTION, MAMBA, MLP, MOE, TORCH_DTYPES
from twotower_spec.errors import ArgumentError, CheckpointError

# Names of kinds of layers, old and new, in `layers_block_type` and `layer_types`.
_LETTERS = {
    "mamba": MAMBA,
    "linear_attention": MAMBA,
    "attention": ATTENTION,
    "full_attention": ATTENTION,
    "sliding_attention": ATTENTION,
    "moe": MOE,
    "mlp": MLP,
}


@dataclass(frozen=True)
class CacheShape:
    """Sizes of what the layers of a model keep of a request.

    Attributes:
        layers: one letter each; experts and MLPs keep nothing.
        num_kv_heads, head_dim: of attention layers.
        mamba_heads, mamba_head_dim, num_groups, state_size, taps: of Mamba-2 layers.
        dtype: of keys, values and convolution inputs.
        ssm_dtype: of SSM states.
    """

    layers: str
    num_kv_heads: int
    head_dim: int
    mamba_heads: int
    mamba_head_dim: int
    num_groups: int
    state_size: int
    taps: int
    dtype: torch.dtype
    ssm_dtype: torch.dtype

    @property
    def has_states(self) -> bool:
        """Whether there are Mamba layers."""
        return MAMBA in self.layers

    def on_rank(self, num_ranks: int) -> CacheShape:
        """Sizes on one of several tensor-parallel ranks: heads are shared out, one of each kind at least.

        Raises:
            ArgumentError: the heads of Mamba layers cannot be shared out.
        """
        if self.has_states and self.mamba_heads % num_ranks:
            raise ArgumentError(
                f"--tensor-parallel-size {num_ranks} does not divide the verifier's {self.mamba_heads} Mamba heads; "
                f"give a number that does"
            )
        return replace(
            self,
            num_kv_heads=max(1, self.num_kv_heads // num_ranks),
            mamba_heads=self.mamba_heads // num_ranks,
            num_groups=1 if self.num_groups % num_ranks else self.num_groups // num_ranks,
        )

    def state(self, num_speculative_tokens: int = 0) -> tuple[int, str]:
        """Bytes of one Mamba state of a request, and their formula.

        vLLM's states keep the convolution's inputs of all drafts beside, those of the drafter's pool do not.
        """
        channels = self.mamba_heads * self.mamba_head_dim + 2 * self.num_groups * self.state_size
        inputs, sizes = self.taps - 1 + num_speculative_tokens, (self.dtype.itemsize, self.ssm_dtype.itemsize)
        ssm = (self.mamba_heads, self.mamba_head_dim, self.state_size)
        num_layers = self.layers.count(MAMBA)
        num_bytes = num_layers * (channels * inputs * sizes[0] + ssm[0] * ssm[1] * ssm[2] * sizes[1])
        taps = f"({self.taps - 1} + {num_speculative_tokens})" if num_speculative_tokens else f"{self.taps - 1}"
        return num_bytes, (
            f"{num_layers} M x ({channels} x {taps} x {sizes[0]} B + {ssm[0]} x {ssm[1]} x {ssm[2]} x {sizes[1]} B)"
        )

    def keys_and_values(self) -> tuple[int, str]:
        """Bytes of one token of a request, and their formula."""
        num_layers, size = self.layers.count(ATTENTION), self.dtype.itemsize
        return num_layers * 2 * self.num_kv_heads * self.head_dim * size, (
            f"{num_layers} * x 2 x {self.num_kv_heads} x {self.head_dim} x {size} B"
        )


def cache_shape(raw: Mapping[str, Any], dtype: torch.dtype) -> CacheShape:
    """Reads sizes of what the layers of any language model keep of a request.

    Args:
        raw: content of its config.json.
        dtype: of its weights.

    Raises:
        CheckpointError: it has layers of a kind whose state is not known here, or a field is missing.
    """
    section = next((part for part in sections_of(raw) if "num_hidden_layers" in part or _pattern(part)), raw)
    if "kv_lora_rank" in section:
        raise CheckpointError("the verifier has latent attention, whose cache is not computed here")
    pattern = _pattern(section)
    kinds = section.get("layers_block_type") or section.get("layer_types")
    if pattern is None and isinstance(kinds, list):
        unknown = sorted({str(kind) for kind in kinds} - _LETTERS.keys())
        if unknown or ("linear_attention" in kinds and "mamba_num_heads" not in section):
            named = unknown[0] if unknown else "linear_attention"
            raise CheckpointError(f"the verifier has layers of the kind {named}, whose state is not computed here")
        pattern = "".join(_LETTERS[kind] for kind in kinds)
    recurrent = [name for name in section if name.startswith(("mamba_", "ssm_", "linear_", "conv_kernel"))]
    if pattern is None and recurrent:
        raise CheckpointError(f"the verifier's config.json has {recurrent[0]} and does not say which layers that means")
    if pattern is None:
        pattern = ATTENTION * _number(section, "num_hidden_layers")
    heads = _number(section, "num_attention_heads") if ATTENTION in pattern else 0
    return CacheShape(
        layers=pattern,
        num_kv_heads=_number(section, "num_key_value_heads", default=heads),
        head_dim=_number(section, "head_dim", default=_number(section, "hidden_size") // heads) if heads else 0,
        dtype=dtype,
        ssm_dtype=TORCH_DTYPES.get(section.get("mamba_ssm_cache_dtype", "float32"), torch.float32),
        **_mamba_fields(section, MAMBA in pattern),
    )


def _mamba_fields(section: Mapping[str, Any], has_states: bool) -> dict[str, int]:
    names = {
        "mamba_heads": ("mamba_num_heads",),
        "mamba_head_dim": ("mamba_head_dim",),
        "num_groups": ("n_groups", "mamba_n_groups"),
        "state_size": ("ssm_state_size",),
        "taps": ("conv_kernel", "mamba_d_conv"),
    }
    return {field: _number(section, *given) if has_states else 0 for field, given in names.items()}


def _pattern(section: Mapping[str, Any]) -> str | None:
    """Letters of the layers, where config.json gives them so."""
    pattern = section.get("hybrid_override_pattern")
    if not isinstance(pattern, str):
        return None
    for letter in pattern:
        if letter not in _LETTERS.values():
            raise CheckpointError(f"the verifier has layers {letter!r}, whose state is not computed here")
    return pattern


def _number(section: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    """The first of some fields, a positive integer."""
    value = next((section[name] for name in names if section.get(name) is not None), default)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 1 << 32:
        raise CheckpointError(f"{names[0]} in the verifier's config.json is {value!r}, not a positive integer")
    return value


def sections_of(raw: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The whole, and parts of models that have several."""
    return [raw, *(part for part in raw.values() if isinstance(part, dict))]


def dtype_of(raw: Mapping[str, Any]) -> torch.dtype:
    """Dtype that a config.json names, bfloat16 where it names none that is known."""
    for section in sections_of(raw):
        for name in ("dtype", "torch_dtype"):
            value = section.get(name)
            if isinstance(value, str) and value.removeprefix("torch.") in TORCH_DTYPES:
                return TORCH_DTYPES[value.removeprefix("torch.")]
    return torch.bfloat16
