"""Scenarios of requests in a serving engine; each returns what must be the same with and without drafts.

Tests ask `run_engine` for them by name.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any
from unittest.mock import patch

import numpy as np

from tests.vllm_plugin import features
from tests.vllm_plugin.engine import Engine, Request, is_on_v2
from tests.vllm_plugin.installed import samples_on_a_cpu
from twotower_spec.drafting import AdaptivePolicy, FixedPolicy

LONG = 150


def batches(engine: Engine) -> Any:
    """Every batch size from 1 to 10."""
    prompts = engine.prompts(10)
    return [engine.generate(prompts[-size:], max_tokens=24 if size > 1 else 120) for size in range(1, 11)]


def joining_and_leaving(engine: Engine) -> Any:
    """Requests come every other step and are of different lengths, so that rows are swapped all the time."""
    requests = [
        Request(prompt, engine.params(max_tokens=5 + 11 * (i % 4)), arrives_at=2 * i)
        for i, prompt in enumerate(engine.prompts(10))
    ]
    return _sorted(engine.step_through(requests))


def abort(engine: Engine) -> Any:
    """Aborts some requests; returns what the others get."""
    requests = [
        Request(prompt, engine.params(max_tokens=400 if i % 3 == 1 else 40), aborted_at=3 if i % 3 == 1 else None)
        for i, prompt in enumerate(engine.prompts(8))
    ]
    found = _sorted(engine.step_through(requests))
    assert [index for index, _ in found] == [0, 2, 3, 5, 6]
    return found


def prefix_cache(engine: Engine) -> Any:
    """The same long prompt twice, and one that begins like it."""
    long = "\n\n".join(engine.prompts(3))
    found = [engine.generate([long]), engine.generate([long]), engine.generate([long + engine.prompts(4)[-1]])]
    assert engine.metric("vllm:prefix_cache_hits") > 0
    return found


def lengths(engine: Engine) -> Any:
    """Every small max_tokens, so that blocks are cut everywhere."""
    return [engine.generate(engine.prompts(2), max_tokens=count) for count in range(1, 19)]


def stops(engine: Engine) -> Any:
    """Stop strings and stop tokens inside blocks, kept or cut."""
    rows = engine.outputs(engine.prompts(6), max_tokens=60, stop=["has", "return", "="])
    kept = engine.outputs(engine.prompts(6), max_tokens=60, stop=["(", "."], include_stop_str_in_output=True)
    texts = [[row.outputs[0].text, row.outputs[0].stop_reason] for row in rows + kept]
    common = engine.generate(engine.prompts(1), max_tokens=30)[0][0][20]
    return [texts, engine.generate(engine.prompts(6), max_tokens=60, stop_token_ids=[common])]


def min_tokens(engine: Engine) -> Any:
    """Texts that would end before the smallest length that is asked for."""
    common = engine.generate(engine.prompts(1), max_tokens=30)[0][0][10]
    found = engine.generate(engine.prompts(6), max_tokens=60, min_tokens=25, stop_token_ids=[common])
    assert all(len(row[0]) >= 25 for row in found)
    return found


def logprobs(engine: Engine) -> Any:
    """Log-probabilities of output and prompt, values too."""
    rows = engine.outputs(engine.prompts(4), max_tokens=24, logprobs=3, prompt_logprobs=1)
    return [[_logprobs(row.outputs[0].logprobs), _logprobs(row.prompt_logprobs[1:])] for row in rows]


def logprobs_of_named_tokens(engine: Engine) -> Any:
    """Log-probabilities of tokens that requests name: each request alone, and all together."""
    asked: list[dict[str, Any]] = [
        {"logprob_token_ids": [5, 300]},
        {"logprob_token_ids": [300, 5, 17, 224], "flat_logprobs": True},
        {"logprob_token_ids": [5, 300], "logprobs": 2, "repetition_penalty": 1.3},
        {"logprobs": 3},
        {"logprobs": -1},
        {},
    ]
    prompts = engine.prompts(len(asked))
    params = [engine.params(max_tokens=24, **one) for one in asked]
    rows = [engine.llm.generate([p], [one], use_tqdm=False)[0] for p, one in zip(prompts, params, strict=True)]
    together = engine.llm.generate(prompts, params, use_tqdm=False)
    return {"alone": _with_logprobs(rows), "together": _with_logprobs(together)}


def refusals(engine: Engine) -> dict[str, str]:
    """Messages to a client that asks for what cannot be had with drafts."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    said = {}
    for name in {"prompt_logprob_token_ids", "trace_decode_token_ids"} & SamplingParams.__annotations__.keys():
        # vLLM 0.32 wants ids for each token of a prompt, 0.31 those for all.
        value: Any = [[5]] if "list[list[int]]" in str(SamplingParams.__annotations__[name]) else [5]
        try:
            said[name] = str(engine.generate(engine.prompts(1), **{name: value}))
        except (ValueError, VLLMValidationError) as error:
            said[name] = str(error)
    return said


def penalties(engine: Engine) -> Any:
    """Penalties one by one and together, and one request with them beside others without."""
    prompts = engine.prompts(4)
    found = [
        engine.generate(prompts, repetition_penalty=1.2),
        engine.generate(prompts, presence_penalty=0.8),
        engine.generate(prompts, frequency_penalty=0.5, presence_penalty=0.3, repetition_penalty=1.1),
    ]
    mixed = [
        Request(prompt, engine.params(presence_penalty=1.0 if i == 1 else 0.0)) for i, prompt in enumerate(prompts)
    ]
    return [*found, _sorted(engine.step_through(mixed))]


def forbidden_tokens(engine: Engine) -> Any:
    """Bad words, allowed tokens and biases change the text as they do without drafts."""
    prompts = engine.prompts(3)
    plain = engine.generate(prompts)
    used = sorted({token for row in plain for token in row[0]})
    tokenizer = engine.llm.get_tokenizer()
    return [
        engine.generate(prompts, bad_words=[tokenizer.decode([plain[0][0][3]])]),
        engine.generate(prompts, allowed_token_ids=used[::2]),
        engine.generate(prompts, logit_bias=dict.fromkeys(used[:5], -5.0)),
        engine.generate(prompts, min_p=0.2),
    ]


def structured_outputs(engine: Engine) -> Any:
    """Regular expression, JSON schema and choice, beside a request without any."""
    from vllm.sampling_params import StructuredOutputsParams

    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "count": {"type": "integer"}},
        "required": ["name", "count"],
    }
    wanted = [
        StructuredOutputsParams(regex=r"The answer is [0-9]{1,3} pens\."),
        StructuredOutputsParams(json=schema),
        StructuredOutputsParams(choice=["seventeen pens", "seventy pens", "nothing"]),
        None,
    ]
    prompts = engine.prompts(4)
    alone = [engine.generate([prompts[0]], structured_outputs=one, max_tokens=48) for one in wanted[:3]]
    together = [
        Request(prompt, engine.params(structured_outputs=one, max_tokens=48))
        for prompt, one in zip(prompts, wanted, strict=True)
    ]
    return [alone, _sorted(engine.step_through(together))]


def draft_most_rounds() -> None:
    """Before the engine is made: in three rounds of four the adaptive policy drafts, whatever the clock says.

    By the clock alone it would draft nothing on a machine that has other things to do, and be tested by nothing.
    """

    def may_skip(policy: AdaptivePolicy) -> bool:
        return policy._num_rounds % 4 == 3

    AdaptivePolicy.may_skip = property(may_skip, lambda policy, value: None)  # type: ignore[assignment]


def know_a_reasoning_parser() -> None:
    """Before the engine is made: thinking lasts until the word "step"."""
    from vllm.reasoning import ReasoningParserManager
    from vllm.reasoning.deepseek_r1_reasoning_parser import DeepSeekR1ReasoningParser

    class UntilStep(DeepSeekR1ReasoningParser):  # type: ignore[misc]
        """The first piece of the vocabulary that a verifier writes before it works something out."""

        start_token, end_token = "Question", "\u0120step"  # a space and the word

    ReasoningParserManager.register_module("until_step", module=UntilStep)


def structured_outputs_after_thinking(engine: Engine) -> Any:
    """A grammar that begins to hold in the middle of what is written, and so in the middle of drafts."""
    from vllm.sampling_params import StructuredOutputsParams

    requests = [
        Request(
            prompt,
            engine.params(
                max_tokens=32,
                **({} if i % 4 == 3 else {"structured_outputs": StructuredOutputsParams(regex=regex)}),
            ),
            arrives_at=i,
        )
        for i, (prompt, regex) in enumerate(
            itertools.product(engine.prompts(10)[::2], [r" (up|by)[a-z ]{4,20}[!?]", r"( [0-9]{1,2}){2,5};"])
        )
    ]
    texts = {index: row.outputs[0].text for index, row in engine.stream(requests) if row.finished}
    assert sum(" step" in text and text[-1] in "!?;" for text in texts.values()) > 4
    return [[index, texts[index]] for index in sorted(texts)]


def streaming(engine: Engine) -> Any:
    """Pieces of text as they come, put together."""
    from vllm.sampling_params import RequestOutputKind

    requests = [
        Request(prompt, engine.params(max_tokens=48, output_kind=RequestOutputKind.DELTA))
        for prompt in engine.prompts(4)
    ]
    texts = dict.fromkeys(range(4), "")
    for index, row in engine.stream(requests):
        texts[index] += row.outputs[0].text
    return [texts[index] for index in range(4)]


def greedy_beside_sampled(engine: Engine) -> Any:
    """Greedy requests in a batch with sampled ones, with and without seeds; only the greedy ones are compared."""
    requests = [
        Request(prompt, engine.params(temperature=0.9 * (i % 2), top_k=20 if i % 4 == 1 else 0, seed=i or None))
        for i, prompt in enumerate(engine.prompts(8))
    ]
    return [row for row in _sorted(engine.step_through(requests)) if row[0] % 2 == 0]


def preemption(engine: Engine) -> Any:
    """More requests than blocks: some are thrown out and come back."""
    before = engine.metric("vllm:num_preemptions")
    found = engine.generate(engine.prompts(6), max_tokens=LONG)
    assert engine.metric("vllm:num_preemptions") > before
    return found


def chunked_prefill(engine: Engine) -> Any:
    """Prompts of more tokens than a step may have."""
    prompts = ["\n\n".join(engine.prompts(10)[i:]) for i in range(2)]
    tokenizer = engine.llm.get_tokenizer()
    cut = [{"prompt_token_ids": tokenizer.encode(prompt)[:170]} for prompt in prompts]
    return engine.generate([*cut, *engine.prompts(3)], max_tokens=20)


def seed_and_a_prompt_in_pieces(engine: Engine) -> Any:
    """Without drafts: vLLM's error, and what our repair gives, from pieces and then from the prefix cache at once."""
    from vllm_twotower.v1 import cpu_repairs

    ids = engine.llm.get_tokenizer().encode("\n\n".join(engine.prompts(10)))[:129]
    prompts = [{"prompt_token_ids": ids}, {"prompt_token_ids": ids[:20]}]

    def sampled() -> Any:
        return engine.generate(prompts, temperature=0.9, seed=1, top_k=30)

    try:
        stock = sampled()
    except RuntimeError as error:
        stock = str(error)
        engine.core.abort_request(list(engine.core.output_processor.request_states), internal=True)
    cpu_repairs.install()
    found = [sampled()]
    hits = engine.metric("vllm:prefix_cache_hits")
    found.append(sampled())
    return {"stock": stock, "repaired": found, "hits": engine.metric("vllm:prefix_cache_hits") - hits}


def near_max_model_len(engine: Engine) -> Any:
    """One request runs into max_model_len while others have room."""
    tokenizer = engine.llm.get_tokenizer()
    ids = tokenizer.encode("\n\n".join(engine.prompts(10)))
    assert len(ids) > 190
    prompts = [{"prompt_token_ids": ids[-count:]} for count in (180, 190, 100)]
    found = engine.generate(prompts, max_tokens=1000)
    assert [len(row[0]) for row in found[:2]] == [12, 2]
    return found


def seeded_samples(engine: Engine) -> Any:
    """Sampled text with seeds: filters, several samples, penalties, log-probabilities, alone and in a batch."""
    prompts = engine.prompts(4)
    found: list[Any] = [
        engine.generate(prompts, temperature=0.8, seed=11),
        engine.generate(prompts, temperature=1.1, seed=12, top_k=20),
        engine.generate(prompts, temperature=1.0, seed=13, top_p=0.9),
        engine.generate(prompts, temperature=1.3, seed=14, min_p=0.1, top_k=50, top_p=0.95),
        engine.generate(prompts, temperature=0.9, seed=15, n=3),
        engine.generate(prompts, temperature=0.9, seed=16, presence_penalty=0.6),
        engine.generate(prompts, temperature=0.9, seed=17, logit_bias={5: 2.0}, min_tokens=20),
    ]
    rows = engine.outputs(prompts, temperature=0.7, seed=18, logprobs=2)
    found.append([_logprobs(row.outputs[0].logprobs) for row in rows])
    found.append([engine.generate([prompt], temperature=0.8, seed=11)[0] for prompt in prompts])
    assert found[0] == found[-1]
    return found


def facts(engine: Engine) -> dict[str, float]:
    """Counters of the drafter, read after the other scenarios."""
    from twotower_spec.drafting import AdaptivePolicy

    # In this process nobody runs the step after the last request has ended, which tells the drafter so.
    engine.generate(engine.prompts(1), max_tokens=4)
    stats = engine.drafter.stats
    session = engine.session
    return {
        "accepted": stats.get("accepted_tokens"),
        "drafted": stats.get("draft_tokens"),
        "errors": stats.get("fallbacks", "error"),
        "prefilling": stats.get("fallbacks", "prefilling"),
        "sampler_fallbacks": engine.runner.rejection_sampler.num_failures,
        "held": len(session.request_ids) if session else 0,
        "adaptive": float(session is not None and isinstance(session.policy, AdaptivePolicy)),
        "vllm_accepted": engine.metric("vllm:spec_decode_num_accepted_tokens"),
    }


def accepted_after_the_end(engine: Engine) -> dict[str, float]:
    """Drafts accepted as our drafter and vLLM count them, and in steps of requests that had ended before.

    Requests end by length, at stop tokens and by being aborted.
    """
    scheduler, after_end = engine.core.engine_core.engine_core.scheduler, []
    real = type(scheduler).update_from_output

    def counting(self: Any, scheduled: Any, output: Any) -> Any:
        drafted = scheduled.scheduled_spec_decode_tokens.keys() - self.requests.keys()
        after_end.extend(len(output.sampled_token_ids[output.req_id_to_index[one]]) - 1 for one in drafted)
        return real(self, scheduled, output)

    def counts() -> tuple[float, float]:
        engine.generate(engine.prompts(1), max_tokens=1)  # verifies nothing, and has the last verification counted
        ours = engine.drafter.stats.get("accepted_tokens")
        return ours, engine.metric("vllm:spec_decode_num_accepted_tokens")

    ours, theirs = counts()
    with patch.object(type(scheduler), "update_from_output", counting):
        stop = engine.generate(engine.prompts(1), max_tokens=30)[0][0][20]
        requests = [
            Request(
                prompt,
                engine.params(max_tokens=30 + i, stop_token_ids=[stop] if i % 2 else []),
                aborted_at=5 if i % 4 == 2 else None,
            )
            for i, prompt in enumerate(engine.prompts(10))
        ]
        engine.step_through(requests)
        now = counts()
    return {"ours": now[0] - ours, "vllm": now[1] - theirs, "after_end": sum(after_end), "steps": len(after_end)}


def _logprobs(rows: Any) -> list[list[tuple[int, float]]]:
    """Token ids and values of every position, the most probable first."""
    return [sorted(((token, one.logprob) for token, one in row.items()), key=lambda pair: -pair[1]) for row in rows]


def _with_logprobs(rows: Sequence[Any]) -> list[dict[str, Any]]:
    """Tokens of every request, and per position log-probability and rank of all that it was told.

    Ranks of the whole vocabulary are left out: those of tokens within rounding of each other change places.
    """
    return [
        {
            "tokens": list(row.outputs[0].token_ids),
            "positions": [
                {
                    str(token): [one.logprob, one.rank if len(position) < 100 else None, one.decoded_token]
                    for token, one in position.items()
                }
                for position in row.outputs[0].logprobs or []
            ],
        }
        for row in rows
    ]


def _sorted(found: dict[int, list[int]]) -> list[list[Any]]:
    return [[index, found[index]] for index in sorted(found)]


# Of every kind; fewer where the environment says so, as on model runner V2 on a CPU, where they cost ten times as much.
NUM_SAMPLES = int(os.environ.get("NUM_SAMPLES", "640"))
SAMPLED_KINDS: dict[str, dict[str, Any]] = {
    "unseeded": {"temperature": 1.2},
    "seeded": {"temperature": 1.2, "seed": 1000},
    "top_k": {"temperature": 1.5, "top_k": 4},
    "top_p": {"temperature": 1.4, "top_p": 0.8, "seed": 50_000},
    "min_p": {"temperature": 1.4, "min_p": 0.08},
}
UNCERTAIN = "Question: Lena has"


def many_samples(engine: Engine) -> Any:
    """Three tokens of many requests with one prompt: the second and third are drafted."""
    found = {}
    for kind, given in SAMPLED_KINDS.items():
        seeds = [given["seed"] + i if "seed" in given else None for i in range(NUM_SAMPLES)]
        params = [engine.params(**{**given, "seed": seed, "max_tokens": 3}) for seed in seeds]
        rows = engine.llm.generate([UNCERTAIN] * NUM_SAMPLES, params, use_tqdm=False)
        found[kind] = [list(row.outputs[0].token_ids) for row in rows]
    return found


def exact_probabilities(engine: Engine) -> Any:
    """Exact probabilities of the first token, and of the second after the most probable first one."""
    first_logits = _next_logits(engine, engine.llm.get_tokenizer().encode(UNCERTAIN))
    usual = max(first_logits, key=lambda token: first_logits[token])
    second_logits = _next_logits(engine, [*engine.llm.get_tokenizer().encode(UNCERTAIN), usual])
    found: dict[str, Any] = {"usual_first": usual}
    for kind, given in SAMPLED_KINDS.items():
        found[kind] = {
            "first": _sampled_from(first_logits, **given),
            "second": _sampled_from(second_logits, **given),
        }
    return found


def _next_logits(engine: Engine, token_ids: list[int]) -> dict[int, float]:
    """Logits after some tokens, up to a constant."""
    (row,) = engine.outputs([{"prompt_token_ids": token_ids}], max_tokens=1, logprobs=-1)
    return {token: one.logprob for token, one in row.outputs[0].logprobs[0].items()}


def _sampled_from(
    logits: dict[int, float],
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | None = None,
) -> dict[int, float]:
    """Probabilities after temperature, min-p, top-k and top-p, in plain Python."""
    scaled = {token: math.exp(value / temperature) for token, value in logits.items()}
    best = max(scaled.values())
    kept = sorted(((w, t) for t, w in scaled.items() if w >= min_p * best), reverse=True)
    kept = kept[: top_k or None]
    total, reached, chosen = sum(w for w, _ in kept), 0.0, {}
    for weight, token in kept:
        if reached > top_p * total:
            break
        chosen[token] = weight
        reached += weight
    return {token: weight / reached for token, weight in chosen.items()}


def plain_text(engine: Engine) -> Any:
    """Four requests, nothing else."""
    return engine.generate(engine.prompts(4))


def plain_strings(engine: Engine) -> list[str]:
    """Text of the same four requests."""
    return [row.outputs[0].text for row in engine.outputs(engine.prompts(4))]


@contextmanager
def _telling(owner: Any, name: str, error: type[Exception], every: int = 3) -> Iterator[None]:
    """Makes every third call of a function raise an error that prints all that it was given."""
    calls = itertools.count()
    real = getattr(owner, name)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) % every == 1:
            raise error(f"{name} was given {args} {kwargs}")
        return real(*args, **kwargs)

    with patch.object(owner, name, failing):
        yield


SECRET = "Quetzalcoatl hid marmalade under the xylophone in Ouagadougou, and the number of his safe is 88412297. "


def secret_prompts(engine: Engine) -> dict[str, Any]:
    """Prompts that nobody else may read, under errors that name them, and all that is logged or counted meanwhile."""
    from prometheus_client import REGISTRY, generate_latest

    from vllm_twotower.stats_folder import inherited

    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(logging.Formatter().format(record))  # type: ignore[method-assign]
    for name in ("vllm", "vllm.twotower", "vllm_twotower", "twotower_spec", "twotower_kernels"):
        logging.getLogger(name).setLevel(logging.INFO if name == "vllm" else logging.DEBUG)
        logging.getLogger(name).addHandler(handler)
    prompts = [SECRET + text for text in engine.prompts(4)]
    session, sampler = engine.session, import_module(type(engine.runner.rejection_sampler).__module__)
    rows = engine.outputs(prompts)
    with _telling(session, "draft_ahead" if is_on_v2() else "draft", LookupError):
        rows += engine.outputs(prompts)
    with _telling(session.towers.context, "forward", ValueError):
        rows += engine.outputs(prompts)
    if samples_on_a_cpu():
        with _telling(sampler, "accept", TypeError):
            rows += engine.outputs(prompts)
    cannot_forget = BufferError(f"cannot forget {rows[0].prompt_token_ids}")
    with (
        _telling(session.towers.denoiser, "forward", ArithmeticError),
        patch.object(session, "reset", side_effect=cannot_forget),
    ):
        rows += engine.outputs(prompts)
    folder = inherited()
    assert folder is not None
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    numbers = [np.frombuffer(found).tolist() for name, found in files.items() if name.endswith(".stats")]
    return {
        "prompts": [row.prompt_token_ids for row in rows],
        "answers": [list(row.outputs[0].token_ids) for row in rows],
        "records": records,
        "metrics": generate_latest(REGISTRY).decode(),
        "files": [*map(str, files), *(found.decode(errors="replace") for found in files.values()), *map(str, numbers)],
    }


def fail_to_load() -> None:
    """Before the engine is made: reading the weights fails for a reason that is nobody's input."""
    from twotower_spec.model import TwoTowerModel

    patch.object(TwoTowerModel, "from_pretrained", side_effect=MemoryError("injected")).start()


def equal_ranks(engine: Engine) -> Any:
    """Sampled and greedy requests; after every step all ranks must hold the same tokens."""
    steps = []

    def compare(step: int) -> None:
        first, *others = engine.llm.collective_rpc("token_rows")
        assert all(one == first for one in others), f"ranks differ in step {step}"
        steps.append(sum(map(len, first.values())))

    requests = [
        Request(
            prompt, engine.params(temperature=0.7 * (i % 3), max_tokens=32, seed=5 if i == 1 else None), arrives_at=i
        )
        for i, prompt in enumerate(engine.prompts(6))
    ]
    texts = _sorted(engine.step_through(requests, compare))
    return {
        "texts": texts,
        "steps": len(steps),
        "has_towers": engine.llm.collective_rpc("has_towers"),
        "accepted": engine.llm.collective_rpc("accepted_tokens"),
    }


def equal_ranks_under_faults(engine: Engine) -> Any:
    """Greedy text while every other round fails on the rank that drafts, and what that rank counted."""
    engine.llm.collective_rpc("fail_every_other_round")
    return {"text": plain_text(engine), "errors": engine.llm.collective_rpc("errors")}


def host_reads(engine: Engine) -> Any:
    """Where the host reads tensors while it drafts on model runner V2, in steps that read no prompts."""
    from tests.support.host_reads import HostReads

    found: list[str] = []
    steps = itertools.count()
    real = type(engine.drafter).propose

    def propose(self: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        # Results of earlier steps are learnt once they have landed.
        with HostReads(but_in=("_settle", "next_landed")) as reads:
            drafts = real(self, input_batch, *args, **kwargs)
        if not input_batch.has_prefill:
            next(steps)
            found.extend(reads.found)
        return drafts

    with patch.object(type(engine.drafter), "propose", propose):
        plain_text(engine)
    return {"steps": next(steps), "reads": found}


def plans_that_change(engine: Engine) -> Any:
    """Text on model runner V2 while the policy drafts nothing for five rounds, few for five, and all for five."""
    rounds = itertools.count()
    plans = [None, *(FixedPolicy(8, 1, num_tokens=count).plan(1) for count in (2, 7))]

    def changing(*args: Any, **kwargs: Any) -> Any:
        return plans[next(rounds) // 5 % 3]

    with patch.object(engine.session.policy, "plan", changing):
        found = verified_drafts(engine)
    return {**found, "accepted": engine.drafter.stats.get("accepted_tokens")}


def verified_drafts(engine: Engine) -> Any:
    """Text of four requests on model runner V2, and how many drafts of a request its steps verified."""
    verified: set[int] = set()
    propose = type(engine.drafter).propose

    def watched(self: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        if not input_batch.has_prefill:
            verified.add(int((input_batch.cu_num_logits_np[1:] - input_batch.cu_num_logits_np[:-1]).max()) - 1)
        return propose(self, input_batch, *args, **kwargs)

    with patch.object(type(engine.drafter), "propose", watched):
        return {"text": long_text(engine), "verified": sorted(verified)}


def long_text(engine: Engine) -> Any:
    """Four requests, a hundred tokens each."""
    return engine.generate(engine.prompts(4), max_tokens=100)


def without_hooks(engine: Engine) -> Any:
    """Generates where the proposer was not told whose runner it is, and so whose rows are whose: it drafts nothing."""
    proposer = engine.drafter
    with patch.object(type(proposer), "begin_step", lambda self, runner, scheduler_output: None):
        accepted = proposer.stats.get("accepted_tokens")
        found = [plain_text(engine), joining_and_leaving(engine)]
        assert proposer._runner is None and proposer.stats.get("accepted_tokens") == accepted
    return found


def steps_without_drafts_as_before_0_32(engine: Engine) -> Any:
    """Up to vLLM 0.31 a step without drafts has no metadata: our wrapper makes it, and our sampler works then too."""
    from vllm_twotower.v1 import hooks

    runner_class, seen = type(engine.runner), itertools.count()
    stock = runner_class._sample

    def as_before(self: Any, logits: Any, spec_decode_metadata: Any) -> Any:
        if spec_decode_metadata is None or not any(spec_decode_metadata.num_draft_tokens):
            spec_decode_metadata = None
            next(seen)
        return hooks.sampling_without_drafts(stock)(self, logits, spec_decode_metadata)

    with patch.object(runner_class, "_sample", as_before):
        found = engine.generate(engine.prompts(3), temperature=0.8, seed=3, min_p=0.05)
    assert next(seen) > 0
    assert found == engine.generate(engine.prompts(3), temperature=0.8, seed=3, min_p=0.05)
    return found


def lack_a_hook() -> None:
    """Before the engine is made: as if this vLLM had no `GPUModelRunner.execute_model`."""
    from vllm_twotower import compat

    real = compat.missing_hooks

    def missing_hooks(hooks: Sequence[Any]) -> list[Any]:
        return [*real(hooks), *(one for one in hooks if one.name == "GPUModelRunner.execute_model")]

    patch.object(compat, "missing_hooks", missing_hooks).start()


def pairs_of_features(engine: Engine) -> Any:
    """Every pair of what a greedy request can ask for."""
    return features.crossed(engine, sampled=False)


def sampled_pairs_of_features(engine: Engine) -> Any:
    """Every pair in which a request has a seed, or asks for what only sampled requests can."""
    return features.crossed(engine, sampled=True)


def thinking_budgets(engine: Engine) -> Any:
    """Budgets beside requests without any; thinking begins in the prompt, or in what is written after it."""
    requests = []
    for i, prompt in enumerate(engine.prompts(20)[::2] * 2):
        budget = {"thinking_token_budget": (3, 8, 17, 0)[i // 2 % 4]} if i % 2 else {}
        begun = prompt if i < 10 else prompt.removesuffix("Answer:")
        requests.append(Request(begun, engine.params(max_tokens=48, **budget), arrives_at=i))
    texts = {index: row.outputs[0].text for index, row in engine.stream(requests) if row.finished}
    return [[index, texts[index]] for index in sorted(texts)]


def strain(engine: Engine) -> dict[str, float]:
    """How often requests were thrown out, and tokens taken from the prefix cache, so far."""
    return {"preemptions": engine.metric("vllm:num_preemptions"), "hits": engine.metric("vllm:prefix_cache_hits")}


def runner(engine: Engine) -> dict[str, Any]:
    """Module of vLLM's model runner, and whether steps are scheduled asynchronously."""
    scheduling = engine.core.vllm_config.scheduler_config.async_scheduling
    return {"module": type(engine.runner).__module__, "async_scheduling": scheduling}


def one_hot_samples(engine: Engine) -> Any:
    """Sampled text with seeds and without, filters too; without the last token, up to which drafts may be cut."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.9, "seed": 21},
        {"temperature": 1.2, "top_k": 8},
        {"temperature": 1.4, "top_p": 0.8, "seed": 22},
        {"temperature": 1.4, "min_p": 0.08},
    ]
    found = [engine.generate(engine.prompts(6), max_tokens=24, ignore_eos=True, **kind) for kind in kinds]
    return [[row[0][:-1] for row in rows] for rows in found]
