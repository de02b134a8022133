"""Ways to generate with the model alone, as evaluations name and compare them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from twotower_spec.config import DiffusionConfig
from twotower_spec.errors import ArgumentError
from twotower_spec.generation import CommittedBlock, GenerationResult
from twotower_spec.generation.batch import Seeds, TokenIds
from twotower_spec.generation.self_speculative import DEFAULT_BLOCK_SIZE, DEFAULT_STEPS_PER_BLOCK
from twotower_spec.model import TwoTowerModel

Mode = Literal["ar", "mock-ar", "mask-diffusion", "self-speculative"]
MODES: tuple[Mode, ...] = get_args(Mode)

# Tokens per block, most steps.
DENOISING_DEFAULTS = {
    "mask-diffusion": (16, 16),
    "self-speculative": (DEFAULT_BLOCK_SIZE, DEFAULT_STEPS_PER_BLOCK),
}
# What the model card recommends.
DEFAULT_CONFIDENCE_THRESHOLD = 0.8


@dataclass(frozen=True)
class Setting:
    """A mode and, where it denoises blocks, how.

    Attributes:
        mode: one of `MODES`.
        block_size: tokens per block; None where the mode has no blocks.
        steps_per_block: most denoising steps; None likewise.
        confidence_threshold: picks more probable than this are committed early; None likewise, and with one step,
            which commits everything whatever its confidence.
    """

    mode: Mode
    block_size: int | None = None
    steps_per_block: int | None = None
    confidence_threshold: float | None = None

    @classmethod
    def of(
        cls,
        mode: str,
        block_size: int | None = None,
        steps_per_block: int | None = None,
        confidence_threshold: float | None = None,
    ) -> Setting:
        """The setting with the mode's defaults for what is None.

        Settings that generate the same text in the same passes are equal: more steps than positions are never taken.

        Raises:
            ArgumentError: a value is out of range, the mode unknown, or without blocks while something is given.
        """
        if mode not in MODES:
            raise ArgumentError(f"mode {mode!r} is not known; give one of {', '.join(MODES)}")
        if mode not in DENOISING_DEFAULTS:
            if (block_size, steps_per_block, confidence_threshold) != (None, None, None):
                raise ArgumentError(
                    f"mode {mode} denoises no blocks; leave out gamma, steps and block_size, or choose mask-diffusion"
                )
            return cls(mode)
        size, steps = DENOISING_DEFAULTS[mode]
        size = size if block_size is None else block_size
        steps = steps if steps_per_block is None else steps_per_block
        threshold = DEFAULT_CONFIDENCE_THRESHOLD if confidence_threshold is None else confidence_threshold
        DiffusionConfig(size, steps, threshold)
        steps = min(steps, size)
        return cls(mode, size, steps, threshold if steps > 1 else None)

    @property
    def label(self) -> str:
        """The setting in a few words."""
        words: list[str] = [self.mode]
        if self.block_size is not None:
            words += [f"S={self.block_size}", f"steps={self.steps_per_block}"]
        if self.confidence_threshold is not None:
            words.append(f"gamma={self.confidence_threshold:g}")
        return " ".join(words)

    @property
    def needs_denoiser(self) -> bool:
        """Whether the context tower alone is not enough."""
        return self.mode != "ar"

    def generate(
        self, towers: TwoTowerModel, rows: Sequence[Sequence[int]], max_new_tokens: int, eos_token_id: TokenIds
    ) -> GenerationResult:
        """Generates greedily.

        Args:
            towers: the model.
            rows: token ids of the prompts.
            max_new_tokens: most new tokens per row.
            eos_token_id: ids that end a row.
        """
        if self.mode == "ar":
            return towers.generate_ar(rows, max_new_tokens, eos_token_id=eos_token_id)
        if self.mode == "mock-ar":
            return towers.generate_mock_ar(rows, max_new_tokens, eos_token_id=eos_token_id)
        config = self.diffusion_config(towers.config.mask_token_id)
        generate = towers.generate_mask_diffusion if self.mode == "mask-diffusion" else towers.generate_self_speculative
        return generate(
            rows,
            max_new_tokens,
            block_size=config.block_size,
            steps_per_block=config.steps_per_block,
            confidence_threshold=config.confidence_threshold,
            eos_token_id=eos_token_id,
        )

    def stream(
        self,
        towers: TwoTowerModel,
        rows: Sequence[Sequence[int]],
        max_new_tokens: int,
        eos_token_id: TokenIds,
        sampling: Sampling,
        seed: Seeds,
    ) -> Iterator[CommittedBlock]:
        """What every row gains, as it is committed; arguments as `generate`, and the sampling with its seeds."""
        values = (sampling.temperature, sampling.top_k, sampling.top_p)
        if self.mode == "ar":
            return towers.stream_ar(rows, max_new_tokens, *values, eos_token_id, seed=seed)
        if self.mode == "mock-ar":
            return towers.stream_mock_ar(rows, max_new_tokens, *values, eos_token_id, seed=seed)
        config = replace(
            self.diffusion_config(towers.config.mask_token_id),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
        )
        stream = towers.stream_mask_diffusion if self.mode == "mask-diffusion" else towers.stream_self_speculative
        return stream(rows, max_new_tokens, config, eos_token_id, seed=seed)

    def diffusion_config(self, mask_token_id: int) -> DiffusionConfig:
        """How blocks are denoised, greedily."""
        assert self.block_size is not None and self.steps_per_block is not None
        threshold = self.confidence_threshold
        return DiffusionConfig(
            block_size=self.block_size,
            steps_per_block=self.steps_per_block,
            confidence_threshold=DEFAULT_CONFIDENCE_THRESHOLD if threshold is None else threshold,
            mask_token_id=mask_token_id,
        )


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; temperature 0 is greedy, None takes the whole vocabulary."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
