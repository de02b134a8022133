"""One engine in a process of its own: `python -m twotower_bench.engines.worker DESCRIPTOR`.

The first message over the connection has the arguments of `LLM()`; then come names of methods of `Engine` with their
arguments, until it is closed.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count, pairwise
from multiprocessing.connection import Connection
from typing import Any

from twotower_bench.connected_process import own_end
from twotower_bench.engines.messages import Asked, Piece, Ready, Served, ServeOrder
from twotower_bench.engines.recording import StepRecorder
from twotower_bench.records import ServedRequest
from twotower_bench.vllm_hooks import RECORDING_HOOKS
from twotower_spec.errors import TwoTowerError
from vllm_twotower import compat, register
from vllm_twotower.runner import drafter_of


@dataclass
class Flight:
    """A request on its way: when it was submitted, and when its outputs came."""

    asked: Asked
    start: float
    outputs: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    num_prompt_tokens: int = 0


class Engine:
    """vLLM with its scheduler in this process, and a recorder of its steps."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        """Loads the models; arguments as of `LLM()`."""
        from vllm import LLM

        register()  # vLLM does it too, unless VLLM_PLUGINS says otherwise
        self.llm = LLM(**arguments)
        self._numbers = count()

    @property
    def ready(self) -> Ready:
        """Version of vLLM, and most tokens of a prompt and its text together."""
        import vllm

        return Ready(vllm.__version__, int(self.llm.llm_engine.vllm_config.model_config.max_model_len))

    @cached_property
    def recorder(self) -> StepRecorder:
        """Made when it is first asked for: it costs a little in every step from then on."""
        missing = compat.missing_hooks(RECORDING_HOOKS)
        if missing:
            raise TwoTowerError(compat.warning_text(missing))
        return StepRecorder(self.llm.llm_engine.engine_core.engine_core.scheduler)

    def tokenize(self, texts: Sequence[str], chat: bool) -> tuple[tuple[int, ...], ...]:
        """Token ids of texts, each in the verifier's chat template where it is a chat."""
        tokenizer = self.llm.get_tokenizer()
        if not chat:
            return tuple(tuple(tokenizer.encode(text)) for text in texts)
        chats = ([{"role": "user", "content": text}] for text in texts)
        return tuple(
            tuple(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)) for chat in chats
        )

    def draft_by(self, knobs: Mapping[str, Any]) -> None:
        """Changes how TwoTower drafts."""
        self.llm.collective_rpc(_change_policy, args=(knobs,))

    def serve(self, order: ServeOrder) -> Served:
        """Generates for all prompts, so many at once."""
        self.recorder.begin()
        waiting, flights = deque(order.prompts), dict[str, Flight]()
        engine, num_flying = self.llm.llm_engine, 0
        start = time.perf_counter()
        while waiting or num_flying:
            while waiting and num_flying < order.concurrency:
                self._submit(waiting.popleft(), order, flights)
                num_flying += 1
            outputs = engine.step()
            now = time.perf_counter()
            for row in outputs:
                self._note(flights[row.request_id], row, now)
                num_flying -= bool(row.finished)
        seconds = time.perf_counter() - start
        requests = tuple(self._request(request_id, flight) for request_id, flight in flights.items())
        return Served(round(seconds, 6), requests, self.recorder.decoding_steps(), self.recorder.drafting())

    def stream(self, prompt: str, max_new_tokens: int) -> Iterator[Piece]:
        """One request, step by step: the last token of a step is the verifier's, those before it were drafted."""
        engine = self.llm.llm_engine
        engine.add_request(self._next_id(), prompt, self._params(max_new_tokens))
        token_ids: list[int] = []
        shown = 0
        while engine.has_unfinished_requests():
            for row in engine.step():
                *accepted, own = row.outputs[0].token_ids or [None]
                if own is None:
                    continue
                until_own = self._text([*token_ids, *accepted])
                token_ids += [*accepted, own]
                text = self._text(token_ids)
                yield Piece(until_own[shown:], text[max(shown, len(until_own)) :], len(accepted), row.finished)
                shown = len(text)

    def _submit(self, asked: Asked, order: ServeOrder, flights: dict[str, Flight]) -> None:
        request_id = self._next_id()
        # A seed of its own, so that a sampled text does not depend on what else is in the batch.
        more = {"seed": len(flights)} if order.temperature else {}
        params = self._params(order.max_new_tokens, temperature=order.temperature, **more)
        prompt: Any = asked.prompt if isinstance(asked.prompt, str) else {"prompt_token_ids": list(asked.prompt)}
        flights[request_id] = Flight(asked, time.perf_counter())
        self.llm.llm_engine.add_request(request_id, prompt, params)

    def _note(self, flight: Flight, row: Any, now: float) -> None:
        flight.num_prompt_tokens = len(row.prompt_token_ids or ()) or flight.num_prompt_tokens
        token_ids = row.outputs[0].token_ids
        if token_ids:
            flight.token_ids += token_ids
            flight.outputs.append(now)

    def _request(self, request_id: str, flight: Flight) -> ServedRequest:
        drafted, accepted = self.recorder.steps_of(request_id)
        return ServedRequest(
            prompt_id=flight.asked.prompt_id,
            category=flight.asked.category,
            num_prompt_tokens=flight.num_prompt_tokens,
            token_ids=tuple(flight.token_ids),
            first_token_s=round(flight.outputs[0] - flight.start, 6),
            seconds=round(flight.outputs[-1] - flight.start, 6),
            gaps_s=tuple(round(later - earlier, 6) for earlier, later in pairwise(flight.outputs)),
            num_draft_tokens=drafted,
            num_accepted_tokens=accepted,
        )

    def _next_id(self) -> str:
        return str(next(self._numbers))

    def _params(self, max_new_tokens: int, temperature: float = 0.0, **more: Any) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=temperature, max_tokens=max_new_tokens, output_kind=RequestOutputKind.DELTA, **more
        )

    def _text(self, token_ids: list[int]) -> str:
        """Text so far, without a character that is not complete yet."""
        return str(self.llm.get_tokenizer().decode(token_ids, skip_special_tokens=True)).rstrip("\ufffd")


def _change_policy(worker: Any, knobs: Mapping[str, Any]) -> None:
    drafter_of(worker.model_runner).change_policy(knobs)


def serve(connection: Connection) -> None:
    """Loads an engine and does what it is told, until the other end is closed."""
    engine = Engine(connection.recv())
    connection.send(engine.ready)
    while True:
        try:
            method, *arguments = connection.recv()
        except EOFError:
            return
        answer = getattr(engine, method)(*arguments)
        for part in answer if isinstance(answer, Iterator) else (answer,):
            connection.send(part)


if __name__ == "__main__":
    serve(own_end(int(sys.argv[1])))
