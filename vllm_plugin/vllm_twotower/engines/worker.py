"""One engine of the demo, in a process of its own: `python -m vllm_twotower.demo.worker DESCRIPTOR`.

The first message over the connection has the arguments of `LLM()`; then orders come until it is closed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from vllm_twotower import register
from vllm_twotower.demo.messages import Measured, MeasureOrder, Piece, Ready, StreamOrder


class DemoEngine:
    """vLLM, and the numbers that it keeps about drafts."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        """Loads the models.

        Args:
            arguments: of `LLM()`.
        """
        from vllm import LLM

        register()  # vLLM does it too, unless VLLM_PLUGINS says otherwise
        self.llm = LLM(**arguments)
        self._num_streams = 0

    def measure(self, order: MeasureOrder) -> Measured:
        """Generates all batches, greedily."""
        params = self._params(order.max_new_tokens)
        drafts, accepted = self._drafts_and_accepted()
        outputs = []
        start = time.perf_counter()
        for batch in order.batches:
            outputs += self.llm.generate(list(batch), params, use_tqdm=False)
        seconds = time.perf_counter() - start
        drafts_now, accepted_now = self._drafts_and_accepted()
        token_ids = tuple(tuple(row.outputs[0].token_ids) for row in outputs)
        return Measured(seconds, token_ids, drafts_now - drafts, accepted_now - accepted)

    def stream(self, order: StreamOrder) -> Iterator[Piece]:
        """One request, step by step: the last token of a step is the verifier's, those before it were drafted."""
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        self._num_streams += 1
        params = self._params(order.max_new_tokens, output_kind=RequestOutputKind.DELTA)
        engine.add_request(f"stream-{self._num_streams}", order.prompt, params)
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

    def _params(self, max_new_tokens: int, **more: Any) -> Any:
        from vllm import SamplingParams

        return SamplingParams(temperature=0.0, max_tokens=max_new_tokens, **more)

    def _text(self, token_ids: list[int]) -> str:
        """Text so far, without a character that is not complete yet."""
        return str(self.llm.get_tokenizer().decode(token_ids, skip_special_tokens=True)).rstrip("\ufffd")

    def _drafts_and_accepted(self) -> tuple[int, int]:
        counters = {metric.name: metric.value for metric in self.llm.get_metrics() if hasattr(metric, "value")}
        names = ("vllm:spec_decode_num_drafts", "vllm:spec_decode_num_accepted_tokens")
        drafts, accepted = (int(counters.get(name, 0)) for name in names)
        return drafts, accepted


def serve(connection: Connection) -> None:
    """Loads an engine and does what it is told, until the other end is closed."""
    import vllm

    engine = DemoEngine(connection.recv())
    connection.send(Ready(vllm.__version__))
    while True:
        try:
            order: MeasureOrder | StreamOrder = connection.recv()
        except EOFError:
            return
        match order:
            case MeasureOrder():
                connection.send(engine.measure(order))
            case StreamOrder():
                for piece in engine.stream(order):
                    connection.send(piece)


if __name__ == "__main__":
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)  # the demo must see it close when this process ends
    serve(Connection(descriptor))
