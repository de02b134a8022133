"""Messages to an engine in a process of its own, and its answers."""

from __future__ import annotations

from dataclasses import dataclass

from twotower_bench.records import DecodingSteps, Drafting, ServedRequest


@dataclass(frozen=True)
class Ready:
    """The engine is loaded.

    Attributes:
        version: vLLM's.
        max_model_len: most tokens of a prompt and its text together.
    """

    version: str
    max_model_len: int


@dataclass(frozen=True)
class Asked:
    """A prompt, as text or tokens."""

    prompt_id: str
    category: str
    prompt: str | tuple[int, ...]


@dataclass(frozen=True)
class ServeOrder:
    """Generate for these prompts; as one request ends the next begins.

    Attributes:
        prompts: in the order of submission.
        concurrency: requests at once.
        max_new_tokens: per prompt.
        temperature: of the verifier.
    """

    prompts: tuple[Asked, ...]
    concurrency: int
    max_new_tokens: int
    temperature: float = 0.0


@dataclass(frozen=True)
class Served:
    """Outcome of a `ServeOrder`; for its fields see `ServingCell`."""

    seconds: float
    requests: tuple[ServedRequest, ...]
    steps: tuple[DecodingSteps, ...] = ()
    drafting: Drafting | None = None


@dataclass(frozen=True)
class Piece:
    """Text of one step of the verifier.

    Attributes:
        accepted: drafted tokens that it kept.
        own: the token it added itself.
        num_accepted_tokens: how many `accepted` are.
        is_last: whether the text ends here.
    """

    accepted: str
    own: str
    num_accepted_tokens: int
    is_last: bool
