"""Rows that benchmarks write as JSON lines: plain dataclasses, which pydantic reads back.

A row is `asdict` of one of these, and says beside it where it was measured, see `MeasurementFile`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge, Gt, Lt, MinLen

from twotower_spec.config import check_integer
from twotower_spec.drafting.metrics import CalibrationBin
from twotower_spec.errors import ArgumentError

ALL_CATEGORIES = "all"
BASELINE = "none"
# The same engine once more: how much two runs of the same thing differ.
BASELINE_AGAIN = "none_again"
# Reasons to have no drafts in a round that belong to drafting.
EXPECTED_WITHOUT_DRAFTS = ("prefilling", "policy", "limit")

# What a run can have measured; rows that are read are held against it.
Seconds = Annotated[float, Ge(0), Lt(1e9)]
Duration = Annotated[float, Gt(1e-9), Lt(1e9)]
Count = Annotated[int, Ge(0), Lt(2**53)]

T = TypeVar("T")


def read_row(
    kind: type[T],
    row: Any,
    where: str = "the row",
    what: str = "a row that a benchmark wrote",
    remedy: str = "give a file that was written with --json, as it was written",
) -> T:
    """Makes a record from what JSON holds; fields that the record does not have are ignored.

    Args:
        kind: dataclass of the record.
        row: parsed JSON.
        where: the row's file and line, for errors.
        what, remedy: what it should be and what to do if it is not, for errors.

    Raises:
        ArgumentError: a field is missing or has another type; its name is in the message.
    """
    from pydantic import ValidationError

    try:
        record: T = _adapter(kind).validate_python(row)  # type: ignore[arg-type]  # classes are hashable
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole row"
        raise ArgumentError(f"{where} is not {what} ({place}: {first['msg']}); {remedy}") from error
    return record


@cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter  # imported where files are read: the command line imports this file to start

    return TypeAdapter(kind)


@dataclass(frozen=True)
class DraftSetting:
    """One way to draft that a sweep measures.

    Attributes:
        num_speculative_tokens: K, drafts per round; at most, where the policy chooses.
        block_size: positions that are denoised, at least K.
        steps_per_block: most denoising steps.
        policy: `fixed`, `threshold` or `adaptive`.
        confidence_threshold: where the policy has one.
        first_token: which tower makes the first draft.

    Raises:
        ArgumentError: a number is out of range.
    """

    num_speculative_tokens: int
    block_size: int
    steps_per_block: int = 1
    policy: Literal["fixed", "threshold", "adaptive"] = "fixed"
    confidence_threshold: float | None = None
    first_token: Literal["context", "denoiser"] = "context"

    def __post_init__(self) -> None:
        for name in ("num_speculative_tokens", "block_size", "steps_per_block"):
            check_integer(name, getattr(self, name), minimum=1)
        if self.num_speculative_tokens > self.block_size:
            raise ArgumentError(
                f"num_speculative_tokens {self.num_speculative_tokens} is more than block_size {self.block_size}; "
                f"give {self.block_size} or fewer"
            )

    @property
    def name(self) -> str:
        """In words."""
        steps = f"{self.steps_per_block} step{'' if self.steps_per_block == 1 else 's'}"
        policy = "" if self.policy == "fixed" else f", {self.policy}"
        return f"K {self.num_speculative_tokens}, block of {self.block_size}, {steps}{policy}"


@dataclass(frozen=True)
class System:
    """A way to speculate.

    Attributes:
        name: unique in a run, as `ngram`.
        title: as in tables.
        speculative_config: vLLM's; None for no speculation.
        setting: how TwoTower drafts; None for all others.
    """

    name: str
    title: str
    speculative_config: Mapping[str, Any] | None = None
    setting: DraftSetting | None = None

    @property
    def is_two_tower(self) -> bool:
        """Whether TwoTower drafts."""
        return self.setting is not None or self.name == "twotower" or "twotower" in (self.speculative_config or {})

    @property
    def is_to_draft(self) -> bool:
        """Whether TwoTower is meant to draft in some rounds."""
        knobs = (self.speculative_config or {}).get("twotower")
        return self.is_two_tower and not (isinstance(knobs, Mapping) and knobs.get("policy") == "off")


@dataclass(frozen=True, order=True)
class Load:
    """Load of an engine: which prompts, how many at once, how sampled.

    Attributes:
        category: of the prompts; `ALL_CATEGORIES` for all together.
        concurrency: requests at once: as one ends the next begins.
        temperature: of the verifier.
    """

    category: str
    concurrency: Annotated[Count, Ge(1)]
    temperature: Annotated[float, Ge(0)] = 0.0

    def __str__(self) -> str:
        heat = f", temperature {self.temperature:g}" if self.temperature else ""
        return f"{self.category}, {self.concurrency} at once{heat}"


@dataclass(frozen=True)
class ServedRequest:
    """One request. A step is one of the verifier in which the request had its prompt behind it.

    Attributes:
        prompt_id, category: of its prompt.
        num_prompt_tokens: tokens of its prompt.
        token_ids: of its text.
        first_token_s: from submission to the first token (TTFT).
        seconds: from submission to the end.
        gaps_s: between one output and the next (ITL); with speculation an output can be several tokens.
        num_draft_tokens: verified, per step.
        num_accepted_tokens: of these, per step.
    """

    prompt_id: str
    category: str
    num_prompt_tokens: Count
    token_ids: tuple[int, ...]
    first_token_s: Seconds
    seconds: Seconds
    gaps_s: tuple[Seconds, ...]
    num_draft_tokens: tuple[Count, ...]
    num_accepted_tokens: tuple[Count, ...]

    @property
    def token_s(self) -> float | None:
        """Time per output token after the first (TPOT); None for a single token."""
        return (self.seconds - self.first_token_s) / (len(self.token_ids) - 1) if len(self.token_ids) > 1 else None

    @property
    def num_unused_tokens(self) -> int:
        """Tokens that its last step gained beyond the end of its text."""
        return 1 + sum(self.num_accepted_tokens) + len(self.num_accepted_tokens) - len(self.token_ids)


@dataclass(frozen=True)
class DecodingSteps:
    """Steps of one shape, without a request that still reads its prompt.

    Attributes:
        num_reqs: requests in each.
        num_tokens: that each request reads: 1 + its drafts.
        seconds: of every step, drafting by TwoTower left out.
        drafting_s: of TwoTower in all these steps, by phase: extend, denoise, host; empty where it does not draft.
        denoiser_passes: of whole batches, in all these steps.
    """

    num_reqs: Annotated[Count, Ge(1)]
    num_tokens: Annotated[Count, Ge(1)]
    seconds: tuple[Seconds, ...]
    drafting_s: Mapping[str, Seconds] = field(default_factory=dict)
    denoiser_passes: Count = 0


@dataclass(frozen=True)
class Drafting:
    """Counts of TwoTower's drafter.

    Attributes:
        rounds: of drafting.
        context_tokens: read by the context tower, prompts included.
        denoiser_passes: of whole batches.
        request_denoiser_passes: requests counted separately (NFE).
        seconds: by phase: extend, denoise, host.
        without_drafts: requests that got none in a round, by reason.
        calibration: by confidence of the drafts that were decided on.
    """

    rounds: Count
    context_tokens: Count
    denoiser_passes: Count
    request_denoiser_passes: Count
    seconds: Mapping[str, Seconds]
    without_drafts: Mapping[str, Count] = field(default_factory=dict)
    calibration: tuple[CalibrationBin, ...] = ()


@dataclass(frozen=True)
class ServingCell:
    """A system in an engine under a load, measured once.

    Attributes:
        system: what was measured.
        load: what it was asked.
        repeat: which pass over everything.
        seconds: from the first submission to the end of the last request.
        requests: in the order of the prompts.
        steps: by shape.
        drafting: None where TwoTower does not draft.
    """

    system: System
    load: Load
    repeat: Count
    seconds: Duration
    requests: Annotated[tuple[ServedRequest, ...], MinLen(1)]
    steps: tuple[DecodingSteps, ...] = ()
    drafting: Drafting | None = None

    @property
    def place(self) -> Load:
        """Load that systems are compared under."""
        return self.load

    @property
    def temperature(self) -> float:
        """Temperature of the verifier."""
        return self.load.temperature

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all requests together per second."""
        return sum(len(request.token_ids) for request in self.requests) / self.seconds

    @property
    def speed(self) -> float:
        """Speed that systems are compared by, more is better."""
        return self.tokens_per_s

    @property
    def answers(self) -> Mapping[str, tuple[int, ...] | None]:
        """Texts by prompt; none is missing: where a request fails the engine does, and there is no cell."""
        return {request.prompt_id: request.token_ids for request in self.requests}


@dataclass(frozen=True)
class Traffic:
    """How requests come; exactly one of both is given.

    Attributes:
        concurrency: closed loop: so many at once, as one ends the next begins.
        request_rate: open loop: requests per second on average, at random times (Poisson), ready or not.
    """

    concurrency: int | None = None
    request_rate: float | None = None

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.request_rate is None):
            raise ArgumentError(
                f"concurrency {self.concurrency} with request rate {self.request_rate} is no traffic; give one of both"
            )
        if self.concurrency is not None:
            check_integer("concurrency", self.concurrency, minimum=1)
        elif not 0 < (self.request_rate or 0) < float("inf"):
            raise ArgumentError(f"request rate {self.request_rate} is not above 0; give requests per second, like 2")

    @property
    def is_closed(self) -> bool:
        """Whether requests wait for others to end."""
        return self.concurrency is not None

    @property
    def amount(self) -> float:
        """Requests at once, or per second."""
        return self.concurrency or self.request_rate or 0.0

    def __str__(self) -> str:
        return f"concurrency {self.concurrency}" if self.is_closed else f"{self.request_rate:g} requests/s"


@dataclass(frozen=True)
class LatencyBound:
    """Bounds in milliseconds that a good request keeps; None where anything will do.

    Attributes:
        ttft: time to the first token.
        tpot: time per output token after the first.
        e2el: time to the last token.
    """

    ttft: float | None = None
    tpot: float | None = None
    e2el: float | None = None

    @classmethod
    def parse(cls, text: str) -> LatencyBound:
        """Reads `ttft:500,tpot:50`.

        Raises:
            ArgumentError: it is not like that.
        """
        limits: dict[str, float] = {}
        for part in text.split(","):
            name, _, value = part.strip().partition(":")
            try:
                limit = float(value)
            except ValueError:
                limit = 0.0
            if name not in cls.__dataclass_fields__ or name in limits or not 0 < limit < float("inf"):
                raise ArgumentError(
                    f"goodput bound {text!r} has {part.strip()!r}; give ttft, tpot and e2el in milliseconds, each at "
                    f"most once, like ttft:500,tpot:50"
                )
            limits[name] = limit
        return cls(**limits)

    @property
    def pairs(self) -> tuple[str, ...]:
        """Bounds that are set, as `ttft:500`."""
        return tuple(f"{name}:{limit:g}" for name, limit in asdict(self).items() if limit is not None)

    def __str__(self) -> str:
        return ", ".join(f"{name.upper()} {limit:g} ms" for name, limit in asdict(self).items() if limit is not None)


@dataclass(frozen=True)
class Quantiles:
    """Median and 99th percentile of times, in seconds."""

    median: Seconds
    p99: Seconds


@dataclass(frozen=True)
class LoadPoint:
    """A server under a traffic, measured once.

    What a system gains is seen in another number by kind of traffic, see `speed`: in a closed loop a faster server
    gives more tokens per second, in an open loop requests come as they come, and it has each done sooner.

    Attributes:
        system: what was measured.
        traffic: how requests came.
        repeat: counts from 0.
        bound: which requests are good.
        temperature: of the verifier.
        seconds: from the first request to the end of the last.
        num_good: requests within the bound.
        num_output_tokens: of all requests that were completed.
        ttft, tpot, e2el: over requests: to the first token, per token after it, to the last token. In a closed loop
            they begin when the request is sent, not when it began to wait for its turn.
        itl: between one piece of text and the next; with speculation a piece can be several tokens.
        num_drafts, num_accepted_tokens: as the server counted meanwhile; 0 where nothing was drafted.
        texts: by prompt; None where the request failed.
    """

    system: System
    traffic: Traffic
    repeat: Count
    bound: LatencyBound
    temperature: Annotated[float, Ge(0)]
    seconds: Duration
    num_good: Count
    num_output_tokens: Count
    ttft: Quantiles
    tpot: Quantiles
    itl: Quantiles
    e2el: Quantiles
    num_drafts: Count
    num_accepted_tokens: Count
    texts: Annotated[tuple[str | None, ...], MinLen(1)]

    @property
    def place(self) -> Traffic:
        """Traffic that systems are compared under."""
        return self.traffic

    @property
    def answers(self) -> Mapping[str, str | None]:
        """Texts by prompt."""
        return {str(i): text for i, text in enumerate(self.texts)}

    @property
    def num_completed(self) -> int:
        """Requests that were answered."""
        return sum(text is not None for text in self.texts)

    @property
    def num_failed(self) -> int:
        """Requests that were not."""
        return len(self.texts) - self.num_completed

    @property
    def requests_per_s(self) -> float:
        """Requests completed per second."""
        return self.num_completed / self.seconds

    @property
    def goodput(self) -> float:
        """Requests completed within the bound per second."""
        return self.num_good / self.seconds

    @property
    def good_share(self) -> float:
        """Share of all requests within the bound."""
        return self.num_good / len(self.texts)

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all requests together per second."""
        return self.num_output_tokens / self.seconds

    @property
    def speed(self) -> float:
        """Speed that systems are compared by: tokens/s in a closed loop, else 1 / median time to the end."""
        return self.tokens_per_s if self.traffic.is_closed else 1 / self.e2el.median
