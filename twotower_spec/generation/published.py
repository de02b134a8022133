"""The published calls, `generate_*` with their argument names and defaults, and the same as iterators, `stream_*`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from twotower_spec.config import DiffusionConfig
from twotower_spec.generation.batch import Prompts
from twotower_spec.generation.denoising import StepCallback
from twotower_spec.generation.modes import generate, stream
from twotower_spec.generation.options import (
    BLOCK_DEFAULTS,
    DEFAULT_CONFIDENCE_THRESHOLD,
    EosTokenIds,
    GenerationOptions,
    Mode,
    Seeds,
)
from twotower_spec.generation.result import CommittedBlock, GenerationResult
from twotower_spec.towers.model import TwoTowers

SELF_SPECULATIVE_BLOCK_SIZE, SELF_SPECULATIVE_STEPS = BLOCK_DEFAULTS[Mode.SELF_SPECULATIVE]


class GeneratingTowers(TwoTowers):
    """Towers that generate: every method makes `GenerationOptions` of its arguments."""

    def generate(self, input_ids: Prompts, options: GenerationOptions) -> GenerationResult:
        """Generates in any mode: new tokens and passes per row, times, and traces if asked for."""
        return generate(self, input_ids, options)

    def stream(self, input_ids: Prompts, options: GenerationOptions) -> Iterator[CommittedBlock]:
        """`generate` as an iterator: what every row gains, as it is committed."""
        return stream(self, input_ids, options)

    def generate_ar(
        self,
        input_ids: Prompts,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: EosTokenIds = None,
        *,
        seed: Seeds = None,
    ) -> GenerationResult:
        """Autoregressive generation with the context tower alone.

        Args:
            input_ids: prompts, int64 [num_reqs, num_tokens], or one list of ids per prompt (of any lengths).
            max_new_tokens: most new tokens per row.
            temperature: 0 for greedy.
            top_k: sample among the k most probable tokens; None or 0 for all.
            top_p: sample among the most probable tokens up to this probability; None or 1 for all.
            eos_token_id: an id or several ids that end a row; None to run to `max_new_tokens`.
            seed: of the sampling noise; row i of a call uses `seed + i`, or give one per row. None for a random one.

        Returns:
            New tokens per row (an end token included), times.

        Raises:
            ArgumentError: an argument is not allowed.

        Source: modeling_nemotron_twotower.py, generate_ar.
        """
        return generate(
            self, input_ids, _one_by_one(Mode.AR, max_new_tokens, temperature, top_k, top_p, eos_token_id, seed)
        )

    def stream_ar(
        self,
        input_ids: Prompts,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: EosTokenIds = None,
        *,
        seed: Seeds = None,
    ) -> Iterator[CommittedBlock]:
        """`generate_ar` as an iterator: every token as it is committed."""
        return stream(
            self, input_ids, _one_by_one(Mode.AR, max_new_tokens, temperature, top_k, top_p, eos_token_id, seed)
        )

    def generate_mock_ar(
        self,
        input_ids: Prompts,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: EosTokenIds = None,
        *,
        seed: Seeds = None,
    ) -> GenerationResult:
        """Token by token with the denoiser tower, which reads the last token again on the context before it.

        Arguments, result and errors are those of `generate_ar`.

        Source: modeling_nemotron_twotower.py, generate_mock_ar.
        """
        return generate(
            self, input_ids, _one_by_one(Mode.MOCK_AR, max_new_tokens, temperature, top_k, top_p, eos_token_id, seed)
        )

    def stream_mock_ar(
        self,
        input_ids: Prompts,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: EosTokenIds = None,
        *,
        seed: Seeds = None,
    ) -> Iterator[CommittedBlock]:
        """`generate_mock_ar` as an iterator: every token as it is committed."""
        return stream(
            self, input_ids, _one_by_one(Mode.MOCK_AR, max_new_tokens, temperature, top_k, top_p, eos_token_id, seed)
        )

    def generate_mask_diffusion(
        self,
        input_ids: Prompts,
        max_new_tokens: int = 128,
        block_size: int = 16,
        steps_per_block: int = 16,
        mask_token_id: int | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        confidence_threshold: float = 0.9,
        eos_token_id: EosTokenIds = None,
        step_callback: StepCallback | None = None,
        *,
        top_p: float | None = None,
        seed: Seeds = None,
        return_traces: bool = False,
    ) -> GenerationResult:
        """Block diffusion: blocks are denoised in parallel over a few steps, then read by the context tower.

        Args:
            input_ids: prompts, int64 [num_reqs, num_tokens], or one list of ids per prompt (of any lengths).
            max_new_tokens: most new tokens per row; the last block is cut where it is no multiple of `block_size`.
            block_size: tokens per block.
            steps_per_block: most denoising steps per block.
            mask_token_id: None for the one of the configuration (3).
            temperature: 0 for greedy; above, picks are sampled, confidences stay those of temperature 1.
            top_k: sample among the k most probable tokens; None or 0 for all.
            confidence_threshold: picks more probable than this are committed; the model card recommends 0.8.
            eos_token_id: an id or several ids; a row ends after the block that contains one. The block is kept whole.
            step_callback: see `StepCallback`.
            top_p: sample among the most probable tokens up to this probability; None or 1 for all.
            seed: of the sampling noise; row i of a call uses `seed + i`, or give one per row. None for a random one.
            return_traces: record every step.

        Returns:
            New tokens and denoiser passes per row, times, traces.

        Raises:
            ArgumentError: an argument is not allowed, or the denoiser is not loaded.

        Source: modeling_nemotron_twotower.py, generate_mask_diffusion.
        """
        options = GenerationOptions(
            mode=Mode.MASK_DIFFUSION,
            max_new_tokens=max_new_tokens,
            block_size=block_size,
            steps_per_block=steps_per_block,
            confidence_threshold=confidence_threshold,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            mask_token_id=mask_token_id,
            eos_token_id=eos_token_id,
            seed=seed,
            return_traces=return_traces,
            step_callback=step_callback,
        )
        return generate(self, input_ids, options)

    def stream_mask_diffusion(
        self,
        input_ids: Prompts,
        max_new_tokens: int = 128,
        config: DiffusionConfig | None = None,
        eos_token_id: EosTokenIds = None,
        *,
        seed: Seeds = None,
        with_traces: bool = False,
    ) -> Iterator[CommittedBlock]:
        """`generate_mask_diffusion` as an iterator: every block as it is committed, with its trace if asked for."""
        config = config or DiffusionConfig(mask_token_id=self.config.mask_token_id)
        options = GenerationOptions(
            mode=Mode.MASK_DIFFUSION,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_token_id,
            seed=seed,
            return_traces=with_traces,
            **asdict(config),
        )
        return stream(self, input_ids, options)

    def generate_self_speculative(
        self,
        input_ids: Prompts,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: EosTokenIds = None,
        *,
        block_size: int = SELF_SPECULATIVE_BLOCK_SIZE,
        steps_per_block: int = SELF_SPECULATIVE_STEPS,
        confidence_threshold: float = DEFAULT_CONFIDENCE_THRESHOLD,
        mask_token_id: int | None = None,
        seed: Seeds = None,
    ) -> GenerationResult:
        """The text of `generate_ar`, several tokens per pass of the context tower, and no second model.

        The denoiser drafts, and the context tower accepts what it would write itself; see `self_speculative`.

        Args:
            input_ids: prompts, int64 [num_reqs, num_tokens], or one list of ids per prompt (of any lengths).
            max_new_tokens: most new tokens per row.
            temperature: 0 for greedy.
            top_k: sample among the k most probable tokens; None or 0 for all.
            top_p: sample among the most probable tokens up to this probability; None or 1 for all.
            eos_token_id: an id or several ids that end a row; None to run to `max_new_tokens`.
            block_size: tokens per block, the first of which is given.
            steps_per_block: most denoising steps per block.
            confidence_threshold: picks more probable than this are committed before the last step.
            mask_token_id: None for the one of the configuration (3).
            seed: of the sampling noise; row i of a call uses `seed + i`, or give one per row. None for a random one.

        Returns:
            New tokens (an end token included), denoiser and context passes per row, times.

        Raises:
            ArgumentError: an argument is not allowed, or the denoiser is not loaded.
        """
        options = GenerationOptions(
            mode=Mode.SELF_SPECULATIVE,
            max_new_tokens=max_new_tokens,
            block_size=block_size,
            steps_per_block=steps_per_block,
            confidence_threshold=confidence_threshold,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            mask_token_id=mask_token_id,
            eos_token_id=eos_token_id,
            seed=seed,
        )
        return generate(self, input_ids, options)

    def stream_self_speculative(
        self,
        input_ids: Prompts,
        max_new_tokens: int = 128,
        config: DiffusionConfig | None = None,
        eos_token_id: EosTokenIds = None,
        *,
        seed: Seeds = None,
    ) -> Iterator[CommittedBlock]:
        """`generate_self_speculative` as an iterator: one or several tokens as they are committed."""
        config = config or DiffusionConfig(
            SELF_SPECULATIVE_BLOCK_SIZE, SELF_SPECULATIVE_STEPS, mask_token_id=self.config.mask_token_id
        )
        options = GenerationOptions(
            mode=Mode.SELF_SPECULATIVE,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_token_id,
            seed=seed,
            **asdict(config),
        )
        return stream(self, input_ids, options)


def _one_by_one(
    mode: Mode,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    eos_token_id: EosTokenIds,
    seed: Seeds,
) -> GenerationOptions:
    """Options of a mode without blocks."""
    return GenerationOptions(
        mode,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        eos_token_id=eos_token_id,
        seed=seed,
    )
