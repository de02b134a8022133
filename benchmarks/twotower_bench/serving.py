"""What is measured of serving engines: who speculates how, under which load, and what became of every request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from twotower_bench.serving_profile import DraftSetting
from twotower_spec.drafting.metrics import CalibrationBin

ALL_CATEGORIES = "all"
BASELINE = "none"
# The same engine once more: how much two runs of the same thing differ.
BASELINE_AGAIN = "none_again"
# Reasons to have no drafts in a round that belong to drafting.
EXPECTED_WITHOUT_DRAFTS = ("prefilling", "policy", "limit")


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

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> System:
        """From `asdict`."""
        setting = raw["setting"]
        return cls(**{**raw, "setting": DraftSetting(**setting) if setting else None})


@dataclass(frozen=True, order=True)
class Load:
    """What is asked of an engine.

    Attributes:
        category: of the prompts; `ALL_CATEGORIES` for all together.
        concurrency: requests at once: as one ends the next begins.
        temperature: of the verifier.
    """

    category: str
    concurrency: int
    temperature: float = 0.0

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
    num_prompt_tokens: int
    token_ids: tuple[int, ...]
    first_token_s: float
    seconds: float
    gaps_s: tuple[float, ...]
    num_draft_tokens: tuple[int, ...]
    num_accepted_tokens: tuple[int, ...]

    @property
    def token_s(self) -> float | None:
        """Time per output token after the first (TPOT); None for a single token."""
        return (self.seconds - self.first_token_s) / (len(self.token_ids) - 1) if len(self.token_ids) > 1 else None

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> ServedRequest:
        """From `asdict`, or what JSON makes of it."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()
        }
        return cls(**values)


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

    num_reqs: int
    num_tokens: int
    seconds: tuple[float, ...]
    drafting_s: Mapping[str, float] = field(default_factory=dict)
    denoiser_passes: int = 0

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> DecodingSteps:
        """From `asdict`, or what JSON makes of it."""
        return cls(**{**raw, "seconds": tuple(raw["seconds"])})


@dataclass(frozen=True)
class Drafting:
    """What TwoTower's drafter counted.

    Attributes:
        rounds: of drafting.
        context_tokens: read by the context tower, prompts included.
        denoiser_passes: of whole batches.
        request_denoiser_passes: requests counted separately (NFE).
        seconds: by phase: extend, denoise, host.
        without_drafts: requests that got none in a round, by reason.
        calibration: by confidence of the drafts that were decided on.
    """

    rounds: int
    context_tokens: int
    denoiser_passes: int
    request_denoiser_passes: int
    seconds: Mapping[str, float]
    without_drafts: Mapping[str, int] = field(default_factory=dict)
    calibration: tuple[CalibrationBin, ...] = ()

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Drafting:
        """From `asdict`, or what JSON makes of it."""
        return cls(**{**raw, "calibration": tuple(CalibrationBin(**one) for one in raw["calibration"])})


@dataclass(frozen=True)
class ServingCell:
    """A system under a load, once.

    Attributes:
        system, load: which.
        repeat: which pass over everything.
        seconds: from the first submission to the end of the last request.
        requests: in the order of the prompts.
        steps: by shape.
        drafting: None where TwoTower does not draft.
    """

    system: System
    load: Load
    repeat: int
    seconds: float
    requests: tuple[ServedRequest, ...]
    steps: tuple[DecodingSteps, ...] = ()
    drafting: Drafting | None = None

    @property
    def tokens_per_s(self) -> float:
        """Of all requests together."""
        return sum(len(request.token_ids) for request in self.requests) / self.seconds

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> ServingCell:
        """From what `to_json` gives; fields that it does not have are ignored."""
        drafting = raw["drafting"]
        return cls(
            system=System.from_json(raw["system"]),
            load=Load(**raw["load"]),
            repeat=raw["repeat"],
            seconds=raw["seconds"],
            requests=tuple(map(ServedRequest.from_json, raw["requests"])),
            steps=tuple(map(DecodingSteps.from_json, raw["steps"])),
            drafting=Drafting.from_json(drafting) if drafting else None,
        )


def cells_of(cells: Sequence[ServingCell], system: str, load: Load) -> list[ServingCell]:
    """Repeats of one system under one load, in order."""
    return sorted(
        (cell for cell in cells if cell.system.name == system and cell.load == load), key=lambda cell: cell.repeat
    )


def over_categories(cells: Sequence[ServingCell]) -> list[ServingCell]:
    """Categories that were measured one after the other as one cell, for every system, concurrency and repeat.

    Empty where there is one category alone, or loads hold all prompts as it is. A run that was stopped has places where
    some categories are missing: these are left out, since they would be compared with other prompts.
    """
    categories = {cell.load.category for cell in cells}
    if len(categories) < 2 or ALL_CATEGORIES in categories:
        return []
    groups: dict[tuple[str, Load, int], list[ServingCell]] = {}
    for cell in cells:
        together = replace(cell.load, category=ALL_CATEGORIES)
        groups.setdefault((cell.system.name, together, cell.repeat), []).append(cell)
    return [
        ServingCell(
            system=group[0].system,
            load=load,
            repeat=repeat,
            seconds=sum(cell.seconds for cell in group),
            requests=tuple(request for cell in group for request in cell.requests),
            steps=tuple(steps for cell in group for steps in cell.steps),
            drafting=_added_up([cell.drafting for cell in group if cell.drafting]),
        )
        for (_, load, repeat), group in groups.items()
        if {cell.load.category for cell in group} == categories
    ]


def _added_up(parts: Sequence[Drafting]) -> Drafting | None:
    if not parts:
        return None
    seconds, without_drafts = Counter[str](), Counter[str]()
    for part in parts:
        seconds.update(part.seconds)
        without_drafts.update(part.without_drafts)
    return Drafting(
        rounds=sum(part.rounds for part in parts),
        context_tokens=sum(part.context_tokens for part in parts),
        denoiser_passes=sum(part.denoiser_passes for part in parts),
        request_denoiser_passes=sum(part.request_denoiser_passes for part in parts),
        seconds=dict(seconds),
        without_drafts=dict(without_drafts),
        # Bins of the same bounds are merged where they are looked at.
        calibration=tuple(one for part in parts for one in part.calibration),
    )


def in_order_of_tables(systems: Iterable[System]) -> list[System]:
    """Different ones by name: no speculation, the same again, rivals, TwoTower; else as they come.

    Cells are measured in an order that is drawn.
    """

    def rank(system: System) -> tuple[bool, bool, bool]:
        return system.name != BASELINE, system.name != BASELINE_AGAIN, system.is_two_tower

    return sorted({system.name: system for system in systems}.values(), key=rank)
