"""Real vLLM on T, which drafts for itself: every context that the drafter reads beside one that is computed anew."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tests.vllm_plugin.fork_server import results_of
from twotower_spec import TwoTowerModel
from twotower_spec.checkpoint import find_tokenizer
from twotower_spec.demo.trio import held_out_prompts, trio_path
from twotower_spec.state import BlockContext, ContextState

T = str(trio_path("twotower"))
ENGINE = {"max_model_len": 512, "max_num_seqs": 8, "num_gpu_blocks_override": 400, "max_num_batched_tokens": 512}


def run_itself(
    *,
    model: str = T,
    lengths: list[int] | None = None,
    shared: int = 0,
    max_tokens: int = 48,
    passes: int = 1,
    fault: str = "",
    knobs: dict[str, Any] | None = None,
    change: dict[str, Any] | None = None,
    num_speculative_tokens: int | None = 7,
    **engine_args: Any,
) -> dict[str, Any]:
    """Texts of requests from a fresh engine, and what was found about the contexts on the way.

    Args:
        model: checkpoint, which verifies and drafts.
        lengths: of the prompts, in tokens; None for whole ones.
        shared: tokens with which all prompts begin, beside.
        max_tokens: of every text.
        passes: times that the same requests come; the texts of the last time count.
        fault: of `FAULTS`.
        knobs: of the drafter.
        change: of its policy, after the first of several passes.
        num_speculative_tokens: None for no drafts.
        engine_args: beside `ENGINE`.

    Returns:
        "texts", "prompts", "log" and numbers: "compared" (contexts by what their requests had just been through),
        "difference" (largest of any state or attention, relative), "preemptions", "drafted", "accepted", "errors",
        "not_loaded", "context_tokens", "memory", "session", "attention_groups".
    """
    given = {
        "model": model,
        "lengths": lengths,
        "shared": shared,
        "max_tokens": max_tokens,
        "passes": passes,
        "fault": fault,
        "change": change,
        "num_speculative_tokens": num_speculative_tokens,
        "knobs": {"log_interval_s": 0, "policy": "fixed", "steps_per_block": 1, **(knobs or {})},
        "engine_args": {**ENGINE, **engine_args},
    }
    found, log = results_of(f"{__name__}:write_results", json.dumps(given))
    return {**found, "log": log}


class Witness:
    """Compares every context that is read with that of a context tower which reads the same tokens."""

    def __init__(self, model: str) -> None:
        self.model = TwoTowerModel.from_pretrained(model, dtype=torch.float32)
        self.state = ContextState.for_towers(self.model, 16, 1000)
        self.compared, self.difference = Counter[str](), 0.0
        self.experience: dict[str, set[str]] = {}
        self.step: Any = None

    def see_step(self, runner: Any, step: Any) -> None:
        """Remembers what a step does with every request."""
        self.step = step
        for request in step.scheduled_new_reqs:
            self.experience[request.req_id] = {"prefix hit"} if request.num_computed_tokens else set()
        for request in step.preempted_req_ids or ():
            self.experience[request].add("preempted")
        for request in runner.input_batch.req_ids:
            gone = request in step.finished_req_ids or request in (step.preempted_req_ids or ())
            if request not in step.num_scheduled_tokens and not gone:
                self.experience[request].add("left out")
        for request, count in step.num_scheduled_tokens.items():
            state = runner.requests.get(request)
            if state is not None and state.num_computed_tokens + count < state.num_prompt_tokens:
                self.experience[request].add("prompt in pieces")

    @torch.inference_mode()
    def compare(self, source: Any, rows: list[int], context: BlockContext, block_size: int) -> None:
        """Compares the contexts of some rows of the batch."""
        batch, ids = source._runner.input_batch, []
        for row in rows:
            request, length = batch.req_ids[row], int(batch.num_tokens_no_spec[row]) - 1
            tokens = batch.token_ids_cpu[row, :length].tolist()
            known = self.state.continue_or_restart(request, tokens)
            self.state.claim(request, length)
            self.state.extend_in_chunks(self.model.context, {request: tokens[known:]}, want_logits=False)
            ids.append(request)
            drafted = len(self.step.scheduled_spec_decode_tokens.get(request, ()))
            kept = int(batch.num_accepted_tokens_cpu[row]) - 1
            fresh = len(source._runner.requests[request].output_token_ids) == 1
            some = "all" if kept == drafted else "some" if kept else "none"
            self.compared.update({"prompt" if fresh else f"{some} of the drafts" if drafted else "no drafts"})
            self.compared.update(self.experience[request])
        expected = self.state.block_context(ids, block_size)
        config = self.model.config
        for layer in range(len(config.mamba_layers)):
            for actual, wanted in zip(context.states.read(layer), expected.states.read(layer), strict=True):
                self._note(actual, wanted)
        generator = torch.Generator().manual_seed(len(self.compared))
        shape = (len(ids), block_size, config.num_attention_heads, config.head_dim)
        # Large queries, so that they attend to few keys: one that is wrong shows.
        query = 4 * torch.randn(shape, generator=generator)
        key, value = torch.randn(2, *shape[:2], config.num_key_value_heads, config.head_dim, generator=generator)
        for layer in range(len(config.attention_layers)):
            self._note(context.keys.attend(layer, query, key, value), expected.keys.attend(layer, query, key, value))

    def _note(self, actual: torch.Tensor, wanted: torch.Tensor) -> None:
        assert actual.shape == wanted.shape and actual.dtype == wanted.dtype
        scale = max(1.0, float(wanted.abs().max()))
        self.difference = max(self.difference, float((actual - wanted).abs().max()) / scale)


def _failing_views(stack: ExitStack) -> None:
    from vllm_twotower.v1.engine_context import EngineContext

    real, calls = EngineContext.view, itertools.count()

    def view(*args: Any) -> BlockContext:
        if next(calls) % 3 == 1:
            raise ZeroDivisionError("injected")
        return real(*args)

    stack.enter_context(patch.object(EngineContext, "view", view))


def _unreadable_cache(stack: ExitStack) -> None:
    from vllm_twotower.v1.engine_context import EngineContext

    stack.enter_context(patch.object(EngineContext, "_attention", property(lambda self: 1 / 0)))


def _unreadable_backend(stack: ExitStack) -> None:
    from vllm_twotower.v1 import page_layout

    stack.enter_context(patch.object(page_layout, "_strides", lambda offsets: None))


FAULTS = {
    "failing views": _failing_views,
    "unreadable cache": _unreadable_cache,
    "unreadable backend": _unreadable_backend,
}


def write_results(order: str, output: str) -> None:
    """Runs an engine in this process."""
    from vllm import LLM, SamplingParams

    from vllm_twotower.v1.engine_context import EngineContext
    from vllm_twotower.v1.proposer import TwoTowerProposer

    given = json.loads(order)
    witness = Witness(given["model"])
    real_view, real_step = EngineContext.view, TwoTowerProposer.begin_step

    def view(self: Any, slots: torch.Tensor, block_size: int) -> BlockContext:
        context = real_view(self, slots, block_size)
        witness.compare(self, slots.tolist(), context, block_size)
        return context

    def begin_step(self: Any, runner: Any, step: Any) -> None:
        witness.see_step(runner, step)
        real_step(self, runner, step)

    settings = None
    if given["num_speculative_tokens"]:
        settings = {"num_speculative_tokens": given["num_speculative_tokens"]}
        settings["twotower"] = {"self": True, **given["knobs"]}
    with ExitStack() as stack:
        if given["fault"]:
            FAULTS[given["fault"]](stack)
        else:
            stack.enter_context(patch.object(EngineContext, "view", view))
        stack.enter_context(patch.object(TwoTowerProposer, "begin_step", begin_step))
        llm = LLM(
            model=given["model"],
            enforce_eager=True,
            disable_log_stats=False,
            speculative_config=settings,
            **{"dtype": "float32", "block_size": 32, **given["engine_args"]},
        )
        session = _drafter(llm).session
        if session is not None and given["knobs"]["policy"] == "adaptive":
            session.policy.may_skip = False  # whether it pays or not
        prompts = _prompts(given)
        params = SamplingParams(temperature=0, max_tokens=given["max_tokens"], ignore_eos=True)
        for count in range(given["passes"]):
            if count == 1 and given["change"]:
                _drafter(llm).change_policy(given["change"])
            rows = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    drafter = _drafter(llm)
    metrics = {one.name: getattr(one, "value", 0) for one in llm.get_metrics()}
    results = {
        "prompts": prompts,
        "texts": [list(row.outputs[0].token_ids) for row in rows],
        "compared": dict(witness.compared),
        "difference": witness.difference,
        "preemptions": metrics["vllm:num_preemptions"],
        "drafted": drafter.stats.get("draft_tokens"),
        "accepted": drafter.stats.get("accepted_tokens"),
        "errors": drafter.stats.get("fallbacks", "error"),
        "not_loaded": drafter.stats.get("fallbacks", "not loaded"),
        "context_tokens": drafter.stats.get("context_tokens"),
        "memory": str(drafter.session.memory()) if drafter.session else "",
        "session": type(drafter.session).__name__,
        "attention_groups": len(getattr(drafter.session.source, "_attention", ())) if drafter.session else 0,
    }
    Path(output).write_text(json.dumps(results))
    core: Any = llm.llm_engine.engine_core
    core.shutdown()


def _drafter(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.drafter


def _prompts(given: dict[str, Any]) -> list[list[int]]:
    maths, python = held_out_prompts("maths"), held_out_prompts("python")
    texts = [one.prompt for pair in zip(maths, python, strict=False) for one in pair]
    tokenizer = find_tokenizer(T)
    ids: list[list[int]] = [tokenizer.encode(text) for text in texts[:8]]
    long: list[int] = tokenizer.encode("\n\n".join(texts[8:30]))
    lengths = given["lengths"] or [len(prompt) for prompt in ids]
    tails = [(prompt * 40)[:length] for prompt, length in zip(ids, lengths, strict=False)]
    return [long[: given["shared"]] + tail for tail in tails]
