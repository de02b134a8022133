"""Options of generation: one object, made and checked once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from twotower_spec.config import check_integer, check_sampling, check_schedule
from twotower_spec.errors import ArgumentError
from twotower_spec.generation.denoising import PublishedSchedule, StepCallback
from twotower_spec.generation.sampling import Sampler

EosTokenIds = int | Iterable[int] | None
Seeds = int | Sequence[int] | None


class Mode(StrEnum):
    """The three published ways to generate, and self-verified diffusion."""

    AR = "ar"
    MOCK_AR = "mock-ar"
    MASK_DIFFUSION = "mask-diffusion"
    SELF_SPECULATIVE = "self-speculative"


# Tokens per block and most steps, of the modes that denoise blocks.
BLOCK_DEFAULTS = {Mode.MASK_DIFFUSION: (16, 16), Mode.SELF_SPECULATIVE: (8, 1)}
# What the model card recommends.
DEFAULT_CONFIDENCE_THRESHOLD = 0.8


@dataclass(frozen=True)
class ModeOptions:
    """A mode and, where it denoises blocks, how: what evaluations compare.

    Attributes:
        mode: a `Mode` or its name.
        block_size: tokens per block; None for the mode's default, and in modes without blocks.
        steps_per_block: most denoising steps per block; None likewise.
        confidence_threshold: picks more probable than this are committed early; None for 0.8, in modes without blocks,
            and with one step, which commits everything.

    Raises:
        ArgumentError: a value is out of range, the mode is unknown, or has no blocks while something about them is
            given.
    """

    mode: Mode
    block_size: int | None = None
    steps_per_block: int | None = None
    confidence_threshold: float | None = None

    def __post_init__(self) -> None:
        """Fills in the mode's defaults and refuses what is not allowed."""
        self._set(mode=as_mode(self.mode))
        if self.mode in BLOCK_DEFAULTS:
            self._fill_schedule(*BLOCK_DEFAULTS[self.mode])
        elif (self.block_size, self.steps_per_block, self.confidence_threshold) != (None, None, None):
            raise ArgumentError(
                f"mode {self.mode} denoises no blocks; leave out gamma, steps and block_size, or choose mask-diffusion"
            )

    def _fill_schedule(self, block_size: int, steps_per_block: int) -> None:
        size = block_size if self.block_size is None else self.block_size
        steps = steps_per_block if self.steps_per_block is None else self.steps_per_block
        threshold = DEFAULT_CONFIDENCE_THRESHOLD if self.confidence_threshold is None else self.confidence_threshold
        check_schedule(size, steps, threshold)
        given = threshold if steps > 1 else self.confidence_threshold
        self._set(block_size=size, steps_per_block=steps, confidence_threshold=given)

    def _set(self, **values: Any) -> None:
        """Sets fields of a frozen object, while it is made."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def schedule(self) -> PublishedSchedule:
        """The commit rule, in modes that denoise blocks."""
        assert self.steps_per_block is not None
        threshold = DEFAULT_CONFIDENCE_THRESHOLD if self.confidence_threshold is None else self.confidence_threshold
        return PublishedSchedule(threshold, self.steps_per_block)

    @property
    def label(self) -> str:
        """Mode and schedule in a few words."""
        words: list[str] = [self.mode]
        if self.block_size is not None:
            words += [f"S={self.block_size}", f"steps={self.steps_per_block}"]
        if self.confidence_threshold is not None:
            words.append(f"gamma={self.confidence_threshold:g}")
        return " ".join(words)

    def without_idle_steps(self) -> ModeOptions:
        """Options that are equal if they take the same passes to the same text.

        A block never takes more steps than it has tokens, and one step asks for no threshold.
        """
        if self.block_size is None or self.steps_per_block is None:
            return self
        steps = min(self.steps_per_block, self.block_size)
        threshold = self.confidence_threshold if steps > 1 else None
        return ModeOptions(self.mode, self.block_size, steps, threshold)

    def complete(self, **rest: Any) -> GenerationOptions:
        """Options of this mode; `rest` are those of `GenerationOptions` that are not left at their defaults."""
        return GenerationOptions(self.mode, self.block_size, self.steps_per_block, self.confidence_threshold, **rest)


@dataclass(frozen=True)
class GenerationOptions(ModeOptions):
    """Everything that decides what is generated, but for model and prompts.

    Attributes:
        mode, block_size, steps_per_block, confidence_threshold: as `ModeOptions`.
        max_new_tokens: most new tokens per row.
        temperature: 0 for greedy.
        top_k: sample among the k most probable tokens; None or 0 for all.
        top_p: sample among the most probable tokens up to this probability; None or 1 for all.
        mask_token_id: None for the model's.
        eos_token_id: an id or several ids that end a row; None to run to `max_new_tokens`.
        seed: of the sampling noise; row i of a call uses `seed + i`, or give one per row. None for a random one.
        return_traces: whether every denoising step is recorded (mask diffusion).
        step_callback: called around every denoising step (mask diffusion).

    Raises:
        ArgumentError: a value is out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    mask_token_id: int | None = None
    eos_token_id: EosTokenIds = None
    seed: Seeds = None
    return_traces: bool = False
    step_callback: StepCallback | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """See `ModeOptions.__post_init__`."""
        super().__post_init__()
        if self.eos_token_id is not None and not isinstance(self.eos_token_id, int):
            self._set(eos_token_id=tuple(self.eos_token_id))
        if self.seed is not None and not isinstance(self.seed, int):
            self._set(seed=tuple(self.seed))
        check_integer("max_new_tokens", self.max_new_tokens, minimum=0)
        check_sampling(self.temperature, self.top_k, self.top_p)
        if self.mask_token_id is not None:
            check_integer("mask_token_id", self.mask_token_id, minimum=0)

    @property
    def sampler(self) -> Sampler:
        """The sampler of both towers."""
        return Sampler(self.temperature, self.top_k, self.top_p)

    def to_json(self) -> dict[str, Any]:
        """Everything that decides which tokens are generated; what is about blocks, only in modes that have any."""
        names = ["mode", "max_new_tokens", "temperature", "top_k", "top_p", "eos_token_id", "seed"]
        if self.mode in BLOCK_DEFAULTS:
            names += ["block_size", "steps_per_block", "confidence_threshold", "mask_token_id"]
        return {name: getattr(self, name) for name in names}


def as_mode(name: str) -> Mode:
    """The mode of this name.

    Raises:
        ArgumentError: there is none.
    """
    try:
        return Mode(name)
    except ValueError as error:
        raise ArgumentError(f"mode {name!r} is not known; give one of {', '.join(Mode)}") from error
