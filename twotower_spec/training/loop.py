"""Training loop: a fixed number of steps, a log, and checkpoints from which it resumes bit for bit."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from twotower_spec.errors import ArgumentError, FileError, TrainingError, first_line
from twotower_spec.files import write_atomically
from twotower_spec.machine import commit, describe_machine
from twotower_spec.reading import read_json_lines
from twotower_spec.terminal import Terminal
from twotower_spec.training.optimiser import Optimiser
from twotower_spec.training.recipe import TrainingConfig
from twotower_spec.training.streams import Mixture

LOG_EVERY = 10
DESCRIPTION = "run.json"


@dataclass(frozen=True)
class StepLoss:
    """Loss of one step, with details for the log.

    Attributes:
        loss: scalar, differentiated.
        details: scalars by name.
    """

    loss: Tensor
    details: dict[str, Tensor]


Loss = Callable[[Tensor, int], StepLoss]


class TrainingRun:
    """One model's training in a directory of its own.

    Args:
        name: shown and logged.
        directory: for log, checkpoint and loss curve.
        config: schedule.
        fingerprint: identifies the run; a checkpoint with another one is not resumed.
    """

    def __init__(self, name: str, directory: Path, config: TrainingConfig, fingerprint: str) -> None:
        self.name, self.directory, self.config, self.fingerprint = name, directory, config, fingerprint
        self.log_file = directory / "log.jsonl"
        self.checkpoint_file = directory / "checkpoint.safetensors"

    def train(
        self,
        loss: Loss,
        optimiser: Optimiser,
        data: Mixture,
        device: torch.device,
        after_step: Callable[[], None] | None = None,
    ) -> None:
        """Trains from the last checkpoint, or from the start, to the last step.

        Args:
            loss: of a batch [batch_size, sequence_length + 1] at a step.
            optimiser: over the weights.
            data: batches by step.
            device: of the model.
            after_step: called after every update.

        Raises:
            TrainingError: the loss is no longer finite, or a checkpoint cannot be written.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        start = self._resume(optimiser)
        if start < self.config.steps:
            self._steps(start, loss, optimiser, data, device, after_step)
        draw_loss_curve(self.log_file, self.directory / "loss.png", self.name)

    def describe(self, sources: Mapping[str, float], seed: int, texts: Sequence[str]) -> None:
        """Notes the run's inputs, machine and code for the model card.

        Args:
            sources: weight of every text source.
            seed: the recipe's.
            texts: names of the user's own files.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        facts = {"training": asdict(self.config), "sources": dict(sources), "seed": seed, "texts": list(texts)}
        facts |= {"machine": describe_machine(), "commit": commit(), "python": platform.python_version()}
        if not self.log_file.is_file():  # the machine that began the run
            write_atomically(self.directory / DESCRIPTION, json.dumps(facts, indent=1) + "\n", option="description")

    def _steps(
        self,
        start: int,
        loss: Loss,
        optimiser: Optimiser,
        data: Mixture,
        device: torch.device,
        after_step: Callable[[], None] | None,
    ) -> None:
        tokens_per_step = self.config.batch_size * self.config.sequence_length
        with _progress() as bar, self.log_file.open("a", encoding="utf-8") as log:
            task = bar.add_task(self.name, total=self.config.steps, completed=start, loss="")
            began, pending = time.perf_counter(), []
            for step in range(start, self.config.steps):
                with torch.autocast(device.type, torch.bfloat16):
                    result = loss(data.batch(step).to(device), step)
                if not bool(torch.isfinite(result.loss)):
                    raise TrainingError(
                        f"the loss of {self.name} is {float(result.loss)} at step {step + 1}; the checkpoint before it "
                        f"is in {self.directory}; lower muon_lr and adam_lr in the recipe"
                    )
                result.loss.backward()
                norm = optimiser.step(step)
                if after_step:
                    after_step()
                pending.append(
                    {"loss": float(result.loss.detach()), **{k: float(v) for k, v in result.details.items()}}
                )
                done = step + 1
                if done % LOG_EVERY == 0 or done == self.config.steps:
                    elapsed = time.perf_counter() - began
                    record = _means(pending)
                    speed = len(pending) * tokens_per_step / elapsed
                    entry = {"step": done, "tokens": done * tokens_per_step, **record, "gradient_norm": norm}
                    entry |= {"learning_rate_scale": optimiser.scale(step), "tokens_per_s": speed, "seconds": elapsed}
                    log.write(json.dumps({name: _rounded(value) for name, value in entry.items()}) + "\n")
                    log.flush()
                    bar.update(task, completed=done, loss=f"loss {record['loss']:.3f}  {speed:,.0f} tokens/s")
                    began, pending = time.perf_counter(), []
                if done % self.config.checkpoint_every == 0 or done == self.config.steps:
                    self._save(optimiser, done)

    def _save(self, optimiser: Optimiser, step: int) -> None:
        tensors = {f"weights.{name}": leaf.detach().contiguous() for name, leaf in optimiser.leaves.items()}
        tensors |= {name: value.contiguous() for name, value in optimiser.state_tensors().items()}
        partial = self.checkpoint_file.with_suffix(".partial")
        try:
            save_file(tensors, partial, {"step": str(step), "fingerprint": self.fingerprint})
            partial.replace(self.checkpoint_file)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise TrainingError(
                f"the checkpoint of {self.name} at step {step} cannot be written in {self.directory} "
                f"({first_line(error)}); free space and start again, the run goes on from the one before"
            ) from error

    def _resume(self, optimiser: Optimiser) -> int:
        """Restores the last checkpoint; returns the step it was made after."""
        if not self.checkpoint_file.is_file():
            self.log_file.unlink(missing_ok=True)
            return 0
        with safe_open(self.checkpoint_file, "pt") as stored:
            metadata = stored.metadata()
            if metadata["fingerprint"] != self.fingerprint:
                raise ArgumentError(
                    f"the checkpoint in {self.directory} was made with another recipe or other data; give another "
                    f"--output, or remove it to train anew"
                )
            weights: dict[str, Tensor] = {}
            state: dict[str, Tensor] = {}
            for name in stored.keys():  # noqa: SIM118 - not a dict
                place = weights if name.startswith("weights.") else state
                place[name.removeprefix("weights.")] = stored.get_tensor(name)
        with torch.no_grad():
            for name, leaf in optimiser.leaves.items():
                leaf.copy_(weights[name])
        optimiser.load_state_tensors(state)
        step = int(metadata["step"])
        entries = [entry for entry in read_log(self.log_file) if entry["step"] <= step]
        write_atomically(self.log_file, "".join(json.dumps(entry) + "\n" for entry in entries), option="log")
        return step


def draw_loss_curve(log_file: Path, image: Path, title: str) -> None:
    """Draws the losses of a log over tokens, as a PNG."""
    from matplotlib.figure import Figure  # only the extra "train" brings it

    entries = list(read_log(log_file))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name in [name for name in entries[0] if "loss" in name]:
        axes.plot([e["tokens"] / 1e6 for e in entries], [e[name] for e in entries], label=name.replace("_", " "))
    axes.set(title=title, xlabel="tokens (millions)", ylabel="nats per token", yscale="log")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(image, dpi=110)


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """Reads the entries of a log, up to a line that a kill cut short; the steps after it are trained again."""
    if path.is_file():
        try:
            yield from (row for _, row in read_json_lines(path))
        except FileError:
            return


def _means(records: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(record[name] for record in records) / len(records) for name in records[0]}


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.6g}")


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    # Workers of `train_all` print nothing: the terminal is their parent's.
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, *times, console=Terminal(stderr=True), disable=parent_process() is not None)
