"""Features that a request can ask for, crossed in pairs: every pair is one request, all of them in one engine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import combinations
from typing import TYPE_CHECKING, Any

from tests.vllm_plugin.installed import keeps_allowed_tokens_apart

if TYPE_CHECKING:
    from tests.vllm_plugin.engine import Engine

# Of the bundled verifier's tokenizer.
FULL_STOP, SPACE, VOCABULARY = 17, 224, 2048

# Thinking begins where an answer does; a phrase of three tokens ends it.
REASONING = {"reasoning_start_str": "Answer:", "reasoning_end_str": "The answer is"}

# How features are asked for that have no sampling parameters, see `_prompt`.
LONG_PROMPT, SHARED_PREFIX = "a prompt read in pieces", "a prefix of others"
ALLOWED_TOKENS = "allowed tokens"

# Parameters by feature; those with "vllm" have a class of vLLM's, its arguments beside it.
FEATURES: dict[str, dict[str, Any]] = {
    LONG_PROMPT: {},
    SHARED_PREFIX: {},
    "min_tokens": {"min_tokens": 20, "stop_token_ids": [FULL_STOP]},
    "stop strings": {"stop": ["has", "=", "return"]},
    "penalties": {"repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.3},
    "bad words": {"bad_words": ["The answer", "return", " ="]},
    "logit_bias": {"logit_bias": {FULL_STOP: 2.0, SPACE: -3.0}},
    # Model runner V2 takes 1024 of them at most.
    ALLOWED_TOKENS: {"allowed_token_ids": [i for i in range(VOCABULARY) if i < 300 or i % 5 < 2]},
    "structured output": {
        "structured_outputs": {"vllm": "StructuredOutputsParams", "regex": r"[A-Z][a-z ]{5,30}(is|has) [0-9]{1,3}\."}
    },
    "logprobs": {"logprobs": 2},
    "named logprobs": {"logprob_token_ids": [5, 300]},
    "prompt logprobs": {"prompt_logprobs": 1},
    "thinking budget": {"thinking_token_budget": 8},
    "repetitions": {
        "repetition_detection": {"vllm": "RepetitionDetectionParams", "max_pattern_size": 8, "min_count": 3}
    },
}
# Only above temperature 0, where every request has a seed.
SAMPLED_FEATURES: dict[str, dict[str, Any]] = {
    "seed": {},
    "filters": {"top_k": 20, "top_p": 0.9, "min_p": 0.05},
    "several samples": {"n": 2},
}


def crossed(engine: Engine, sampled: bool) -> dict[str, Any]:
    """Outputs of one request for every pair of features, by the names of both.

    Of the pairs every `EVERY_NTH_PAIR`th of the environment, and those with a feature named `PAIRS_WITH` there.

    Args:
        engine: in which they run together.
        sampled: the pairs with a feature of sampled requests, or all others, greedy.
    """
    features = FEATURES | SAMPLED_FEATURES
    if not keeps_allowed_tokens_apart():  # all others would be told less than they may say
        del features[ALLOWED_TOKENS]
    pairs = [pair for pair in combinations(features, 2) if SAMPLED_FEATURES.keys().isdisjoint(pair) != sampled]
    every, named = int(os.environ.get("EVERY_NTH_PAIR", "1")), os.environ.get("PAIRS_WITH", "")
    chosen = [(i, pair) for i, pair in enumerate(pairs) if i % every == 0 and named in ("", *pair)]
    requests = []
    for i, pair in chosen:
        given = {name: value for one in pair for name, value in features[one].items()}
        draw = {"temperature": 0.9, "seed": i} if sampled else {}
        params = engine.params(max_tokens=28, **draw, **{name: _of_vllm(value) for name, value in given.items()})
        requests.append((" + ".join(pair), _prompt(engine, i, pair), params))
    found: dict[str, Any] = {}
    # vLLM without drafts gives named log-probabilities only where one request asks for them, also to those that do not.
    for asks in (False, True):
        together = [one for one in requests if bool(one[2].logprob_token_ids) == asks]
        rows = engine.llm.generate([one[1] for one in together], [one[2] for one in together], use_tqdm=False)
        found |= {name: _shown(row) for (name, *_), row in zip(together, rows, strict=True)}
    return found


def _prompt(engine: Engine, i: int, pair: tuple[str, str]) -> dict[str, list[int]]:
    """One of the usual prompts, with what the features want before it."""
    encode, prompts = engine.llm.get_tokenizer().encode, engine.prompts(10)
    ids = encode(prompts[i % 10])
    if SHARED_PREFIX in pair:
        ids = encode("\n\n".join(prompts))[:64] + ids
    if LONG_PROMPT in pair:
        ids = encode("\n\n".join(prompts[::-1]))[i : i + 140 - len(ids)] + ids
    return {"prompt_token_ids": ids}


def _of_vllm(value: Any) -> Any:
    if not isinstance(value, dict) or "vllm" not in value:
        return value
    from vllm import sampling_params

    return getattr(sampling_params, value["vllm"])(**{name: one for name, one in value.items() if name != "vllm"})


def _shown(row: Any) -> dict[str, Any]:
    """All that a client sees of an output, log-probabilities apart from the rest."""
    return {
        "text": [[list(one.token_ids), one.text, one.finish_reason, one.stop_reason] for one in row.outputs],
        "logprobs": [list(_values(one.logprobs)) for one in row.outputs] + [list(_values(row.prompt_logprobs))],
    }


def _values(positions: Any) -> Iterator[list[tuple[int, int | None, float]]]:
    """Token, rank and log-probability of every position; those of equal tokens in one order."""
    for row in positions or []:
        yield sorted((token, one.rank, one.logprob) for token, one in (row or {}).items())
