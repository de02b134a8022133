"""One context tower for both: the session that drafts from the verifier's own state, and what may stand in its way."""

from __future__ import annotations

import logging
from typing import Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.utils.torch_utils import is_quantized_kv_cache

from twotower_spec.config import TORCH_DTYPES
from twotower_spec.drafting import HostedSession
from twotower_spec.errors import first_line
from vllm_twotower import compat
from vllm_twotower.config import DrafterKnobs, FoundAtStart
from vllm_twotower.hook_table import hooks_of
from vllm_twotower.loading import load_towers
from vllm_twotower.v1.engine_context import EngineContext
from vllm_twotower.v1.page_layout import check_layout

logger = logging.getLogger("vllm.twotower.loading")


def load_hosted_session(
    knobs: DrafterKnobs, found: FoundAtStart, vllm_config: Any, device: torch.device, dtype: torch.dtype
) -> HostedSession:
    """Loads the denoiser alone, for a verifier that is the context tower; see `loading.load_session`."""
    model = load_towers(knobs, device, dtype, towers="denoiser")
    denoiser = model.denoiser
    session = HostedSession(
        model,
        EngineContext(model.config, denoiser.device, denoiser.dtype),
        knobs.policy_for(int(vllm_config.speculative_config.num_speculative_tokens), found.block_size, num_known=1),
        num_token_ids=found.num_token_ids,
    )
    session.warm_up()
    logger.info("TwoTower: %s drafts from the verifier's own state; %s", knobs.model, session.memory())
    return session


def obstacle(
    knobs: DrafterKnobs, found: FoundAtStart, vllm_config: Any, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Names what keeps the drafter from reading the verifier's state, so that it needs a context tower of its own.

    Args:
        knobs, found: of the drafter.
        vllm_config: vLLM's, of a verifier that is loaded and has no cache yet.
        device, dtype: of the verifier's weights.

    Returns:
        None where nothing does.
    """
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    own_dtype = dtype if knobs.dtype is None else TORCH_DTYPES[knobs.dtype]
    missing = compat.missing_hooks(hooks_of("own state"))
    for stands_in_the_way, reason in (
        (not found.drafts_for_itself, "the verifier is another model"),
        (missing, f"this vLLM lacks or has changed {', '.join(hook.name for hook in missing)}"),
        (
            parallel.tensor_parallel_size > 1,
            f"tensor_parallel_size {parallel.tensor_parallel_size} divides the verifier's state among its ranks",
        ),
        (knobs.context_device is not None, f"the knob context_device says where it is, on {knobs.context_device}"),
        (own_dtype != dtype, f"the knob dtype is {knobs.dtype}, and the verifier's {dtype}"),
        (dtype not in (torch.float32, torch.bfloat16), f"the towers do not compute in the verifier's {dtype}"),
        (is_quantized_kv_cache(cache.cache_dtype), f"the verifier's keys are kept as {cache.cache_dtype}"),
        (cache.mamba_cache_mode not in ("none", "align"), f"mamba_cache_mode is {cache.mamba_cache_mode}"),
        (getattr(cache, "use_replayssm", False), "ReplaySSM keeps no state per token"),
        (knobs.resolved(found.block_size).block_size == 1, "blocks of 1 have no room for drafts behind a known token"),
    ):
        if stands_in_the_way:
            return reason
    try:
        for layer in get_layers_from_vllm_config(vllm_config, Attention).values():
            check_layout(layer, dtype, device)
    except Exception as error:  # code of the backend runs
        return f"the verifier's cache cannot be read, {first_line(error)}"
    return None
