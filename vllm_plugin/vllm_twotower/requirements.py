"""What a verifier and a TwoTower checkpoint must have in common; refused at start, in one sentence."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from twotower_spec.config import TwoTowerConfig
from twotower_spec.drafting import shared_token_ids
from twotower_spec.errors import ArgumentError, CheckpointError
from twotower_spec.inspection import inspect_checkpoint
from vllm_twotower.config import DEFAULT_BLOCK_SIZE, TwoTowerSettings

logger = logging.getLogger("vllm.twotower")


def settings_from(knobs: Mapping[str, Any]) -> TwoTowerSettings:
    """Settings from knobs; the block size from config.json where no knob names one and the checkpoint does.

    Raises:
        ArgumentError: a knob is refused.
        ConfigError: there is no TwoTower configuration.
    """
    settings = TwoTowerSettings.from_knobs(knobs)
    if knobs.get("block_size") is not None:
        return settings
    config = TwoTowerConfig.from_pretrained(settings.model, settings.revision)
    return replace(settings, block_size=config.unknown_fields.get("block_size", DEFAULT_BLOCK_SIZE))


def check_requirements(
    settings: TwoTowerSettings, num_speculative_tokens: int, model_config: Any, parallel_config: Any
) -> TwoTowerSettings:
    """Refuses what cannot work, before anything is loaded.

    Args:
        settings: the knobs.
        num_speculative_tokens: drafts per request and step.
        model_config, parallel_config: vLLM's, of the verifier.

    Returns:
        The settings with the number of token ids that both models share.

    Raises:
        TwoTowerError: with the value, what is allowed, and the remedy.
    """
    settings.check_num_speculative_tokens(num_speculative_tokens)
    _check_runner(model_config, parallel_config)
    if settings.num_token_ids is not None:  # found out before, by the process that started this one
        return settings
    inspection = inspect_checkpoint(settings.model, revision=settings.revision)
    if inspection.problems or inspection.config is None:
        others = f" (and {len(inspection.problems) - 1} more)" if len(inspection.problems) > 1 else ""
        raise CheckpointError(
            f"{settings.model} cannot be loaded: {inspection.problems[0]}{others}; `twotower-spec inspect` lists all"
        )
    return replace(settings, num_token_ids=_shared_ids(settings, inspection.config, model_config))


def _check_runner(model_config: Any, parallel_config: Any) -> None:
    from vllm.platforms import current_platform

    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        raise ArgumentError(
            "VLLM_USE_V2_MODEL_RUNNER=1 forces a model runner that takes no drafter from outside; unset it, vLLM then "
            "takes the V1 runner by itself"
        )
    if parallel_config.pipeline_parallel_size > 1:
        raise ArgumentError(
            f"pipeline_parallel_size {parallel_config.pipeline_parallel_size} is not supported with a TwoTower "
            f"drafter; give 1 and use tensor parallelism"
        )
    if model_config.is_hybrid and current_platform.is_cpu():
        raise ArgumentError(
            f"{model_config.model} has Mamba layers, whose state vLLM does not take back after a rejected draft on a "
            f"CPU, so that any speculative decoding changes its text there; use an attention-only verifier, or a GPU"
        )


def _shared_ids(settings: TwoTowerSettings, config: TwoTowerConfig, model_config: Any) -> int:
    """How many ids both models share, by their tokenizers; by their sizes where there is none to compare."""
    rows = model_config.get_vocab_size()
    drafter = _tokenizer(settings.model, settings.revision, trust_remote_code=False)
    target = None
    if not model_config.skip_tokenizer_init:
        target = _tokenizer(model_config.tokenizer, model_config.tokenizer_revision, model_config.trust_remote_code)
    if drafter is not None and target is not None:
        return shared_token_ids(target, drafter, rows, config.vocab_size)
    if rows != config.vocab_size:
        raise ArgumentError(
            f"the verifier has {rows} token ids and the drafter {config.vocab_size}, and without both tokenizers it "
            f"cannot be seen whether they mean the same; put the tokenizer files into {settings.model}"
        )
    logger.warning(
        "No tokenizer of verifier or drafter could be read; that the same ids mean the same tokens is not checked."
    )
    return int(rows)


def _tokenizer(name: str, revision: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return found
