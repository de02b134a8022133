"""Pipeline of a recipe: all stages in order, independent ones side by side."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from twotower_spec.errors import ArgumentError
from twotower_spec.extras import require_extra
from twotower_spec.terminal import Terminal
from twotower_spec.towers.model import usable_device
from twotower_spec.training import stages
from twotower_spec.training.loop import read_log
from twotower_spec.training.processes import sharing_cores
from twotower_spec.training.recipe import Recipe, TrainingConfig, load_recipe
from twotower_spec.training.workspace import Workspace

Stage = Callable[[Workspace, torch.device], Path]
STAGES: dict[str, Stage] = {
    "tokenizer": stages.train_tokenizer_stage,
    "verifier": stages.train_verifier_stage,
    "context": stages.train_context_stage,
    "distill": stages.distill_stage,
    "denoiser": stages.train_denoiser_stage,
    "draft": stages.train_draft_stage,
}
# Each wave needs only the results of the waves before it.
WAVES = (("tokenizer",), ("verifier", "context"), ("distill",), ("denoiser", "draft"))


@dataclass(frozen=True)
class Job:
    """Arguments of a training, with which any process can run a stage.

    Attributes:
        output: folder of the training.
        recipe: file, None for the bundled trio's.
        verifier: the user's own verifier, or None.
        texts: the user's own text, or nothing.
        device: a device name; None for CUDA where there is one.
    """

    output: Path
    recipe: Path | None = None
    verifier: Path | None = None
    texts: Sequence[Path] = ()
    device: str | None = None

    def workspace(self) -> Workspace:
        """Opens the folder of the training, with its arguments checked."""
        require_extra("train", "matplotlib")
        return Workspace(self.output, load_recipe(self.recipe), self.verifier, self.texts)

    def torch_device(self) -> torch.device:
        """Looks up the device that stages run on."""
        return default_device(self.device)

    def run(self, stage: str) -> Path:
        """Runs one stage.

        Raises:
            ArgumentError: an argument is refused, the stage is not part of the recipe, or lacks an earlier one.
        """
        workspace, device = self.workspace(), self.torch_device()
        if stage not in stages_of(workspace):
            raise ArgumentError(
                f"stage {stage!r} is not part of this training (a verifier was given, or the recipe has no such "
                f"section); it consists of {', '.join(stages_of(workspace))}"
            )
        return STAGES[stage](workspace, device)


def default_device(name: str | None) -> torch.device:
    """Looks up the named device; without a name CUDA where there is one, else the CPU.

    Raises:
        ArgumentError: it is not there.
    """
    return usable_device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def stages_of(workspace: Workspace) -> list[str]:
    """The stages of a recipe, in order."""
    recipe = workspace.recipe
    left_out = {
        "tokenizer": workspace.brings_verifier,
        "verifier": workspace.brings_verifier,
        "distill": recipe.distill is None,
        "draft": recipe.draft is None,
    }
    return [stage for wave in WAVES for stage in wave if not left_out.get(stage)]


def train_all(job: Job, num_processes: int) -> list[Path]:
    """Runs every stage of the recipe; a stopped run is resumed.

    Args:
        job: what is trained.
        num_processes: stages that may run side by side; each gets its share of the cores.

    Returns:
        Directories of the results, in order of the stages.
    """
    workspace = job.workspace()
    job.torch_device()
    wanted = stages_of(workspace)
    results: list[Path] = []
    for wave in WAVES:
        stages_now = [stage for stage in wave if stage in wanted]
        with sharing_cores(max(1, min(len(stages_now), num_processes))) as pool:
            futures = {stage: pool.submit(job.run, stage) for stage in stages_now}
            try:
                _watch(workspace, futures)
            except BaseException:
                for process in multiprocessing.active_children():
                    process.terminate()  # its checkpoint holds what it has trained so far
                raise
            results.extend(future.result() for future in futures.values())
    return results


def _watch(workspace: Workspace, futures: dict[str, Future[Path]]) -> None:
    """Shows the progress of stages that run in other processes, from their logs."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    with Progress(*columns, TimeElapsedColumn(), console=Terminal(stderr=True)) as bar:
        tasks = {stage: bar.add_task(stage, total=_training(workspace.recipe, stage), loss="") for stage in futures}
        pending = set(futures.values())
        while pending:
            finished, pending = wait(pending, timeout=1, return_when=FIRST_EXCEPTION)
            for future in finished:
                future.result()  # a stage that failed ends the wave
            for stage, task in tasks.items():
                run = "context-distilled" if stage == "distill" else stage
                entries = list(read_log(workspace.directory / "runs" / run / "log.jsonl"))
                if entries:
                    bar.update(task, completed=entries[-1]["step"], loss=f"loss {entries[-1]['loss']:.3f}")


def _training(recipe: Recipe, stage: str) -> int | None:
    """Number of steps of a stage, None for the tokenizer."""
    runs: dict[str, TrainingConfig | None] = {
        "verifier": recipe.verifier.training if recipe.verifier else None,
        "context": recipe.context,
        "distill": recipe.distill.training if recipe.distill else None,
        "denoiser": recipe.denoiser.training,
        "draft": recipe.draft.training if recipe.draft else None,
    }
    training = runs.get(stage)
    return training.steps if training else None
