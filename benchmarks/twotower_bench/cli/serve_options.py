"""Options of `bench serve` alone; what is not allowed is an `ArgumentError`, before anything starts."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from twotower_bench.cli.options import numbers
from twotower_bench.engine_flags import engine_flags
from twotower_bench.records import Traffic
from twotower_bench.systems import TRIO_ARGUMENTS
from twotower_spec.checkpoint import encode_texts, load_tokenizer
from twotower_spec.demo import trio_path
from twotower_spec.errors import ArgumentError

FEWEST_SEQUENCES = 16
# What each server is told by us.
TAKEN = frozenset(
    [
        "--host",
        "--port",
        "--model",
        "--served-model-name",
        "--speculative-config",
        "--speculative-model",
        "--spec-model",
        "--spec-method",
        "--spec-tokens",
        "--api-key",
    ]
)


def traffics_of(concurrency: str, request_rate: str) -> tuple[Traffic, ...]:
    """Closed loops, then open ones.

    Args:
        concurrency, request_rate: numbers with commas; empty for none.
    """
    closed = numbers("--concurrency", concurrency, int) if concurrency.strip() else []
    opened = numbers("--request-rate", request_rate, float) if request_rate.strip() else []
    traffics = [Traffic(concurrency=number) for number in closed] + [Traffic(request_rate=rate) for rate in opened]
    if not traffics:
        raise ArgumentError("--concurrency and --request-rate are both empty; give at least one load, like 4")
    return tuple(dict.fromkeys(traffics))


def serve_arguments(text: str, ours: Mapping[str, Any]) -> tuple[str, ...]:
    """Arguments of `vllm serve` for all systems.

    Args:
        text: the user's, as in a shell; they come last.
        ours: what the verifier needs, as `LLM()` takes it.
    """
    try:
        given = shlex.split(text)
    except ValueError as error:
        raise ArgumentError(f"--serve-args {text!r} cannot be split ({error}); quote as in a shell") from error
    taken = [part for part in given if part.partition("=")[0] in TAKEN]
    if taken:
        raise ArgumentError(f"--serve-args has {taken[0]}, which is set for each server; leave it out")
    return (*engine_flags(ours), *given)


def most_at_once(traffics: Sequence[Traffic]) -> int:
    """Requests that servers of the bundled trio hold at once."""
    return max(FEWEST_SEQUENCES, largest_loop(traffics))


def largest_loop(traffics: Sequence[Traffic]) -> int:
    """Requests at once in the largest closed loop; 0 without one."""
    return max((one.concurrency for one in traffics if one.concurrency), default=0)


def check_lengths(prompts: Sequence[str], max_new_tokens: int) -> None:
    """Refuses prompts that do not fit the bundled trio."""
    tokenizer = load_tokenizer(trio_path("verifier"))
    assert tokenizer is not None
    longest = max(map(len, encode_texts(tokenizer, prompts)))
    most = int(TRIO_ARGUMENTS["max_model_len"])
    if longest + max_new_tokens > most:
        raise ArgumentError(
            f"prompts of up to {longest} tokens with --max-new-tokens {max_new_tokens} do not fit the bundled "
            f"verifier's {most}; give fewer new tokens, other prompts or another --verifier"
        )
