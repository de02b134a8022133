"""The published ways to generate and the self-verified one, for ragged batches, as calls and as iterators."""

from twotower_spec.generation.autoregressive import generate_ar, generate_mock_ar, stream_ar, stream_mock_ar
from twotower_spec.generation.block_diffusion import generate_mask_diffusion, stream_mask_diffusion
from twotower_spec.generation.phase_times import PhaseTimes
from twotower_spec.generation.result import CommittedBlock, GenerationResult
from twotower_spec.generation.self_speculative import generate_self_speculative, stream_self_speculative

__all__ = [
    "CommittedBlock",
    "GenerationResult",
    "PhaseTimes",
    "generate_ar",
    "generate_mask_diffusion",
    "generate_mock_ar",
    "generate_self_speculative",
    "stream_ar",
    "stream_mask_diffusion",
    "stream_mock_ar",
    "stream_self_speculative",
]
