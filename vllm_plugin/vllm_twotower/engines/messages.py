"""What the demo and its engines say to each other."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ready:
    """The engine is loaded; `version` is vLLM's."""

    version: str


@dataclass(frozen=True)
class MeasureOrder:
    """Generate these batches one after the other, every one with a call of its own."""

    batches: tuple[tuple[str, ...], ...]
    max_new_tokens: int


@dataclass(frozen=True)
class Measured:
    """What came of it.

    Attributes:
        seconds: all calls together.
        token_ids: of every prompt in turn.
        num_drafts: drafts that were verified, one per request and step.
        num_accepted_tokens: drafted tokens that were kept.
    """

    seconds: float
    token_ids: tuple[tuple[int, ...], ...]
    num_drafts: int
    num_accepted_tokens: int


@dataclass(frozen=True)
class StreamOrder:
    """Generate one prompt and send every step as it is made."""

    prompt: str
    max_new_tokens: int


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
