"""Table of what becomes of every sampling parameter of vLLM where TwoTower drafts, and a refusal at start.

The table has the fields of all supported versions. A version with a field that is not in it is found by the hooks of
`vllm_twotower.hook_table`: by the installed vLLM with one warning, and by `check_wheel` before it is installed.
Importing this module imports neither vLLM nor torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from importlib.metadata import entry_points
from typing import Any


class Handling(StrEnum):
    """Who answers for a field, so that it means what it means without drafts."""

    OURS = "our rejection sampler does what it asks for"
    STOCK = "vLLM's own code does: its processors of logits, called by ours, its scheduler or its front end"
    NO_DRAFTS = "vLLM's own code does, for one token at a time: requests that set it get no drafts"
    REFUSED = "refused by name: the request, or at start what would read it"


# Of `vllm.sampling_params.SamplingParams`.
OF_REQUESTS: Mapping[Handling, str] = {
    Handling.OURS: "temperature top_p top_k min_p seed logit_bias logprobs logprob_token_ids",
    Handling.STOCK: (
        "n presence_penalty frequency_penalty repetition_penalty allowed_token_ids bad_words _bad_words_token_ids "
        "structured_outputs stop stop_token_ids _all_stop_token_ids _eos_token_id ignore_eos max_tokens min_tokens "
        "repetition_detection prompt_logprobs flat_logprobs detokenize skip_special_tokens "
        "spaces_between_special_tokens include_stop_str_in_output output_kind output_text_buffer_length "
        "stream_interval skip_clone skip_reading_prefix_cache routed_experts_prompt_start"
    ),
    Handling.NO_DRAFTS: "thinking_token_budget",
    # By vLLM: it wants its newer runner for the first two, which answers them itself, has no third with speculative
    # decoding, and no engine whose watermarks the next two could turn off. The readers of the last, logits processors,
    # are refused below.
    Handling.REFUSED: (
        "prompt_logprob_token_ids prompt_logprob_start trace_decode_token_ids watermarking _watermarking_skipped "
        "extra_args"
    ),
}

# Of `vllm.v1.sample.metadata.SamplingMetadata`, which has the requests of a step.
OF_STEPS: Mapping[Handling, str] = {
    # `all_random` and `generators` are vLLM's way to draw; ours takes temperature and seed of every request.
    Handling.OURS: ("temperature all_greedy all_random top_p top_k generators max_num_logprobs logprob_token_ids"),
    Handling.STOCK: (
        "no_penalties prompt_token_ids frequency_penalties presence_penalties repetition_penalties output_token_ids "
        "spec_token_ids allowed_token_ids_mask bad_words_token_ids logitsprocs thinking_budget_state_holder"
    ),
}

# Entry points in which installed packages offer logits processors to vLLM.
LOGITS_PROCESSORS = "vllm.logits_processors"


def names(table: Mapping[Handling, str], *wanted: Handling) -> tuple[str, ...]:
    """Names of the fields that are handled in one of the wanted ways; of all fields where none is named."""
    return tuple(name for handling in wanted or tuple(table) for name in table[handling].split())


_NO_DRAFTS = names(OF_REQUESTS, Handling.NO_DRAFTS)


def allows_drafts(params: Any) -> bool:
    """Whether a request sets none of the parameters that vLLM follows one token at a time."""
    return all(getattr(params, name, None) is None for name in _NO_DRAFTS)


def check_logits_processors(model_config: Any) -> None:
    """Refuses logits processors from outside, whose state vLLM cannot take through a block of drafts.

    With speculative decoding vLLM ends at those that are named to it, late, and leaves installed ones out in silence.

    Args:
        model_config: vLLM's, of the verifier.

    Raises:
        ArgumentError: with their names.
    """
    from twotower_spec.errors import ArgumentError

    named = [str(getattr(one, "__name__", one)) for one in getattr(model_config, "logits_processors", None) or ()]
    installed = [
        f"{one.name} of {one.dist.name if one.dist else one.value}" for one in entry_points(group=LOGITS_PROCESSORS)
    ]
    if named or installed:
        raise ArgumentError(
            f"logits processors ({', '.join([*named, *installed])}) are applied one token at a time, which speculative "
            f"decoding does not do; start vLLM without logits_processors and without packages that bring them, or "
            f"without the drafter"
        )
