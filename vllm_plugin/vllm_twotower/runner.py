"""Choice between vLLM's model runners V1 and V2, made where settings are rewritten and looked up in every worker.

V2 takes no drafter from outside by name. A drafter of ours stands there as `ngram_gpu`, the one method without a draft
model that V2 and asynchronous scheduling know, and is told from vLLM's own by its model.

Importing this module imports neither vLLM nor torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from enum import Enum
from typing import Any

PROPOSER = "vllm_twotower.TwoTowerProposer"
PROPOSER_PATHS = (PROPOSER, "vllm_twotower.v1.proposer.TwoTowerProposer")

V1_SETTINGS: Mapping[str, Any] = {"method": "custom_class", "model": PROPOSER}
V2_SETTINGS: Mapping[str, Any] = {
    "method": "ngram_gpu",
    "model": PROPOSER,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 1,
}
# vLLM takes V2 where it is "1", and V1 where it is "0"; without it V2 where V2 can do what is asked for.
VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"
# Ours, for processes that this one starts, which are told nothing else before they read their configuration.
DRAFTS_ON_V2 = "TWOTOWER_DRAFTS_ON_V2"


class Wish(Enum):
    """Model runner that a user asks for."""

    V1, V2, NONE = range(3)

    @classmethod
    def of(cls, async_scheduling: bool | None) -> Wish:
        """Wish that the variable says, or asynchronous scheduling, which V1 does not have where we draft.

        Args:
            async_scheduling: as the user gave it.

        Raises:
            ArgumentError: it is asked for, and V2 is switched off.
        """
        value = os.environ.get(VARIABLE, "").strip()
        if async_scheduling and value == "0":
            from twotower_spec.errors import ArgumentError

            raise ArgumentError(
                f"--async-scheduling needs vLLM's model runner V2 where TwoTower drafts, and {VARIABLE}=0 switches "
                f"that off; leave out one of the two"
            )
        if async_scheduling or value not in ("", "0"):
            return cls.V2
        return cls.V1 if value else cls.NONE


def drafts_on_v2(speculative_config: Any) -> bool:
    """Whether vLLM's speculative settings are those of our drafter on V2."""
    method, model = getattr(speculative_config, "method", None), getattr(speculative_config, "model", None)
    return method == V2_SETTINGS["method"] and model in PROPOSER_PATHS


def drafter_of(runner: Any) -> Any:
    """The drafter in a model runner of vLLM, V1's or V2's; None where there is none."""
    return getattr(runner, "speculator", None) or getattr(runner, "drafter", None)
