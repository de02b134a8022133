"""Hooks in vLLM's model runner that the proposer needs, installed only in the worker processes that draft."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker import gpu_model_runner

from vllm_twotower import compat
from vllm_twotower.drafter import announcing_steps
from vllm_twotower.hook_table import hooks_of
from vllm_twotower.v1 import cpu_repairs, hybrid_repairs
from vllm_twotower.v1.sampler import TwoTowerRejectionSampler

logger = init_logger("vllm.twotower.hooks")


def install(*, is_hybrid: bool) -> bool:
    """Wraps `GPUModelRunner.execute_model` and puts our rejection sampler into its module, once.

    The proposer is made in the runner's constructor, just before the sampler: the runner then finds ours.

    Args:
        is_hybrid: whether the verifier has Mamba layers, for which more is repaired.

    Returns:
        Whether this vLLM has all that drafting needs; otherwise there is one warning, and nothing is changed.
    """
    on_cpu = current_platform.is_cpu()
    missing = compat.missing_hooks(hooks_of("v1", on_cpu=on_cpu))
    if missing:
        logger.warning("%s", compat.warning_text(missing))
    if any(hook.need.required for hook in missing):
        return False
    if on_cpu:
        cpu_repairs.install()
    if is_hybrid and on_cpu:
        from vllm_twotower.v1 import cpu_hybrid

        cpu_hybrid.install()
    elif is_hybrid:
        hybrid_repairs.install()
    gpu_model_runner.RejectionSampler = TwoTowerRejectionSampler
    runner_class = gpu_model_runner.GPUModelRunner
    compat.wrap_once(runner_class, "execute_model", announcing_steps("drafter"))
    if not compat.rejection_sampler_runs_without_drafts():
        compat.wrap_once(runner_class, "_sample", sampling_without_drafts)
    return True


def sampling_without_drafts(stock: Any) -> Any:
    """Up to vLLM 0.31 a step without drafts goes past the rejection sampler; with this it does not, as from 0.32 on.

    Remove it together with `compat.rejection_sampler_runs_without_drafts`.
    """

    @wraps(stock)
    def _sample(self: Any, logits: Any, spec_decode_metadata: Any) -> Any:
        ours = isinstance(getattr(self, "rejection_sampler", None), TwoTowerRejectionSampler)
        if spec_decode_metadata is None and logits is not None and ours:
            spec_decode_metadata = metadata_without_drafts(len(logits), logits.device)
        return stock(self, logits, spec_decode_metadata)

    return _sample


def metadata_without_drafts(num_reqs: int, device: torch.device) -> Any:
    """How vLLM describes a step in which no request has drafts."""
    rows = torch.arange(num_reqs, dtype=torch.int32, device=device)
    nothing = rows[:0]
    return SpecDecodeMetadata(
        draft_token_ids=nothing,
        num_draft_tokens=[0] * num_reqs,
        cu_num_draft_tokens=torch.zeros_like(rows),
        cu_num_sampled_tokens=rows + 1,
        target_logits_indices=nothing,
        bonus_logits_indices=rows,
        logits_indices=rows,
    )
