"""Requirements on a verifier and a TwoTower checkpoint; a pair that fails them is refused at start, in one sentence."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from twotower_spec.checkpoint import find_tokenizer
from twotower_spec.config import ARCHITECTURE, TwoTowerConfig
from twotower_spec.drafting import shared_token_ids
from twotower_spec.drafting.block_drafter import block_size_of
from twotower_spec.errors import ArgumentError, CheckpointError
from twotower_spec.inspection import inspect_checkpoint
from twotower_spec.towers.model import LEAST_CAPABILITY_OF_FLOAT8, computing_device
from vllm_twotower import compat
from vllm_twotower.config import FOUND, DrafterKnobs, FoundAtStart, knobs_in
from vllm_twotower.hook_table import SPECULATORS, hooks_of
from vllm_twotower.runner import VARIABLE, Wish, drafts_on_v2
from vllm_twotower.sampling_parameters import check_logits_processors

# Architectures with Mamba-2 layers that decode on a CPU with our repairs as they do without drafts.
MAMBA2_ON_CPU = ("NemotronHForCausalLM", ARCHITECTURE)

logger = logging.getLogger("vllm.twotower")


def configuration_of(vllm_config: Any) -> tuple[DrafterKnobs, FoundAtStart]:
    """Knobs and what was found at start, for a worker.

    Args:
        vllm_config: vLLM's; both are in its `additional_config`, the latter where our plugin was on at start.

    Raises:
        TwoTowerError: a knob, the checkpoint or the verifier is refused.
    """
    given = vllm_config.additional_config
    knobs = DrafterKnobs.parse(knobs_in(given))
    num_speculative_tokens = vllm_config.speculative_config.num_speculative_tokens
    return knobs, check_requirements(
        knobs,
        given.get(FOUND),
        num_speculative_tokens,
        vllm_config.model_config,
        vllm_config.parallel_config,
        on_v2=drafts_on_v2(vllm_config.speculative_config),
    )


def check_requirements(
    knobs: DrafterKnobs,
    found: Mapping[str, Any] | None,
    num_speculative_tokens: int | None,
    model_config: Any,
    parallel_config: Any,
    *,
    drafts_for_itself: bool = False,
    on_v2: bool = False,
) -> FoundAtStart:
    """Refuses what cannot work, before anything is loaded.

    Args:
        knobs: of the drafter.
        found: what another process found before; None looks into the checkpoint.
        num_speculative_tokens: drafts per request and step, as the user gave them; None for a whole block.
        model_config, parallel_config: vLLM's, of the verifier.
        drafts_for_itself: whether the drafter is the verifier's own checkpoint.
        on_v2: whether vLLM's model runner V2 will ask for drafts.

    Raises:
        TwoTowerError: with the value, what is allowed, and the remedy.
    """
    known = None if found is None else FoundAtStart(**found)
    block_size = knobs.block_size
    if block_size is None:
        block_size = block_size_of(knobs.model, knobs.revision) if known is None else known.block_size
    if num_speculative_tokens is not None:
        knobs.check_num_speculative_tokens(num_speculative_tokens, block_size)
    if on_v2:
        _check_v2(parallel_config)
    _check_verifier(model_config, parallel_config, on_v2)
    check_logits_processors(model_config)
    # With Ray the towers are on another machine, where this is asked again.
    if known is not None or parallel_config.distributed_executor_backend != "ray":
        _check_devices(knobs)
    if known is not None:
        return known
    inspection = inspect_checkpoint(knobs.model, revision=knobs.revision)
    if inspection.problems or inspection.config is None:
        others = f" (and {len(inspection.problems) - 1} more)" if len(inspection.problems) > 1 else ""
        raise CheckpointError(
            f"{knobs.model} cannot be loaded: {inspection.problems[0]}{others}; `twotower-spec inspect` lists all"
        )
    try:
        config = inspection.config.with_experts_dtype(knobs.experts_dtype)
        config.with_experts_per_token(knobs.experts_per_token)
        _check_experts(knobs, config.experts_dtype)
    except ArgumentError as error:
        raise ArgumentError(f"twotower knob {error}") from error
    return FoundAtStart(block_size, _shared_ids(knobs, inspection.config, model_config), drafts_for_itself)


def chooses_v2(wish: Wish, parallel_config: Any, *, drafts_for_itself: bool) -> bool:
    """Whether the drafter runs on vLLM's model runner V2; for the arguments see `reason_for_v1`."""
    reason = reason_for_v1(wish, parallel_config, drafts_for_itself=drafts_for_itself)
    if reason is not None:
        logger.info("TwoTower: drafting on vLLM's model runner V1: %s", reason)
    return reason is None


def reason_for_v1(wish: Wish, parallel_config: Any, *, drafts_for_itself: bool) -> str | None:
    """Says why the drafter runs on vLLM's model runner V1; None where it runs on V2.

    It does as the user wishes, and else V2 where vLLM would run V2 itself.

    Args:
        wish: of the user.
        parallel_config: vLLM's, of the verifier.
        drafts_for_itself: whether the drafter is the verifier's own checkpoint, of which V1 needs one tower less.
    """
    if wish is not Wish.NONE:
        return None if wish is Wish.V2 else f"{VARIABLE}=0 asks for it"
    reason = _obstacle_to_v2(parallel_config)
    if reason is None and drafts_for_itself:
        reason = "there a model that drafts for itself needs no second context tower"
    return reason


def _check_v2(parallel_config: Any) -> None:
    """Refuses what does not work on vLLM's model runner V2.

    Raises:
        ArgumentError: ranks that share work as V1's do not, or this vLLM.
    """
    if getattr(parallel_config, "enable_batch_sharded_sampling", None):
        raise ArgumentError(
            "enable_batch_sharded_sampling is not tried with a TwoTower drafter, whose sampler every rank runs for all "
            "requests; leave it out"
        )
    if getattr(parallel_config, "prefill_context_parallel_size", 1) > 1:
        raise ArgumentError(
            f"prefill_context_parallel_size {parallel_config.prefill_context_parallel_size} is not tried with a "
            f"TwoTower drafter; give 1"
        )
    obstacle = _obstacle_to_v2(parallel_config)
    if obstacle is not None:
        raise ArgumentError(f"{obstacle}; set {VARIABLE}=0 and leave --async-scheduling out, vLLM then takes V1")


def _obstacle_to_v2(parallel_config: Any) -> str | None:
    """Says what keeps vLLM from running model runner V2 with our drafter, as vLLM decides it; None where nothing."""
    from vllm.triton_utils import HAS_TRITON

    if not HAS_TRITON:
        return "model runner V2 needs Triton, which vLLM does not find here or does not use"
    if compat.missing_hooks([hook for hook in hooks_of("v2") if hook.module == SPECULATORS]):
        return f"model runner V2 of vLLM {compat.vllm_version()} takes no drafter from outside, that of 0.32 does"
    if parallel_config.use_ubatching:
        return "model runner V2 does not overlap two halves of a batch where there are drafts"
    return None


def _check_devices(knobs: DrafterKnobs) -> None:
    for name in ("context_device", "denoiser_device"):
        device = getattr(knobs, name)
        try:
            if device is not None:
                computing_device(device)
        except ArgumentError as error:
            raise ArgumentError(f"twotower knob {name}: {error}") from error


def _check_experts(knobs: DrafterKnobs, experts_dtype: str | None) -> None:
    """Refuses experts that this machine's GPUs do not multiply by; without waking the GPUs, as workers are forked."""
    from vllm.platforms import current_platform

    if experts_dtype != "float8_e4m3fn" or not current_platform.is_cuda():
        return
    on_cpu = [device == "cpu" for device in (knobs.context_device, knobs.denoiser_device or knobs.context_device)]
    if not all(on_cpu) and not current_platform.has_device_capability(LEAST_CAPABILITY_OF_FLOAT8):
        least = ".".join(map(str, LEAST_CAPABILITY_OF_FLOAT8))
        raise ArgumentError(
            f"experts_dtype 'float8_e4m3fn' needs a GPU of compute capability {least}, which "
            f"{current_platform.get_device_name()} has not; give 'int8', made from a checkpoint whose experts are not "
            f"quantised"
        )


def _check_verifier(model_config: Any, parallel_config: Any, on_v2: bool) -> None:
    from vllm.platforms import current_platform

    if parallel_config.pipeline_parallel_size > 1:
        raise ArgumentError(
            f"pipeline_parallel_size {parallel_config.pipeline_parallel_size} is not supported with a TwoTower "
            f"drafter; give 1 and use tensor parallelism"
        )
    if model_config.is_hybrid:
        check_hybrid(model_config, on_cpu=current_platform.is_cpu(), on_v2=on_v2)


def check_hybrid(model_config: Any, *, on_cpu: bool, on_v2: bool = False) -> None:
    """Refuses a verifier with Mamba layers whose states cannot be taken back after a rejected draft.

    Args:
        model_config: vLLM's, of the verifier.
        on_cpu: whether it runs on a CPU, where more is repaired.
        on_v2: whether vLLM's model runner V2 runs it, which needs no repair elsewhere.

    Raises:
        ArgumentError: this vLLM lacks a place that is repaired, or, on a CPU, the architecture is not one of those
            whose layers are.
    """
    architecture = model_config.architecture
    if on_cpu and architecture not in MAMBA2_ON_CPU:
        raise ArgumentError(
            f"{model_config.model} is a {architecture}{_kinds_of(model_config)}, whose recurrent states vLLM does not "
            f"take back on a CPU after a rejected draft; use a verifier with attention alone or a "
            f"{' or '.join(MAMBA2_ON_CPU)}, or a GPU"
        )
    missing = [] if on_v2 and not on_cpu else compat.missing_hooks(hooks_of("hybrid", on_cpu=on_cpu))
    if missing:
        raise ArgumentError(
            f"{model_config.model} has Mamba layers, and vLLM {compat.vllm_version()} lacks or has changed "
            f"{', '.join(hook.name for hook in missing)}, without which drafts would change its text; use vLLM 0.32, "
            f"or a verifier with attention alone"
        )


def _kinds_of(model_config: Any) -> str:
    """Names the kinds of its recurrent layers, where its config.json does."""
    config = getattr(model_config, "hf_text_config", None)
    named = getattr(config, "layers_block_type", None) or getattr(config, "layer_types", None) or ()
    others = ("attention", "full_attention", "sliding_attention", "moe", "mlp")
    kinds = dict.fromkeys(str(kind) for kind in named if kind not in others)
    return f" with layers of the kind {', '.join(kinds)}" if kinds else ""


def _shared_ids(knobs: DrafterKnobs, config: TwoTowerConfig, model_config: Any) -> int:
    """How many ids both models share, by their tokenizers; by their sizes where there is none to compare."""
    rows = model_config.get_vocab_size()
    reasons: list[str] = []
    drafter = _tokenizer(knobs.model, knobs.revision, False, reasons)
    target = None
    if not model_config.skip_tokenizer_init:
        trusts = model_config.trust_remote_code
        target = _tokenizer(model_config.tokenizer, model_config.tokenizer_revision, trusts, reasons)
    if drafter is not None and target is not None:
        return shared_token_ids(target, drafter, rows, config.vocab_size)
    if rows != config.vocab_size:
        raise ArgumentError(
            f"the verifier has {rows} token ids and the drafter {config.vocab_size}, and without both tokenizers it "
            f"cannot be seen whether they mean the same; put the tokenizer files into {knobs.model}"
        )
    logger.warning(
        "TwoTower: that verifier and drafter mean the same tokens by their ids is not checked (%s); put the verifier's "
        "tokenizer files into %s.",
        ", ".join(reasons) or "one of them has no tokenizer",
        knobs.model,
    )
    return int(rows)


def _tokenizer(
    name: str, revision: str | None, trust_remote_code: bool, reasons: list[str]
) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model; None where there is none, or where it cannot be read, which is one more reason."""
    try:
        return find_tokenizer(name, revision, trust_remote_code)
    except (CheckpointError, ArgumentError) as error:
        reasons.append(str(error).partition(";")[0])
        return None
