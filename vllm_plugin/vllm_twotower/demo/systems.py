"""What is compared, and how vLLM is set up for all of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twotower_spec.demo import trio_path

MAX_MODEL_LEN = 512
LARGEST_BATCH = 8


@dataclass(frozen=True)
class System:
    """A way to speculate.

    Attributes:
        name: as in the JSON file.
        title: as in the table.
        speculative_config: vLLM's; None for no speculation. A model of the trio is named by its word alone.
    """

    name: str
    title: str
    speculative_config: dict[str, Any] | None = None


# The numbers of drafts of both rivals are those that served them best: tokens/s at batch 1 and at batch 8, in one run
# on a busy machine (2 cores, one thread), where no speculation gave 100 and 479:
#   n-gram lookup    4: 105, 448    8: 110, 442
#   AR draft model   3: 149, 581    4: 147, 597    5: 145, 581    7: 163, 582    10: 158, 488
SYSTEMS = (
    System("none", "no speculation"),
    System(
        "ngram",
        "n-gram lookup",
        {"method": "ngram", "num_speculative_tokens": 8, "prompt_lookup_max": 5, "prompt_lookup_min": 2},
    ),
    System("draft_model", "AR draft model", {"method": "draft_model", "model": "draft", "num_speculative_tokens": 7}),
    # How many of the 15 are drafted is the adaptive policy's to decide, the default.
    System("twotower", "TwoTower", {"model": "twotower", "num_speculative_tokens": 15}),
)


def engine_arguments(system: System, verifier: Path | None = None) -> dict[str, Any]:
    """Arguments of `LLM()`, the same for all systems but for the speculation.

    Args:
        system: how to speculate.
        verifier: directory of another verifier than the bundled one.
    """
    speculative_config = dict(system.speculative_config or {})
    if "model" in speculative_config:
        speculative_config["model"] = str(trio_path(speculative_config["model"]))
    return {
        "model": str(verifier or trio_path("verifier")),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": LARGEST_BATCH,
        # Prompts come again in every repeat; a server's do not.
        "enable_prefix_caching": False,
        # Without them there are no numbers of drafts.
        "disable_log_stats": False,
        "speculative_config": speculative_config or None,
    }


def engine_environment() -> dict[str, str]:
    """What vLLM needs of the environment on a small CPU machine."""
    return {
        # One thread is about ten times as fast as the default. One engine works at a time, on whichever core is free.
        "OMP_NUM_THREADS": "1",
        # The n-gram lookup's Numba would give torch the threads that it finds, too.
        "NUMBA_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # The engine answers for itself, without a process of vLLM's in between.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
