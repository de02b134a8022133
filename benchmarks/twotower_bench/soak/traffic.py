"""Kinds of requests that a server gets, each a function that draws some; a lap is one of every kind."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from random import Random
from typing import Any

from twotower_bench.soak.chats import NAMED, TOOL
from twotower_bench.soak.servers import Limits
from twotower_spec.checkpoint import load_tokenizer
from twotower_spec.demo.trio import CATEGORIES, held_out_prompts, trio_path

# Of the bundled tokenizer.
FULL_STOP, SPACE = 17, 224
# Ends the reasoning of the bundled models: what is behind it is the answer, which a grammar holds for.
ANSWER = "Step"

SENTENCE = r"[A-Z][a-z ]{5,20}(is|has) [0-9]{1,3}\."
SUM = r'\s*\{\s*"left"\s*:\s*\d{1,2}\s*,\s*"sign"\s*:\s*"[-+*]"\s*,\s*"right"\s*:\s*\d{1,2}\s*\}\s*'
SCHEMA = TOOL["function"]["parameters"]
FILTERS: Sequence[Mapping[str, Any]] = (
    {},
    {"top_p": 0.9},
    {"extra_body": {"top_k": 20}},
    {"extra_body": {"min_p": 0.05}},
    {"top_p": 0.8, "extra_body": {"top_k": 12, "min_p": 0.02}},
)


@dataclass(frozen=True)
class Request:
    """One request of the `openai` client.

    Attributes:
        kind: that it belongs to.
        given: arguments of `completions.create`, or of `chat.completions.create`.
        is_chat: the latter.
        streams: whether the answer comes in pieces.
        leaves_after: pieces after which the client leaves; 0 for one that leaves while it waits for a whole answer.
        grammar: a regular expression that a text which has come to its end matches.
    """

    kind: str
    given: Mapping[str, Any] = field(hash=False)
    is_chat: bool = False
    streams: bool = False
    leaves_after: int | None = None
    grammar: str | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether it has one answer, with drafts and without."""
        return self.given["temperature"] == 0 and self.leaves_after is None

    @property
    def has_seed(self) -> bool:
        """Whether it has one answer of its own under coupled noise."""
        return "seed" in self.given and self.leaves_after is None

    def without(self, names: Container[str]) -> Request:
        """The same but for parameters of these names."""
        given = {name: value for name, value in self.given.items() if name not in names}
        if "extra_body" in given:
            given["extra_body"] = {name: one for name, one in given["extra_body"].items() if name not in names}
        return replace(self, given=given)


class Prompts:
    """Prompts of any length, from the held-out texts of the trio."""

    @cached_property
    def _texts(self) -> list[list[int]]:
        tokenizer = load_tokenizer(trio_path("twotower"))
        assert tokenizer is not None
        return [list(tokenizer.encode(one.prompt)) for name in CATEGORIES for one in held_out_prompts(name)]

    @cached_property
    def answer(self) -> int:
        """Token behind which the answer begins."""
        tokenizer = load_tokenizer(trio_path("twotower"))
        assert tokenizer is not None
        found = tokenizer.convert_tokens_to_ids(ANSWER)
        assert isinstance(found, int)
        return found

    def take(self, random: Random, length: int) -> list[int]:
        """Token ids that end where a prompt does, as long as one can be cut."""
        found: list[int] = []
        while len(found) < length:
            found = [*random.choice(self._texts), *found]
        return found[-length:]


class Traffic:
    """Draws requests; a seed gives the same ones every time."""

    def __init__(self, limits: Limits, seed: int = 0) -> None:
        """Draws nothing yet.

        Args:
            limits: of the servers.
            seed: of everything that is drawn.
        """
        self.limits, self.prompts, self._seed = limits, Prompts(), seed

    def lap(self, number: int) -> Iterator[tuple[str, list[Request]]]:
        """Yields every kind with its requests, which are to be sent at once, in an order of the lap's own."""
        random = Random(f"{self._seed} {number}")
        for draw in random.sample(KINDS, len(KINDS)):
            yield draw.__name__, draw(self, random)

    def completion(self, kind: str, prompt: Sequence[int], streams: bool = False, **given: Any) -> Request:
        """A completion, greedy unless said, with ids of its tokens."""
        extra = {"return_token_ids": True, **given.pop("extra_body", {})}
        room = self.limits.max_model_len - len(prompt)
        most = min(given.pop("max_tokens", self.limits.most_new_tokens), room)
        return Request(
            kind,
            {"prompt": list(prompt), "temperature": 0, "max_tokens": most, "extra_body": extra, **given},
            streams=streams,
        )

    def chat(self, kind: str, text: str, streams: bool = False, **given: Any) -> Request:
        """A chat of one turn, greedy unless said."""
        messages = [{"role": "user", "content": text}]
        return Request(kind, {"messages": messages, "temperature": 0, **given}, is_chat=True, streams=streams)


Kind = Callable[[Traffic, Random], list[Request]]


def lengths(traffic: Traffic, random: Random) -> list[Request]:
    """Prompts from one token to all but one that the model takes; one answer fills what is left."""
    most, pieces = traffic.limits.max_model_len, traffic.limits.max_num_batched_tokens
    found = [
        traffic.completion("lengths", traffic.prompts.take(random, length), streams=i % 2 == 1)
        for i, length in enumerate((1, 2, 17, 33, pieces - 1, pieces + 1, 2 * pieces, most - 9, most - 1))
    ]
    return [*found, traffic.completion("lengths", traffic.prompts.take(random, 20), max_tokens=most)]


def seeds(traffic: Traffic, random: Random) -> list[Request]:
    """Sampled requests with seeds, each of them twice and again in every lap, in other company; most read in pieces."""
    own = Random(1)
    given = [
        traffic.completion(
            "seeds",
            traffic.prompts.take(own, length),
            temperature=own.choice((0.6, 0.9, 1.3)),
            seed=i,
            **FILTERS[i % len(FILTERS)],
        )
        for i, length in enumerate((5, 40, 120, 150, 180, 205))
    ]
    found = [*given, *(replace(one, streams=True) for one in given)]
    return random.sample(found, len(found))


def several(traffic: Traffic, random: Random) -> list[Request]:
    """Several samples of one prompt, with a seed and without."""
    own = Random(2)
    seeded = traffic.completion("several", traffic.prompts.take(own, 30), temperature=0.9, n=3, seed=50)
    free = traffic.completion("several", traffic.prompts.take(random, 60), temperature=1.0, n=2, streams=True)
    return [seeded, free]


def sampled(traffic: Traffic, random: Random) -> list[Request]:
    """Sampled requests without seeds, filters of every kind."""
    return [
        traffic.completion("sampled", traffic.prompts.take(random, 24), temperature=0.8, streams=i % 2 == 0, **filters)
        for i, filters in enumerate(FILTERS)
    ]


def grammars(traffic: Traffic, random: Random) -> list[Request]:
    """Structured output: a regular expression and a schema, greedy and with seeds."""
    found = list[Request]()
    for i, (structure, grammar) in enumerate((({"regex": SENTENCE}, SENTENCE), ({"json": SCHEMA}, SUM))):
        prompt, own = ([*traffic.prompts.take(one, 40), traffic.prompts.answer] for one in (random, Random(i)))
        extra = {"structured_outputs": structure}
        greedy = traffic.completion("grammars", prompt, extra_body=extra)
        seeded = traffic.completion("grammars", own, streams=True, temperature=0.9, seed=70 + i, extra_body=extra)
        found += [replace(one, grammar=grammar) for one in (greedy, seeded)]
    return found


def ends(traffic: Traffic, random: Random) -> list[Request]:
    """Stop strings and tokens, min_tokens, penalties, bad words and a bias."""
    given: list[dict[str, Any]] = [
        {"stop": ["has", "=", "return"]},
        {"stop": [" the", "."], "extra_body": {"include_stop_str_in_output": True}},
        {"extra_body": {"min_tokens": 12, "stop_token_ids": [FULL_STOP]}},
        {"presence_penalty": 0.4, "frequency_penalty": 0.3, "extra_body": {"repetition_penalty": 1.2}},
        {"extra_body": {"bad_words": ["The answer", "return", " ="]}},
        {"logit_bias": {str(FULL_STOP): 2.0, str(SPACE): -3.0}},
    ]
    return [
        traffic.completion("ends", traffic.prompts.take(random, 48), streams=i % 2 == 0, **one)
        for i, one in enumerate(given)
    ]


def log_probabilities(traffic: Traffic, random: Random) -> list[Request]:
    """Log-probabilities of answers and of prompts, greedy and with a seed."""
    first, second = (traffic.prompts.take(random, length) for length in (30, 110))
    own = traffic.prompts.take(Random(3), 50)
    return [
        traffic.completion("log_probabilities", first, streams=True, logprobs=3),
        traffic.completion("log_probabilities", second, logprobs=1, extra_body={"prompt_logprobs": 1}),
        traffic.completion("log_probabilities", own, temperature=0.8, seed=90, logprobs=2),
    ]


def chats(traffic: Traffic, random: Random) -> list[Request]:
    """Reasoning, tools that are named or required, and an answer by a schema after reasoning."""
    most = {"max_completion_tokens": 3 * traffic.limits.most_new_tokens}
    tools = {**most, "tools": [TOOL], "parallel_tool_calls": False}
    schema = {"type": "json_schema", "json_schema": {"name": "sum", "schema": SCHEMA, "strict": True}}
    given: list[dict[str, Any]] = [
        most,
        {**tools, "tool_choice": NAMED},
        {**tools, "tool_choice": "required"},
        {**most, "response_format": schema},
        {**most, "temperature": 0.8},
    ]
    texts = [one.prompt for one in held_out_prompts("maths") if len(one.prompt) < 300]
    return [
        traffic.chat("chats", random.choice(texts), streams=streams, **one)
        for one in given
        for streams in (False, True)
    ]


def leaving(traffic: Traffic, random: Random) -> list[Request]:
    """Clients that leave in the middle of a stream or while they wait, beside others that stay."""
    left = []
    for leaves_after in (0, 1, 2, 4, 0):
        prompt = traffic.prompts.take(random, random.choice((20, 130)))
        request = traffic.completion("leaving", prompt, max_tokens=traffic.limits.max_model_len, temperature=0.7)
        left.append(replace(request, leaves_after=leaves_after, streams=leaves_after > 0))
    stay = [traffic.completion("leaving", traffic.prompts.take(random, 40), streams=i == 0) for i in range(3)]
    return random.sample([*left, *stay], len(left) + len(stay))


def shared_prefix(traffic: Traffic, random: Random) -> list[Request]:
    """Prompts with one beginning, which is read once."""
    prefix = traffic.prompts.take(random, 130)
    return [
        traffic.completion("shared_prefix", [*prefix, *traffic.prompts.take(random, 10 + 3 * i)], streams=i % 2 == 0)
        for i in range(6)
    ]


def crowd(traffic: Traffic, random: Random) -> list[Request]:
    """Requests that all run at once and grow: blocks run out, and some of them are thrown out."""
    most = traffic.limits.max_model_len
    return [
        traffic.completion(
            "crowd",
            traffic.prompts.take(random, most // 3),
            streams=i % 2 == 0,
            max_tokens=2 * traffic.limits.most_new_tokens,
            extra_body={"ignore_eos": True},
        )
        for i in range(traffic.limits.max_num_seqs)
    ]


def burst(traffic: Traffic, random: Random) -> list[Request]:
    """Five times as many requests as run at once, of all lengths, every third with a seed of its own prompt."""
    found, number = list[Request](), count()
    for i in range(5 * traffic.limits.max_num_seqs):
        drawn = random if i % 3 else Random(f"burst {i}")
        draw = {} if i % 3 else {"temperature": 0.9, "seed": 200 + next(number)}
        prompt = traffic.prompts.take(drawn, drawn.randint(5, 100))
        most = drawn.randint(4, traffic.limits.most_new_tokens)
        found.append(traffic.completion("burst", prompt, streams=i % 2 == 0, max_tokens=most, **draw))
    return random.sample(found, len(found))


KINDS: Sequence[Kind] = (
    lengths,
    seeds,
    several,
    sampled,
    grammars,
    ends,
    log_probabilities,
    chats,
    leaving,
    shared_prefix,
    crowd,
    burst,
)
