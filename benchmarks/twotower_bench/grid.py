"""Ways of TwoTower to draft that a sweep goes through, and how each is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any, get_args, get_type_hints

from twotower_bench.records import DraftSetting, System
from twotower_spec.config import check_integer, check_schedule
from twotower_spec.errors import ArgumentError

POLICIES: tuple[str, ...] = get_args(get_type_hints(DraftSetting)["policy"])
FIRST_TOKENS: tuple[str, ...] = get_args(get_type_hints(DraftSetting)["first_token"])
SMALLEST_ADAPTIVE_BLOCK = 4


def draft_settings(
    num_speculative_tokens: int | None = None,
    gammas: Sequence[float] = (0.8,),
    block_sizes: Sequence[int] = (16,),
    steps: Sequence[int] = (1,),
    policies: Sequence[str] = ("fixed",),
    first_token: str = "context",
) -> list[DraftSetting]:
    """All combinations, those that draft the same only once.

    One step commits everything, whatever the policy's schedule and gamma; a block takes no more steps than it has
    positions; `adaptive` takes block size and steps as its largest, and no larger block than holds the drafts.

    Args:
        num_speculative_tokens: K, drafts per round; no more than the block has. None for all of the block.
        gammas: confidence thresholds.
        block_sizes: S.
        steps: most denoising steps of a block.
        policies: of `POLICIES`.
        first_token: which tower makes the first draft.

    Raises:
        ArgumentError: a list is empty, or a value is not allowed.
    """
    if num_speculative_tokens is not None:
        check_integer("num_speculative_tokens", num_speculative_tokens, minimum=1)
    for name, values in (("gammas", gammas), ("block_sizes", block_sizes), ("steps", steps), ("policies", policies)):
        if not values:
            raise ArgumentError(f"{name} is empty, which leaves nothing to sweep; give at least one value")
    choices = [("policy", one, POLICIES) for one in policies] + [("first_token", first_token, FIRST_TOKENS)]
    for name, value, allowed in choices:
        if value not in allowed:
            raise ArgumentError(f"{name} {value!r} is not allowed; give one of {', '.join(allowed)}")
    for gamma, block_size, num_steps in product(gammas, block_sizes, steps):
        check_schedule(block_size, num_steps, gamma)
    found = (
        _setting(num_speculative_tokens, gamma, block_size, num_steps, policy, first_token)
        for policy, block_size, num_steps, gamma in product(policies, block_sizes, steps, gammas)
    )
    return list(dict.fromkeys(found))


def knobs_of(setting: DraftSetting) -> dict[str, Any]:
    """The content of `"twotower": {...}`, the model left out."""
    knobs = asdict(setting)
    del knobs["num_speculative_tokens"]
    return {name: value for name, value in knobs.items() if value is not None}


def speculative_config(setting: DraftSetting, model: str | Path) -> dict[str, Any]:
    """Builds the `speculative_config` that makes vLLM draft so, with a directory or hub id of TwoTower."""
    num_tokens = setting.num_speculative_tokens
    return {"model": str(model), "num_speculative_tokens": num_tokens, "twotower": knobs_of(setting)}


def system_of(setting: DraftSetting, model: str | Path) -> System:
    """A setting as a system, with a name that no other setting has, as `threshold-S16-4-g0.8`."""
    drafts, size, gamma = setting.num_speculative_tokens, setting.block_size, setting.confidence_threshold
    parts = [
        setting.policy,
        f"S{size}",
        *([] if drafts == size else [f"K{drafts}"]),
        str(setting.steps_per_block),
        *([] if gamma is None else [f"g{gamma:g}"]),
        *([] if setting.first_token == "context" else [setting.first_token]),
    ]
    title = f"TwoTower, {setting.name}" + ("" if gamma is None else f", gamma {gamma:g}")
    return System("-".join(parts), title, speculative_config(setting, model), setting)


def _setting(
    most: int | None, gamma: float, block_size: int, steps: int, policy: Any, first_token: Any
) -> DraftSetting:
    tokens = block_size if most is None else min(most, block_size)
    if policy == "adaptive":
        # It tries powers of two, and needs no larger one than holds the drafts.
        block_size = min(block_size, max(SMALLEST_ADAPTIVE_BLOCK, 1 << (tokens - 1).bit_length()))
    steps = min(steps, block_size)
    if policy == "threshold" and steps == 1:
        policy = "fixed"
    return DraftSetting(tokens, block_size, steps, policy, None if steps == 1 else gamma, first_token)
