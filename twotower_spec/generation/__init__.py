"""The three published ways to generate, for ragged batches, as calls and as iterators over committed blocks."""

from twotower_spec.generation.autoregressive import generate_ar, generate_mock_ar, stream_ar, stream_mock_ar
from twotower_spec.generation.block_diffusion import BlockDenoiser, generate_mask_diffusion, stream_mask_diffusion
from twotower_spec.generation.result import CommittedBlock, GenerationResult, PhaseTimes

__all__ = [
    "BlockDenoiser",
    "CommittedBlock",
    "GenerationResult",
    "PhaseTimes",
    "generate_ar",
    "generate_mask_diffusion",
    "generate_mock_ar",
    "stream_ar",
    "stream_mask_diffusion",
    "stream_mock_ar",
]
