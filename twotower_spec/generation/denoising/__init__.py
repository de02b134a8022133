"""Filling masked blocks: the request, the loops that can serve it, what a step commits, and who may look on."""

from twotower_spec.generation.denoising.commit_rules import (
    CommitRule,
    DenoisingStep,
    PublishedSchedule,
    Schedule,
    behind_first,
)
from twotower_spec.generation.denoising.host_loop import HostLoop
from twotower_spec.generation.denoising.loop import DenoisingLoop
from twotower_spec.generation.denoising.observers import (
    FirstStepProbs,
    ObservedStep,
    StepCallback,
    StepCallbackObserver,
    StepObserver,
    TraceRecorder,
)
from twotower_spec.generation.denoising.passes import DenoiserPasses
from twotower_spec.generation.denoising.picking import TokenPicker
from twotower_spec.generation.denoising.request import DenoisedBlocks, DenoisingRequest
from twotower_spec.generation.denoising.schedule_loop import ScheduleLoop

__all__ = [
    "CommitRule",
    "DenoisedBlocks",
    "DenoiserPasses",
    "DenoisingLoop",
    "DenoisingRequest",
    "DenoisingStep",
    "FirstStepProbs",
    "HostLoop",
    "ObservedStep",
    "PublishedSchedule",
    "Schedule",
    "ScheduleLoop",
    "StepCallback",
    "StepCallbackObserver",
    "StepObserver",
    "TokenPicker",
    "TraceRecorder",
    "behind_first",
]
