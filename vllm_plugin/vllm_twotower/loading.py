"""Loads towers and drafter as knobs and vLLM's configuration say; all memory that they will need is taken here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch

from twotower_kernels.block_scan import LongScan, register_long_scan, varlen_scan
from twotower_spec.config import TORCH_DTYPES
from twotower_spec.drafting import DraftingSession
from twotower_spec.model import TwoTowerModel
from vllm_twotower.config import DrafterKnobs, FoundAtStart

logger = logging.getLogger("vllm.twotower.loading")

Session = TypeVar("Session", bound=DraftingSession)


def load_session(
    knobs: DrafterKnobs,
    found: FoundAtStart,
    vllm_config: Any,
    device: torch.device,
    dtype: torch.dtype,
    kind: Callable[..., Session],
    **options: Any,
) -> Session:
    """Loads both towers and allocates the state pool and all workspaces; one line in the log says how much went where.

    To be called before vLLM measures what is left for its own cache.

    Args:
        knobs, found: of the drafter.
        vllm_config: vLLM's.
        device, dtype: as in `load_towers`.
        kind: of session.
        options: that this kind takes besides.

    Raises:
        TwoTowerError: the checkpoint is refused.
    """
    num_requests, num_tokens = knobs.pool_size(vllm_config)
    model = load_towers(knobs, device, dtype)
    session = kind(
        model,
        knobs.policy_for(int(vllm_config.speculative_config.num_speculative_tokens), found.block_size),
        first_token=knobs.first_token,
        num_slots=num_requests,
        num_tokens=num_tokens,
        token_budget=knobs.prefill_budget,
        num_token_ids=found.num_token_ids,
        max_context_tokens=int(vllm_config.model_config.max_model_len),
        cuda_graphs=_wants_graphs(vllm_config.model_config),
        **options,
    )
    session.warm_up()
    logger.info("TwoTower: %s, %s; %s", knobs.model, str(model.dtype).removeprefix("torch."), session.memory())
    return session


def _wants_graphs(model_config: Any) -> bool:
    """Whether vLLM runs graphs, and keeps its memory where it is: they hold addresses in it."""
    moves = any(getattr(model_config, name, False) for name in ("enable_sleep_mode", "enable_cumem_allocator"))
    return not model_config.enforce_eager and not moves


def load_towers(
    knobs: DrafterKnobs, device: torch.device, dtype: torch.dtype, towers: Literal["both", "denoiser"] = "both"
) -> TwoTowerModel:
    """Loads both towers, whose long prompts are read by vLLM's own scan, or the denoiser alone.

    Args:
        knobs: of the drafter.
        device: the verifier's; for towers that no knob places.
        dtype: of the verifier's weights; bfloat16 stands in for what the towers cannot compute in.
        towers: that are loaded.

    Raises:
        TwoTowerError: the checkpoint is refused.
    """
    # What kernels and towers say of their choices stands in vLLM's log.
    for name in ("twotower_kernels", "twotower_spec"):
        logging.getLogger(name).parent = logging.getLogger("vllm")
    register_long_scan("vllm", _vllm_scan)
    context_device = str(device) if knobs.context_device is None else knobs.context_device
    denoiser_device = context_device if knobs.denoiser_device is None else knobs.denoiser_device
    if knobs.dtype is not None:
        dtype = TORCH_DTYPES[knobs.dtype]
    elif dtype not in (torch.float32, torch.bfloat16):
        dtype = torch.bfloat16
    return TwoTowerModel.from_pretrained(
        knobs.model,
        revision=knobs.revision,
        towers=towers,
        dtype=dtype,
        denoiser_experts_per_token=knobs.experts_per_token,
        experts_dtype=knobs.experts_dtype,
        context_device=context_device,
        denoiser_device=denoiser_device,
    )


def _vllm_scan() -> LongScan:
    """vLLM's own chunk scan, for long prompts of the context tower."""
    from vllm.model_executor.layers.mamba.ops.ssd_combined import mamba_chunk_scan_combined_varlen

    return varlen_scan(mamba_chunk_scan_combined_varlen)
