"""The bundled trio in real vLLM: `python3 -m twotower_bench.gpu.serving DEVICE FILE`.

No speculation, n-gram lookup, a draft model, TwoTower by the fixed and by the adaptive policy, each in an engine of its
own, on both model runners. In float32 their texts are compared with that of no speculation; in bfloat16 their speeds.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from twotower_bench.child_process import ChildError, ended_by_signals
from twotower_bench.engines import EnginePool, EngineProcess
from twotower_bench.engines.messages import Asked, Served, ServeOrder
from twotower_bench.environment import Runner, on_runner
from twotower_bench.gpu.rows import RowFile
from twotower_bench.records import System
from twotower_bench.systems import NGRAM, NO_SPECULATION, TRIO_ARGUMENTS, draft_model, engine_spec, two_tower
from twotower_spec.demo import trio_path
from twotower_spec.evaluation import Prompt, load_prompts

DTYPES = ("float32", "bfloat16")
NUM_PROMPTS, NEW_TOKENS, CONCURRENCY = 16, 64, 8
# Small models side by side, and in float32 the attention that has it.
ON_CUDA: Mapping[str, Any] = {"gpu_memory_utilization": 0.06, "kv_cache_memory_bytes": 1 << 30}
ATTENTION_IN_FLOAT32 = {"attention_backend": "TRITON_ATTN"}
# Longer than an engine takes to load beside the others, or to serve an order.
LONGEST_SILENCE_S = 120.0

Texts = list[tuple[int, ...]]


def systems() -> list[System]:
    """Lists what is compared, no speculation first."""
    adaptive = replace(two_tower(trio_path("twotower")), name="adaptive", title="TwoTower, adaptive")
    fixed_config = {**(adaptive.speculative_config or {}), "twotower": {"policy": "fixed"}}
    fixed = replace(adaptive, name="fixed", title="TwoTower, fixed", speculative_config=fixed_config)
    return [NO_SPECULATION, NGRAM, draft_model(trio_path("draft")), fixed, adaptive]


def arguments_of(dtype: str, on_cuda: bool) -> dict[str, Any]:
    """Arguments of `LLM()` for all systems."""
    more = {**ON_CUDA, **(ATTENTION_IN_FLOAT32 if dtype == "float32" else {})} if on_cuda else {}
    return {**TRIO_ARGUMENTS, **more, "dtype": dtype, "max_num_seqs": CONCURRENCY}


def measure_runner(
    rows: RowFile,
    runner: Runner,
    compared: Sequence[System],
    dtypes: Sequence[str],
    prompts: Sequence[Prompt],
    new_tokens: int = NEW_TOKENS,
    on_cuda: bool = True,
) -> int:
    """Measures systems on one runner; what fails is a row that says why.

    Args:
        rows: get one row for every engine and number of requests at once.
        runner: model runner of vLLM.
        compared: systems, no speculation first.
        dtypes: of the verifier and its drafters.
        prompts: any number.
        new_tokens: of each text.
        on_cuda: where engines run.

    Returns:
        Engines that failed, or whose text in float32 was another one.
    """
    specs = {
        f"{system.name}, {dtype}": replace(
            engine_spec(system, trio_path("verifier"), arguments_of(dtype, on_cuda)), environment=on_runner(runner)
        )
        for dtype in dtypes
        for system in compared
    }
    num_wrong = 0
    with EnginePool(specs, longest_silence_s=LONGEST_SILENCE_S) as pool:
        pool.start(specs)  # all at once: most of what a start takes is the host's work
        for dtype in dtypes:
            expected: dict[int, Texts] = {}
            for system in compared:
                same = {"runner": runner, "system": system.name, "dtype": dtype}
                label = f"{runner}, {dtype}, {system.title}"
                try:
                    engine = pool.use(f"{system.name}, {dtype}")
                    for at_once in (1,) if dtype == "float32" else (1, CONCURRENCY):
                        served = _served(engine, prompts, at_once, new_tokens)
                        texts = [request.token_ids for request in served.requests]
                        if system is NO_SPECULATION:
                            expected[at_once] = texts
                        num_equal = _num_equal(texts, expected.get(at_once))
                        num_wrong += dtype == "float32" and num_equal != len(texts)
                        _note(rows, label, same, at_once, served, num_equal)
                except ChildError as error:
                    reason = str(error)
                    rows.add(f"{label}: FAILED: {reason[-300:]}", **same, failure=reason[-4000:])
                    num_wrong += 1
    return num_wrong


def _served(engine: EngineProcess, prompts: Sequence[Prompt], at_once: int, new_tokens: int) -> Served:
    """Generates twice, of which the second time counts."""
    token_ids = engine.tokenize([prompt.text for prompt in prompts])
    asked = [Asked(prompt.prompt_id, prompt.category, ids) for prompt, ids in zip(prompts, token_ids, strict=True)]
    order = ServeOrder(tuple(asked), at_once, new_tokens)
    engine.serve(order)
    return engine.serve(order)


def _num_equal(texts: Texts, expected: Texts | None) -> int | None:
    """Counts texts that are those of no speculation; None where there are none."""
    return None if expected is None else sum(ours == theirs for ours, theirs in zip(texts, expected, strict=True))


def _note(
    rows: RowFile, label: str, same: Mapping[str, str], at_once: int, served: Served, num_equal: int | None
) -> None:
    """Writes what an engine did."""
    num_tokens = sum(len(request.token_ids) for request in served.requests)
    steps = sum(len(request.num_accepted_tokens) for request in served.requests)
    accepted = sum(sum(request.num_accepted_tokens) for request in served.requests)
    length = 1 + accepted / steps if steps else 1.0
    equal = "texts not compared" if num_equal is None else f"{num_equal} of {len(served.requests)} texts equal"
    speed = num_tokens / served.seconds
    rows.add(
        f"{label}, {at_once} at once: {speed:.0f} tokens/s, acceptance length {length:.2f}, {equal}",
        **same,
        concurrency=at_once,
        tokens_per_s=speed,
        acceptance_length=length,
        num_texts=len(served.requests),
        num_equal=num_equal,
        num_rounds=served.drafting.rounds if served.drafting else 0,
    )


def main(device: str, file: str) -> int:
    """Measures all on both runners; on a CPU, for a trial, one text in float32 on V1."""
    rows = RowFile(Path(file))
    with ended_by_signals():
        if device == "cpu":
            one_text = load_prompts("trio", limit=1)
            num_wrong = measure_runner(rows, "V1", systems(), ["float32"], one_text, new_tokens=16, on_cuda=False)
        else:
            prompts = load_prompts("trio", limit=NUM_PROMPTS)
            num_wrong = sum(measure_runner(rows, runner, systems(), DTYPES, prompts) for runner in get_args(Runner))
    return int(num_wrong > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
