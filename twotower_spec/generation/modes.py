"""The modes there are, what each needs, and the one way in: options and prompts to tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from twotower_spec.generation.autoregressive import stream_ar, stream_mock_ar
from twotower_spec.generation.batch import Batch, Prompts
from twotower_spec.generation.mask_diffusion import stream_mask_diffusion
from twotower_spec.generation.options import GenerationOptions, Mode
from twotower_spec.generation.result import CommittedBlock, GenerationResult
from twotower_spec.generation.self_speculative import stream_self_speculative
from twotower_spec.towers.model import TwoTowers


@dataclass(frozen=True)
class ModeEntry:
    """One mode: how it generates, and what it needs.

    Attributes:
        stream: generates for a batch, and yields what its rows gain as it is committed.
        needs_denoiser: whether the context tower alone is not enough.
        reads_whole_blocks: whether the context tower reads blocks as they were denoised, up to the last but one; else
            it reads every token but the last of a row.
    """

    stream: Callable[[Batch, GenerationOptions], Iterator[CommittedBlock]]
    needs_denoiser: bool = True
    reads_whole_blocks: bool = False


MODES = {
    Mode.AR: ModeEntry(stream_ar, needs_denoiser=False),
    Mode.MOCK_AR: ModeEntry(stream_mock_ar),
    Mode.MASK_DIFFUSION: ModeEntry(stream_mask_diffusion, reads_whole_blocks=True),
    Mode.SELF_SPECULATIVE: ModeEntry(stream_self_speculative),
}


def generate(towers: TwoTowers, prompts: Prompts, options: GenerationOptions) -> GenerationResult:
    """Generates to the end of every row.

    Args:
        towers: the model.
        prompts: int64 [num_reqs, num_tokens], or one list of ids per prompt (of any lengths).
        options: how.

    Returns:
        New tokens and passes per row, times, and traces if asked for.

    Raises:
        ArgumentError: an option does not fit the model, or a prompt is refused.
    """
    batch = _batch(towers, prompts, options)
    return batch.collect(MODES[options.mode].stream(batch, options), options.return_traces)


def stream(towers: TwoTowers, prompts: Prompts, options: GenerationOptions) -> Iterator[CommittedBlock]:
    """`generate` as an iterator: what every row gains, as it is committed; refuses before it is read."""
    return MODES[options.mode].stream(_batch(towers, prompts, options), options)


def _batch(towers: TwoTowers, prompts: Prompts, options: GenerationOptions) -> Batch:
    mode = MODES[options.mode]
    if mode.needs_denoiser:
        towers.require_denoiser()
    num_read = max(options.max_new_tokens - 1, 0)
    if mode.reads_whole_blocks:
        assert options.block_size is not None
        num_read -= num_read % options.block_size
    return Batch(towers, prompts, options, num_read)
