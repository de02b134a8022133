"""Reads tensors straight into the modules' own memory; reports everything that does not fit, together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor

from twotower_kernels.experts import float_shape
from twotower_spec.checkpoint.index import CheckpointIndex, StoredTensor
from twotower_spec.checkpoint.quantised import is_quantised, store, weight_of_scale
from twotower_spec.checkpoint.shards import read_tensors
from twotower_spec.config import EXPERT_DTYPES
from twotower_spec.errors import CheckpointError
from twotower_spec.terminal import Terminal

# Where looking for tensors that disagree ends.
MOST_PROBLEMS = 1000


def compare_with_index(
    index: CheckpointIndex, expected: Iterable[tuple[str, Tensor]], ignored: Iterable[str] = ()
) -> list[str]:
    """Lists what is missing, misshaped or unexpected, a line per tensor, and the index's own problems.

    Args:
        index: the checkpoint.
        expected: published names and destinations, or meta tensors; read until `MOST_PROBLEMS` are found, so that a
            configuration of a million experts is refused as fast as any.
        ignored: names that may be present without a destination.
    """
    problems, known = list(index.problems), set(ignored)
    for name, tensor in expected:
        if _is_made_while_reading(name, index):
            continue
        known.add(name)
        if name in index:
            problems += _disagreements(name, index[name], tensor)
        else:
            problems.append(f"missing: {name} {list(float_shape(tensor))}")
        if len(problems) >= MOST_PROBLEMS:
            return problems
    return problems + [
        f"unexpected: {name} {list(stored.shape)}" for name, stored in index.items() if name not in known
    ]


def check_fit(index: CheckpointIndex, expected: Iterable[tuple[str, Tensor]], ignored: Iterable[str] = ()) -> None:
    """Refuses a checkpoint whose tensors are not those that config.json makes.

    Args:
        index, expected, ignored: as in `compare_with_index`.

    Raises:
        CheckpointError: names or shapes do not agree; many of them are named.
    """
    problems = compare_with_index(index, expected, ignored)
    if problems:
        count = f"{len(problems)} tensors" if len(problems) < MOST_PROBLEMS else f"{MOST_PROBLEMS} tensors or more"
        raise CheckpointError(
            f"{index.directory} does not fit its config.json, {count} disagree; use the config.json "
            f"the weights were made with:\n  " + "\n  ".join(problems)
        )


def load_tensors(
    index: CheckpointIndex, destinations: Mapping[str, Tensor], ignored: Iterable[str] = (), progress: bool = False
) -> None:
    """Copies every tensor into its destination, converting dtype and device on the way; experts may be quantised.

    Args:
        index: the checkpoint.
        destinations: published name to the tensor (any strides, any device) that receives it.
        ignored: names in the checkpoint that are not wanted.
        progress: show a bar on stderr.

    Raises:
        CheckpointError: the names or shapes do not agree, or a shard cannot be read.
    """
    check_fit(index, destinations.items(), ignored)
    wanted = {name: index[name] for name in destinations if name in index}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not progress, transient=True, console=Terminal(stderr=True)) as bar:
        task = bar.add_task("reading weights", total=sum(stored.nbytes for stored in wanted.values()))
        devices = {name: destinations[name].device for name in wanted}
        # Closed, whatever happens: nothing is read ahead of a load that failed.
        with closing(read_tensors(wanted, devices)) as tensors:
            for piece, values in tensors:
                store(destinations, piece.name, values, piece.rows)
                bar.advance(task, piece.stored.nbytes)


def stored_dtypes(index: CheckpointIndex, loaded: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    """Dtype on disk of each tensor that can be had again from the loaded one: all but quantised ones."""
    return {
        name: index[name].dtype for name, tensor in loaded.items() if name in index and not is_quantised(tensor.dtype)
    }


def _disagreements(name: str, stored: StoredTensor, tensor: Tensor) -> Iterator[str]:
    """Yields what keeps a stored tensor from being read into `tensor`; floats are quantised on the way."""
    are_floats = not is_quantised(stored.dtype)
    shape = float_shape(tensor) if are_floats else tuple(tensor.shape)
    if not are_floats and stored.dtype != tensor.dtype:
        held = next(held for held, dtype in EXPERT_DTYPES.items() if dtype == stored.dtype)
        yield f"quantised: {name} is {held}, which experts_dtype of config.json is not"
    elif stored.shape != shape:
        yield f"misshaped: {name} is {list(stored.shape)}, config.json makes it {list(shape)}"


def _is_made_while_reading(name: str, index: CheckpointIndex) -> bool:
    """Whether a tensor is the scales of a weight that is stored in floats."""
    weight = index.get(weight_of_scale(name) or "")
    return weight is not None and not is_quantised(weight.dtype)
