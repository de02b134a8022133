"""Real vLLM on a verifier with Mamba layers, with drafts that are made to be right, wrong or of any number.

Each engine is in a process of its own. The drafts come from `ReplayProposer`, which knows how every text goes on.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from tests.support.nemotron_h import VOCABULARY
from tests.vllm_plugin.engine import end_engine
from tests.vllm_plugin.fork_server import results_of
from twotower_bench.servers.forked_server import fork_workers

LENGTHS = (17, 33, 5, 64, 90, 8, 40, 21)  # of the prompts
ENGINE = {
    "block_size": 32,
    "max_model_len": 512,
    "max_num_seqs": 8,
    "num_gpu_blocks_override": 400,
    "enable_prefix_caching": False,
}

# Texts with their prompts, by which `ReplayProposer` knows how each goes on, and what it makes of them.
_known: list[np.ndarray[Any, Any]] = []
_drafts = ""


class ReplayProposer:
    """Drafter of vLLM's `custom_class` that proposes known texts: "perfect", "partial" (right up to a random place),
    "random" (wrong) or "ragged" (as "partial", and of a random number)."""

    def __init__(self, vllm_config: Any):
        self.most = vllm_config.speculative_config.num_speculative_tokens
        self.rng = np.random.default_rng(5)

    def load_model(self, model: Any) -> None:
        """Loads nothing."""

    def propose(self, sampled: Any, num_tokens: Any, token_ids: Any, **_: Any) -> list[list[int]]:
        """Drafts for every row that has new tokens."""
        return [
            self._drafts_of(token_ids[row, : int(num_tokens[row])]) if new else [] for row, new in enumerate(sampled)
        ]

    def _drafts_of(self, tokens: Any) -> list[int]:
        num = len(tokens)
        known = (text[num:] for text in _known if len(text) >= num and (text[:num] == tokens).all())
        following = next(known, ())  # a text that has gone wrong is not known
        drafts = self.rng.integers(3, VOCABULARY, self.most)
        right = {"perfect": self.most, "random": 0}.get(_drafts, int(self.rng.integers(0, self.most + 1)))
        right = min(right, len(following))
        drafts[:right] = following[:right]
        length = int(self.rng.integers(0, self.most + 1)) if _drafts == "ragged" else self.most
        return [int(token) for token in drafts[:length]]


def replaying(num_speculative_tokens: int) -> dict[str, Any]:
    """Speculative settings with `ReplayProposer`."""
    return {
        "method": "custom_class",
        "model": f"{__name__}.ReplayProposer",
        "num_speculative_tokens": num_speculative_tokens,
    }


def run_hybrid(
    model: Path,
    speculative_config: dict[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    *,
    known: Sequence[Sequence[int]] = (),
    drafts: str = "",
    without: Sequence[str] = (),
    passes: int = 1,
    lengths: Sequence[int] = LENGTHS,
    shared: int = 0,
    max_tokens: int = 64,
    **engine_args: Any,
) -> dict[str, Any]:
    """Texts of eight requests from a fresh engine, and what happened on the way.

    Args:
        model: checkpoint.
        speculative_config: vLLM's.
        environment: variables beside those of all engines.
        known, drafts: texts with their prompts, and what `ReplayProposer` makes of them.
        without: functions of `hybrid_repairs` that leave vLLM's as it is.
        passes: times that the same requests come; the texts of the last time count.
        lengths: of the prompts, in tokens.
        shared: tokens with which all prompts begin, beside.
        max_tokens: of every text.
        engine_args: beside `ENGINE`.

    Returns:
        "texts" with their prompts, and numbers: "left_out" (times that a running request was in no step) and "told"
        (rows whose kind the runner would have mistaken), both as the repairs saw them, "preemptions", "drafted",
        "accepted" and "cached" (prompt tokens from the prefix cache).
    """
    order = {
        "model": str(model),
        "speculative_config": speculative_config,
        "known": [list(text) for text in known],
        "drafts": drafts,
        "without": list(without),
        "passes": passes,
        "lengths": list(lengths),
        "shared": shared,
        "max_tokens": max_tokens,
        "engine_args": {**ENGINE, **engine_args},
    }
    found, _ = results_of(f"{__name__}:write_results", json.dumps(order), environment)
    results: dict[str, Any] = found
    return results


def write_results(order: str, output: str) -> None:
    """Runs an engine in this process."""
    from vllm import LLM, SamplingParams

    from vllm_twotower.v1 import hybrid_repairs

    given = json.loads(order)
    _known.extend(np.array(text) for text in given["known"])
    globals()["_drafts"] = given["drafts"]
    for name in given["without"]:
        patch.object(hybrid_repairs, name, lambda stock: stock).start()
    seen = Counter[str]()

    def count(key: str, name: str) -> None:
        real = getattr(hybrid_repairs, name)

        def counting(*args: Any) -> Any:
            found = real(*args)
            seen[key] += len(found)
            return found

        patch.object(hybrid_repairs, name, counting).start()

    count("left_out", "_left_out")
    count("told", "other_prompt_lengths")
    rng = np.random.default_rng(0)
    shared = rng.integers(3, VOCABULARY, given["shared"]).tolist()
    prompts = [shared + rng.integers(3, VOCABULARY, length).tolist() for length in given["lengths"]]
    fork_workers()
    llm = LLM(
        model=given["model"],
        enforce_eager=True,
        skip_tokenizer_init=True,
        disable_log_stats=False,
        speculative_config=given["speculative_config"],
        **{"dtype": "float32", **given["engine_args"]},
    )
    params = SamplingParams(temperature=0, max_tokens=given["max_tokens"], ignore_eos=True, detokenize=False)
    for _ in range(given["passes"]):
        rows = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    metrics = {one.name: getattr(one, "value", 0) for one in llm.get_metrics()}
    results = {
        "texts": [[*row.prompt_token_ids, *row.outputs[0].token_ids] for row in rows],
        **seen,
        "preemptions": metrics["vllm:num_preemptions"],
        "drafted": metrics.get("vllm:spec_decode_num_draft_tokens", 0),
        "accepted": metrics.get("vllm:spec_decode_num_accepted_tokens", 0),
        "cached": sum(row.num_cached_tokens or 0 for row in rows),
    }
    Path(output).write_text(json.dumps(results))
    end_engine(llm.llm_engine)
