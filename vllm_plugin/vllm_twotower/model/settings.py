"""Settings of vLLM for a TwoTower checkpoint as the verifier: every field of its config.json counts as it does here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from twotower_spec.config import MOE, TwoTowerConfig
from twotower_spec.errors import ArgumentError, ConfigError
from vllm_twotower import compat
from vllm_twotower.hook_table import hooks_of

# Fields of a TwoTower configuration that vLLM reads, by the names that it reads.
NAMES = {
    **{
        name: name
        for name in (
            "hidden_size",
            "vocab_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "mamba_num_heads",
            "mamba_head_dim",
            "n_groups",
            "ssm_state_size",
            "conv_kernel",
            "use_conv_bias",
            "n_routed_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "moe_shared_expert_intermediate_size",
            "n_group",
            "topk_group",
            "norm_topk_prob",
            "routed_scaling_factor",
            "intermediate_size",
        )
    },
    "layer_norm_epsilon": "norm_eps",
}

logger = logging.getLogger("vllm.twotower")


def prepare(engine_args: Any) -> TwoTowerConfig:
    """Has vLLM read the configuration of a TwoTower checkpoint as it is meant, and run none of the code beside it.

    Args:
        engine_args: `EngineArgs` whose model is a TwoTower checkpoint; changed in place.

    Returns:
        The configuration.

    Raises:
        TwoTowerError: vLLM lacks what is needed, or cannot compute what config.json asks for.
    """
    from vllm.platforms import current_platform

    name = engine_args.hf_config_path or engine_args.model
    missing = compat.missing_hooks(hooks_of("model", on_cpu=current_platform.is_cpu()))
    if missing:
        raise ArgumentError(
            f"{name} is a TwoTower checkpoint, and vLLM {compat.vllm_version()} lacks or has changed "
            f"{', '.join(hook.name for hook in missing)}, without which it cannot serve one by itself; use vLLM "
            f"{compat.CHECKED_VERSIONS[-1]}, or give the checkpoint as the speculative model of another verifier"
        )
    if engine_args.trust_remote_code:
        logger.info("TwoTower: %s is served with vLLM's own Nemotron-H model; no code of the checkpoint is run", name)
        engine_args.trust_remote_code = False
    config = TwoTowerConfig.from_pretrained(name, engine_args.revision)
    changes = _read_otherwise(config, _as_vllm_reads(name, engine_args.revision))
    given = engine_args.hf_overrides or {}
    if callable(given):
        engine_args.hf_overrides = partial(_with_changes, given, changes)
    else:
        engine_args.hf_overrides = {**changes, **given}
    return config


def check(config: TwoTowerConfig, model_config: Any) -> None:
    """Refuses what this device or dtype cannot compute, where vLLM would fail later or compute something else.

    Args:
        config: of the checkpoint.
        model_config: vLLM's, made for it.

    Raises:
        ConfigError: with the value and what is allowed.
    """
    from vllm.platforms import current_platform

    if config.experts_dtype is not None:
        raise ConfigError(
            f"{model_config.model} has experts in {config.experts_dtype}, which vLLM's model does not read; serve the "
            f"checkpoint that they were made from, this one can draft"
        )
    if config.residual_in_fp32 and model_config.dtype != torch.float32:
        dtype = str(model_config.dtype).removeprefix("torch.")
        raise ConfigError(
            f"residual_in_fp32 true of {model_config.model} cannot be served in {dtype}, where vLLM keeps the residual "
            f"stream in {dtype}, too; give --dtype float32"
        )
    if current_platform.is_cpu() and config.attention_layers:
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        sizes = CPUAttentionBackend.get_supported_head_sizes()
        if config.head_dim not in sizes:
            raise ConfigError(
                f"head_dim {config.head_dim} of {model_config.model} cannot be served on a CPU, where vLLM's attention "
                f"takes {', '.join(map(str, sizes))}; use a GPU, or generate_ar of twotower_spec"
            )


def _as_vllm_reads(name: str, revision: str | None) -> Any:
    from vllm.transformers_utils.config import get_config

    return get_config(name, trust_remote_code=False, revision=revision)


def _read_otherwise(config: TwoTowerConfig, read: Any) -> dict[str, Any]:
    """Fields that vLLM has to read otherwise than it does, by its names.

    Raises:
        ConfigError: a field asks for what only vLLM knows.
    """
    if read.hybrid_override_pattern != config.hybrid_override_pattern:
        raise ConfigError(
            f"config.json contradicts itself: hybrid_override_pattern is {config.hybrid_override_pattern!r} and "
            f"layers_block_type, by which vLLM goes, {read.hybrid_override_pattern!r}; keep the former"
        )
    for name in ("sliding_window", "moe_latent_size"):
        value = getattr(read, name, None)
        if value is not None:
            raise ConfigError(f"{name} {value!r} is not supported; TwoTower checkpoints are published without")
    wanted = {theirs: getattr(config, ours) for theirs, ours in NAMES.items()}
    if MOE in config.layer_kinds:
        wanted["n_shared_experts"] = 1  # of the width that is named, whatever the number
    return {name: value for name, value in wanted.items() if getattr(read, name, None) != value}


def _with_changes(given: Callable[[Any], Any], changes: Mapping[str, Any], config: Any) -> Any:
    config.update(dict(changes))
    return given(config)
