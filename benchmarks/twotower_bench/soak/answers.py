"""Answers of a server through the `openai` client, and in what two of them differ."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from twotower_bench.servers.server import Endpoint
from twotower_bench.soak.traffic import Request

if TYPE_CHECKING:
    from openai import AsyncOpenAI

# One that takes longer hangs: a burst on model runner V2, interpreted, takes half a minute.
ANSWERED_WITHIN_S = 300.0
# A client that waits for a whole answer leaves then; no long answer is there so soon.
LEAVES_AFTER_S = 0.1
# Sums of a batch of another width are taken in another order.
LOG_PROBABILITY_TOLERANCE = 1e-3


@dataclass
class Choice:
    """One sample of an answer; of a stream all pieces together.

    Attributes:
        text, reasoning: what was said.
        token_ids: of the text; of completions alone.
        tools: name and arguments of every call.
        finish_reason, stop_reason: vLLM's.
        log_probabilities: of the tokens, where they were asked for.
    """

    text: str = ""
    reasoning: str = ""
    token_ids: list[int] = field(default_factory=list)
    tools: list[list[str]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    log_probabilities: list[float] = field(default_factory=list)

    def add(self, piece: Mapping[str, Any]) -> None:
        """Adds a piece of a stream, or a whole answer."""
        said = piece.get("delta") or piece.get("message") or piece
        self.text += said.get("text") or said.get("content") or ""
        self.reasoning += said.get("reasoning") or ""
        self.token_ids += piece.get("token_ids") or []
        for i, call in enumerate(said.get("tool_calls") or []):
            place = call.get("index", i)
            self.tools += [["", ""] for _ in range(place + 1 - len(self.tools))]
            for part, name in enumerate(("name", "arguments")):
                self.tools[place][part] += call["function"].get(name) or ""
        self.log_probabilities += (piece.get("logprobs") or {}).get("token_logprobs") or []
        self.finish_reason = piece.get("finish_reason") or self.finish_reason
        self.stop_reason = piece.get("stop_reason") or self.stop_reason


@dataclass
class Answer:
    """Answer of a server.

    Attributes:
        choices: in their order; what came before the client left, if it did.
        has_left: whether the client left before the end.
        error: what was wrong, in one line; empty where nothing was.
    """

    choices: list[Choice] = field(default_factory=list)
    has_left: bool = False
    error: str = ""


@dataclass(frozen=True)
class Difference:
    """Two answers that should be the same.

    Attributes:
        request: that both answer.
        what: the field that differs, or what is wrong.
        found, expected: answers.
    """

    request: Request
    what: str
    found: Answer
    expected: Answer

    @property
    def as_json(self) -> dict[str, Any]:
        """The request with both answers."""
        return {name: asdict(value) if name != "what" else value for name, value in vars(self).items()}


async def ask_all(endpoint: Endpoint, requests: Sequence[Request]) -> list[Answer]:
    """Sends requests at once, over connections that are closed when the last is answered."""
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    async with (
        DefaultAsyncHttpxClient(trust_env=False) as connections,
        AsyncOpenAI(
            base_url=f"{endpoint.url}/v1",
            api_key="none",
            timeout=ANSWERED_WITHIN_S,
            max_retries=0,
            http_client=connections,
        ) as client,
    ):
        return await asyncio.gather(*(ask(client, endpoint.model, request) for request in requests))


async def ask(client: AsyncOpenAI, model: str, request: Request) -> Answer:
    """Sends a request; what goes wrong is in the answer."""
    from openai import OpenAIError

    answer = Answer()
    waiting = asyncio.create_task(_fill(answer, client, model, request))
    try:
        if request.leaves_after == 0:
            await asyncio.wait([waiting], timeout=LEAVES_AFTER_S)
            answer.has_left = waiting.cancel()
        await waiting
    except asyncio.CancelledError:
        if not answer.has_left:
            raise
    except (OpenAIError, OSError, TimeoutError, ValueError) as error:
        answer.error = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    answer.error = answer.error or _what_is_wrong(request, answer)
    return answer


def difference(request: Request, found: Answer, expected: Answer) -> Difference | None:
    """In what an answer differs from the one that it should be."""
    if len(found.choices) != len(expected.choices):
        return Difference(request, "number of choices", found, expected)
    for ours, theirs in zip(found.choices, expected.choices, strict=True):
        for name, value in vars(theirs).items():
            mine = getattr(ours, name)
            same = mine == value if name != "log_probabilities" else _are_close(mine, value)
            if not same:
                return Difference(request, name, found, expected)
    return None


async def _fill(answer: Answer, client: AsyncOpenAI, model: str, request: Request) -> None:
    resource: Any = client.chat.completions if request.is_chat else client.completions
    if not request.streams:
        whole = await resource.create(model=model, **request.given)
        _add(answer, whole)
        return
    pieces = 0
    async with await resource.create(model=model, stream=True, **request.given) as parts:
        async for part in parts:
            _add(answer, part)
            pieces += 1
            if pieces == request.leaves_after:
                answer.has_left = True
                return


def _add(answer: Answer, part: Any) -> None:
    for piece in part.model_dump()["choices"]:
        answer.choices += [Choice() for _ in range(piece["index"] + 1 - len(answer.choices))]
        answer.choices[piece["index"]].add(piece)


def _what_is_wrong(request: Request, answer: Answer) -> str:
    """Says what an answer lacks; nothing where it is whole."""
    if answer.has_left:
        return ""
    if len(answer.choices) != request.given.get("n", 1):
        return f"{len(answer.choices)} choices"
    for choice in answer.choices:
        if choice.finish_reason not in ("stop", "length", "tool_calls"):
            return f"ended by {choice.finish_reason}"
        if request.grammar and choice.finish_reason == "stop" and not re.fullmatch(request.grammar, choice.text):
            return f"not of the grammar: {choice.text!r}"
    return ""


def _are_close(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    return len(ours) == len(theirs) and all(
        abs(one - other) <= LOG_PROBABILITY_TOLERANCE for one, other in zip(ours, theirs, strict=True)
    )
