"""The published ways to generate and the self-verified one, for ragged batches, as calls and as iterators."""

from twotower_spec.generation.modes import MODES, generate, stream
from twotower_spec.generation.options import GenerationOptions, Mode, ModeOptions
from twotower_spec.generation.phase_times import PhaseTimes
from twotower_spec.generation.result import CommittedBlock, GenerationResult

__all__ = [
    "MODES",
    "CommittedBlock",
    "GenerationOptions",
    "GenerationResult",
    "Mode",
    "ModeOptions",
    "PhaseTimes",
    "generate",
    "stream",
]
