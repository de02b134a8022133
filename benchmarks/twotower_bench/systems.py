"""Ways to speculate that are measured against each other, and how vLLM is set up for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twotower_bench.engines import EngineSpec
from twotower_bench.records import BASELINE, BASELINE_AGAIN, System

# Of the bundled trio: float32 is what it was trained in, and longer texts it has never seen.
TRIO_ARGUMENTS: Mapping[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512}

NO_SPECULATION = System(BASELINE, "no speculation")
NO_SPECULATION_AGAIN = System(BASELINE_AGAIN, "none again (A/A)")
# The numbers of drafts of both rivals are those that served them best on the trio: tokens/s at batch 1 and at batch 8,
# in one run on a busy machine (2 cores, one thread), where no speculation gave 100 and 479:
#   n-gram lookup    4: 105, 448    8: 110, 442
#   AR draft model   3: 149, 581    4: 147, 597    5: 145, 581    7: 163, 582    10: 158, 488
NGRAM = System(
    "ngram",
    "n-gram lookup",
    {"method": "ngram", "num_speculative_tokens": 8, "prompt_lookup_max": 5, "prompt_lookup_min": 2},
)
# Without its memory of earlier responses: prompts come again in every repeat, and it would draft its own answers.
SUFFIX = System("suffix", "suffix decoding", {"method": "suffix", "suffix_decoding_max_cached_requests": 0})
# The verifier's own layers for it, with as many drafts as the recipes of Nemotron-3 that have fewest.
MTP = System("mtp", "MTP", {"method": "mtp", "num_speculative_tokens": 3})


def draft_model(model: str | Path) -> System:
    """A small model that drafts one token after the other."""
    return System(
        "draft_model", "AR draft model", {"method": "draft_model", "model": str(model), "num_speculative_tokens": 7}
    )


def two_tower(model: str | Path) -> System:
    """TwoTower as it comes: how many of the 15 are drafted is the adaptive policy's to decide."""
    return System("twotower", "TwoTower", {"model": str(model), "num_speculative_tokens": 15})


def engine_spec(system: System, verifier: str | Path, arguments: Mapping[str, Any]) -> EngineSpec:
    """Arguments of `LLM()`, the same for all systems but for the speculation.

    Args:
        system: how to speculate.
        verifier: directory or hub id.
        arguments: all others.
    """
    config = system.speculative_config
    return EngineSpec(
        system.title,
        {
            "model": str(verifier),
            # Prompts come again in every repeat; a server's do not.
            "enable_prefix_caching": False,
            **arguments,
            "speculative_config": dict(config) if config else None,
        },
    )
