"""The knobs of `"twotower": {...}`, checked by name, what is found beside them, and what both make of the drafter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, Literal, get_args

from twotower_kernels.acceptance import AcceptanceRule
from twotower_spec.config import EXPERT_DTYPES, TORCH_DTYPES, check_integer, check_schedule
from twotower_spec.drafting import AdaptivePolicy, DraftPolicy, FixedPolicy, ThresholdPolicy
from twotower_spec.drafting.block_drafter import MOST_OFFSETS, FirstToken
from twotower_spec.drafting.session import DEFAULT_NUM_TOKENS, MOST_DEFAULT_SLOTS, MOST_DRAFT_TOKENS
from twotower_spec.errors import ArgumentError
from twotower_spec.state.context_state import DEFAULT_TOKEN_BUDGET

# Keys of vLLM's `additional_config`.
KNOBS = "twotower"
FOUND = "twotower_found"
# Knob that the settings are freed of: the drafter is the verifier's own checkpoint.
SELF = "self"

PolicyName = Literal["adaptive", "fixed", "threshold", "off"]

SMALLEST_ADAPTIVE_BLOCK = 4


@dataclass(frozen=True)
class DrafterKnobs:
    """How TwoTower drafts for a verifier: what a user gives, in `"twotower": {...}`.

    Attributes:
        model: TwoTower checkpoint, a directory or a hub id.
        revision: branch, tag or commit of a hub id.
        policy: "adaptive" drafts for the requests for which it pays, as much as pays; "fixed" takes
            `steps_per_block` steps; "threshold" is the published schedule; "off" drafts nothing.
        block_size: positions that are denoised, at least `num_speculative_tokens`; the most of them for "adaptive".
            None for the checkpoint's.
        steps_per_block: most denoising steps; None for 1 ("fixed") or one per position.
        confidence_threshold: what is above it is committed before the last step.
        first_token: first draft from the "context" tower or the "denoiser".
        verification: above temperature 0, "one-hot", or "coupled", with which a seed gives one text, drafted or not.
        context_device, denoiser_device: where the towers are; None for the verifier's device, and for the context
            tower's.
        dtype: of both towers; None for the verifier's.
        experts_dtype: of the routed experts of both towers, quantised while they load; None for the checkpoint's.
        experts_per_token: experts that a token of a block visits in the denoiser; None for the checkpoint's.
        pool_requests: requests whose context is held at once; None for as many as vLLM runs, 64 at most.
        pool_tokens: tokens that are held at once; None for 2048 per request, or what a request can have.
        prefill_budget: most tokens that the context tower reads in a round.
        pad_drafts: whether all rows get as many drafts, by repeating the last one, so that vLLM's CUDA graph of the
            whole step fits; None for where there are such graphs.
        log_interval_s: seconds between two lines in the log; 0 for none.

    Raises:
        ArgumentError: a value is out of range.
    """

    model: str
    revision: str | None = None
    policy: PolicyName = "adaptive"
    block_size: int | None = None
    steps_per_block: int | None = None
    confidence_threshold: float = 0.8
    first_token: FirstToken = "context"
    verification: AcceptanceRule = "one-hot"
    context_device: str | None = None
    denoiser_device: str | None = None
    dtype: str | None = None
    experts_dtype: str | None = None
    experts_per_token: int | None = None
    pool_requests: int | None = None
    pool_tokens: int | None = None
    prefill_budget: int = DEFAULT_TOKEN_BUDGET
    pad_drafts: bool | None = None
    log_interval_s: float = 10.0

    def __post_init__(self) -> None:
        """Refuses values out of range."""
        for name, allowed in (
            ("policy", get_args(PolicyName)),
            ("verification", get_args(AcceptanceRule)),
            ("first_token", get_args(FirstToken)),
            ("dtype", (None, *TORCH_DTYPES)),
            ("experts_dtype", (None, *EXPERT_DTYPES)),
        ):
            _check_choice(name, getattr(self, name), allowed)
        check_integer("prefill_budget", self.prefill_budget, minimum=1)
        for name in ("steps_per_block", "experts_per_token", "pool_requests", "pool_tokens"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), minimum=1)
        if self.block_size is not None:
            check_integer("block_size", self.block_size, minimum=1, maximum=MOST_OFFSETS)
        check_schedule(1, 1, self.confidence_threshold)
        for name in ("model", "revision", "context_device", "denoiser_device"):
            _check_text(name, getattr(self, name), may_be_none=name != "model")
        if self.pad_drafts is not None and not isinstance(self.pad_drafts, bool):
            raise ArgumentError(f"pad_drafts {self.pad_drafts!r} is not allowed; give true or false")
        _check_seconds("log_interval_s", self.log_interval_s)

    @classmethod
    def parse(cls, knobs: Mapping[str, Any]) -> DrafterKnobs:
        """Checks the content of `"twotower": {...}`.

        Raises:
            ArgumentError: a knob is unknown or its value not allowed; it is named.
        """
        known = [*(field.name for field in fields(cls)), SELF]
        for name in knobs:
            if name not in known:
                near = get_close_matches(name, known, n=1)
                hint = f", did you mean {near[0]}" if near else ""
                raise ArgumentError(f"twotower knob {name!r} is not there{hint}; allowed are {', '.join(known)}")
        if knobs.get("model") is None:
            raise ArgumentError("no TwoTower checkpoint is named; give its directory or hub id as the model")
        try:
            return cls(**knobs)
        except ArgumentError as error:
            raise ArgumentError(f"twotower knob {error}") from error

    def check_num_speculative_tokens(self, num_speculative_tokens: int, default_block_size: int) -> None:
        """Refuses more drafts than a block has.

        Args:
            num_speculative_tokens: drafts per request and step, as the user gave them.
            default_block_size: where no knob names one.

        Raises:
            ArgumentError: with both numbers; or it is no number that vLLM can verify.
        """
        check_integer("num_speculative_tokens", num_speculative_tokens, minimum=1, maximum=MOST_DRAFT_TOKENS)
        block_size = self.resolved(default_block_size).block_size
        assert block_size is not None
        if num_speculative_tokens > block_size:
            raise ArgumentError(
                f"num_speculative_tokens {num_speculative_tokens} is more than block_size {block_size}; give "
                f"{block_size} or fewer, or a larger block_size in the twotower knobs"
            )

    def resolved(self, default_block_size: int) -> DrafterKnobs:
        """Fills in block size and steps where none are named."""
        block_size = default_block_size if self.block_size is None else self.block_size
        default_steps = 1 if self.policy == "fixed" else block_size
        steps = default_steps if self.steps_per_block is None else self.steps_per_block
        return replace(self, block_size=block_size, steps_per_block=steps)

    def policy_for(
        self, num_speculative_tokens: int, default_block_size: int, num_known: int = 0
    ) -> DraftPolicy | None:
        """Makes the policy; None for "off".

        Args:
            num_speculative_tokens: most drafts per request and step.
            default_block_size: where no knob names one.
            num_known: positions at the beginning of a block that are no drafts.
        """
        knobs = self.resolved(default_block_size)
        block_size, steps, threshold = knobs.block_size, knobs.steps_per_block, knobs.confidence_threshold
        assert block_size is not None and steps is not None
        tokens = min(num_speculative_tokens, block_size - num_known)
        match self.policy:
            case "adaptive":
                sizes = adaptive_block_sizes(block_size, tokens + num_known)
                return AdaptivePolicy(sizes, min(steps, max(sizes)), threshold)
            case "fixed":
                return FixedPolicy(block_size, steps, threshold, tokens)
            case "threshold":
                return ThresholdPolicy(block_size, steps, threshold, tokens)
            case "off":
                return None

    def pool_size(self, vllm_config: Any) -> tuple[int, int]:
        """Requests and tokens that the pool holds."""
        requests, tokens = self.pool_requests, self.pool_tokens
        if requests is None:
            requests = min(int(vllm_config.scheduler_config.max_num_seqs), MOST_DEFAULT_SLOTS)
        if tokens is None:
            tokens = requests * min(int(vllm_config.model_config.max_model_len), DEFAULT_NUM_TOKENS)
        return requests, tokens

    def pads_drafts(self, vllm_config: Any) -> bool:
        """Whether rows are padded to one number of drafts."""
        if self.pad_drafts is not None:
            return self.pad_drafts
        on_cuda = vllm_config.device_config.device_type == "cuda"
        return on_cuda and not vllm_config.model_config.enforce_eager


@dataclass(frozen=True)
class FoundAtStart:
    """Values from verifier and checkpoint, looked up once, by the process that starts vLLM.

    It travels beside the knobs, in `"twotower_found": {...}`.

    Attributes:
        block_size: positions of a block at start: the knob's, or else the checkpoint's.
        num_token_ids: ids that verifier and drafter share.
        drafts_for_itself: whether the drafter is the verifier's own checkpoint, so that the context is read already.

    Raises:
        ArgumentError: a value is out of range.
    """

    block_size: int
    num_token_ids: int
    drafts_for_itself: bool = False

    def __post_init__(self) -> None:
        """Refuses values out of range."""
        check_integer("block_size", self.block_size, minimum=1)
        check_integer("num_token_ids", self.num_token_ids, minimum=1)


def knobs_in(holder: Mapping[str, Any] | None) -> dict[str, Any]:
    """Copies the content of `"twotower": {...}`, {} where there is none.

    Args:
        holder: vLLM's `speculative_config` or `additional_config`.

    Raises:
        ArgumentError: it is no object.
    """
    knobs = holder.get(KNOBS) if isinstance(holder, Mapping) else None
    if knobs is not None and not isinstance(knobs, Mapping):
        raise ArgumentError(f"twotower {knobs!r} is not allowed; give an object of knobs, {{}} for none")
    return dict(knobs or {})


def adaptive_block_sizes(block_size: int, num_tokens: int) -> list[int]:
    """Powers of two from 4 up to the first that holds all tokens, and the given size where that is smaller."""
    sizes = [block_size]
    size = SMALLEST_ADAPTIVE_BLOCK
    while size < min(block_size, num_tokens):
        sizes.append(size)
        size *= 2
    if size < block_size:  # no larger block is of use
        sizes[0] = size
    return sorted(sizes)


def _check_text(name: str, value: object, may_be_none: bool) -> None:
    if not (isinstance(value, str) and value) and not (value is None and may_be_none):
        raise ArgumentError(f"{name} {value!r} is not allowed; give text")


def _check_seconds(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ArgumentError(f"{name} {value!r} is not allowed; give a number of seconds, 0 for none")


def _check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        names = ", ".join(str(choice) for choice in allowed if choice is not None)
        raise ArgumentError(f"{name} {value!r} is not allowed; give one of {names}")
