"""`twotower-spec bench towers`: passes of both towers at the published geometry, or a small one, without files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer

from twotower_bench.cli import options
from twotower_bench.cli.options import numbers
from twotower_bench.cli.tables import print_table
from twotower_bench.measurement_file import COMPARED, MeasurementFile
from twotower_bench.towers import (
    GEOMETRIES,
    DeviceClock,
    FilledPool,
    PassShape,
    PassTimes,
    first_layers,
    made_in_place,
    measure,
    planned,
    profiled,
)
from twotower_bench.towers.measuring import PARTS, REST
from twotower_spec.config import TwoTowerConfig, check_integer
from twotower_spec.errors import ArgumentError
from twotower_spec.files import check_writable, write_atomically
from twotower_spec.machine import commit, describe_machine, machine_info
from twotower_spec.model import as_dtype
from twotower_spec.terminal import Terminal
from twotower_spec.towers.model import usable_device

# Requests of a pass, and tokens of each.
MOST = 1024
# By type of device: geometry, layers, tokens of context, dtype.
DEFAULTS = {"cuda": ("published", 52, 512, "bfloat16"), "cpu": ("small", 7, 64, "float32")}
COLUMNS = ("pass", "floor", "eager", "host", "graph", "eager/floor", "graph/floor", *PARTS.values(), REST, "visited")
NOTE = (
    "Milliseconds, medians. floor: weights of visited experts and of all else, keys and states over the speed of a "
    "copy. host: how long it is busy with an eager pass. By kind of layer: the device's time in an eager pass, norms "
    "and residuals included; what is left is head and embeddings. visited: experts, mean over layers."
)


def towers(
    size: Annotated[str | None, typer.Option(help="Geometry: published or small; default: small on a CPU.")] = None,
    layers: Annotated[
        int | None, typer.Option(help="The first so many layers of its pattern; default: 52, on a CPU 7.")
    ] = None,
    requests: Annotated[str, typer.Option(help="Requests of a pass, with commas.")] = "1,4,8,32",
    block_size: options.BlockSizes = "4,8,16",
    new_tokens: Annotated[str, typer.Option(help="Tokens of an extension per request, with commas.")] = "1,5,17",
    context_tokens: Annotated[
        int | None, typer.Option(help="Tokens of context per request; default: 512, on a CPU 64.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16, float64; default: bfloat16, on a CPU float32.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Of both towers; default: cuda:0 where there is one.")] = None,
    profile: Annotated[
        Path | None,
        typer.Option(help="File for the time by kernel of a step of one request and 16 positions, as JSON."),
    ] = None,
    json_file: options.JsonFile = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Time of a denoising step and of a context extension, by part, beside the time of the bytes they read.

    Both towers are made in place with random weights, so that no checkpoint is needed.
    """
    # Everything that can be refused is checked before weights are made.
    place = usable_device(device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    if place.type not in DEFAULTS:
        raise ArgumentError(f"--device {device} computes nothing; give cpu, cuda or cuda:N")
    own_size, own_layers, own_context, own_dtype = DEFAULTS[place.type]
    name = size or own_size
    if name not in GEOMETRIES:
        raise ArgumentError(f"--size {name!r} is not there; give one of {', '.join(GEOMETRIES)}")
    config = first_layers(GEOMETRIES[name], own_layers if layers is None else layers)
    num_context_tokens = own_context if context_tokens is None else context_tokens
    check_integer("--context-tokens", num_context_tokens, minimum=1, maximum=config.max_position_embeddings)
    shapes = planned(
        _positive("--requests", requests), _positive("-S", block_size), _positive("--new-tokens", new_tokens)
    )
    weights = as_dtype(dtype or own_dtype)
    assert weights is not None
    if profile is not None:
        check_writable(profile)
    machine = machine_info()
    where = {name: machine[name] for name in COMPARED}
    content = [config.to_dict(), str(weights), str(place), num_context_tokens, where]
    file = MeasurementFile[PassTimes](content, {"pass_times": PassTimes}, lambda one: one.shape, ["triton"])
    console = Terminal()
    with file.opened(json_file, overwrite):
        missing = [shape for shape in shapes if shape not in file.found]
        if missing or profile:
            try:
                measure_all(console, file, missing, profile, config, weights, place, num_context_tokens)
            except torch.OutOfMemoryError as error:
                raise ArgumentError(
                    f"passes of --requests {requests} with {num_context_tokens} tokens of context do not fit into the "
                    f"memory of {place} beside {config.num_hidden_layers} layers; give fewer of one of them"
                ) from error
    print_passes(console, [file.found[shape] for shape in shapes])
    described = f"{name} geometry, {config.num_hidden_layers} layers, {str(weights).removeprefix('torch.')}"
    console.print(NOTE, style="dim", soft_wrap=True)
    console.print(
        f"{described}, {num_context_tokens} tokens of context; {describe_machine()}, commit {commit() or 'unknown'}",
        soft_wrap=True,
    )


def measure_all(
    console: Terminal,
    file: MeasurementFile[PassTimes],
    shapes: Sequence[PassShape],
    profile: Path | None,
    config: TwoTowerConfig,
    dtype: torch.dtype,
    device: torch.device,
    num_context_tokens: int,
) -> None:
    """Measures passes, each of which is in the file when the next one begins."""
    with console.status("making both towers") as status:
        model = made_in_place(config, dtype, device)
        clock = DeviceClock.of(device)
        largest = max((shape.num_reqs for shape in shapes), default=1)
        longest = max((shape.num_tokens for shape in shapes), default=1)
        pool = FilledPool(model, largest, num_context_tokens, max(longest, 16))
        for shape in shapes:
            status.update(str(shape))
            file.keep(measure(pool.tower_pass(shape), clock, config, num_context_tokens))
        if profile is not None:
            step = pool.tower_pass(PassShape("step", 1, 16))
            with torch.inference_mode():
                times = profiled(step.call, device)
            write_atomically(profile, json.dumps([asdict(one) for one in times], indent=1) + "\n")


def print_passes(console: Terminal, passes: Sequence[PassTimes]) -> None:
    """Prints passes, those of equally many requests together."""
    groups: dict[str, list[dict[str, str]]] = {}
    for one in passes:
        count = one.shape.num_reqs
        groups.setdefault(f"{count} request{'' if count == 1 else 's'}", []).append(_row(one))
    used = [name for name in COLUMNS if any(name in row for rows in groups.values() for row in rows)]
    print_table(console, used, groups)
    speed = passes[0].copy_bytes_per_s
    console.print(
        f"\nA copy inside the device's memory moves {speed / 1e9:.0f} GB/s, read and written.", soft_wrap=True
    )
    for reason in dict.fromkeys(one.no_graph for one in passes if one.no_graph):
        console.print(f"No graph: {reason}.", soft_wrap=True)


def _row(one: PassTimes) -> dict[str, str]:
    floor = one.floor_s
    unit = "positions" if one.shape.kind == "step" else "tokens"
    row = {
        "pass": f"{one.shape.kind}, {one.shape.num_tokens} {unit}",
        "floor": _ms(floor),
        "eager": _ms(one.eager_s),
        "host": _ms(one.host_s),
        "graph": "-" if one.graph_s is None else _ms(one.graph_s),
        "eager/floor": f"{one.eager_s / floor:.2f}",
        "graph/floor": "-" if one.graph_s is None else f"{one.graph_s / floor:.2f}",
        "visited": f"{one.num_visited_experts:.1f}",
    }
    return row | {name: _ms(seconds) for name, seconds in one.parts_s.items()}


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def _positive(option: str, text: str) -> list[int]:
    found = numbers(option, text, int)
    for number in found:
        check_integer(option, number, minimum=1, maximum=MOST)
    return found
