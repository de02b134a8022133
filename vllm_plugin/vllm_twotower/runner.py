"""Choice between vLLM's model runners V1 and V2, made where settings are rewritten and looked up in every worker.

V2 takes no drafter from outside by name. A drafter of ours stands there as `ngram_gpu`, the one method without a draft
model that V2 and asynchronous scheduling know, and is told from vLLM's own by its model.

Importing this module imports neither vLLM nor torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
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
# vLLM takes V2 for certain where it is "1", in this process and in all that inherit it.
VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"


def chooses_v2(async_scheduling: bool | None) -> bool:
    """Whether the drafter runs on V2: where the variable says so, or asynchronous scheduling is asked for.

    Args:
        async_scheduling: as the user gave it.

    Raises:
        ArgumentError: it is asked for, and V2 is switched off.
    """
    value = os.environ.get(VARIABLE, "").strip()
    if async_scheduling and value == "0":
        from twotower_spec.errors import ArgumentError

        raise ArgumentError(
            f"--async-scheduling needs vLLM's model runner V2 where TwoTower drafts, and {VARIABLE}=0 switches that "
            f"off; leave out one of the two"
        )
    return bool(async_scheduling) or value not in ("", "0")


def insist_on_v2() -> None:
    """Makes V2 certain in this process and in those that it starts, also where vLLM would prefer V1."""
    os.environ[VARIABLE] = "1"


def drafts_on_v2(speculative_config: Any) -> bool:
    """Whether vLLM's speculative settings are those of our drafter on V2."""
    method, model = getattr(speculative_config, "method", None), getattr(speculative_config, "model", None)
    return method == V2_SETTINGS["method"] and model in PROPOSER_PATHS
