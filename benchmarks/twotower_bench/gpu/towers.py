"""Passes of both towers beside the floor: `python3 -m twotower_bench.gpu.towers DEVICE FILE`.

What `bench towers` measures, in as many layers of the published geometry as the GPU has room for, and the time by
kernel of one step. On a CPU at small size, for a trial.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from twotower_bench.gpu.rows import RowFile
from twotower_bench.towers import (
    GEOMETRIES,
    DeviceClock,
    FilledPool,
    PassTimes,
    first_layers,
    layers_that_fit,
    made_in_place,
    measure,
    planned,
    profiled,
)

NUM_REQS, BLOCK_SIZES, NEW_TOKENS, NUM_CONTEXT_TOKENS = "1,4,8,32", (4, 8, 16), (1, 5, 17), 512
# Of a trial on a CPU.
FEW_LAYERS, FEW_TOKENS = 3, 16
NUM_KERNELS = 20


def line_of(one: PassTimes) -> str:
    """A pass in one line."""
    floor, graph = one.floor_s, "no graph" if one.graph_s is None else f"graph {1e3 * one.graph_s:.2f}"
    parts = ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in one.parts_s.items())
    reason = f" ({one.no_graph})" if one.no_graph else ""
    return (
        f"{one.shape}: floor {1e3 * floor:.2f} ms, eager {1e3 * one.eager_s:.2f} (host {1e3 * one.host_s:.2f}), "
        f"{graph}{reason}; {parts}; {one.num_visited_experts:.1f} experts visited"
    )


def main(device: str, file: str, requests: str = NUM_REQS) -> int:
    """Measures all passes, the largest step of one request first, and that by kernel."""
    place, rows, num_reqs = torch.device(device), RowFile(Path(file)), list(map(int, requests.split(",")))
    on_cuda = place.type == "cuda"
    if on_cuda:
        config, dtype, num_context_tokens = GEOMETRIES["published"], torch.bfloat16, NUM_CONTEXT_TOKENS
        num_layers = layers_that_fit(config, dtype, torch.cuda.mem_get_info(place)[0])
    else:
        config, dtype, num_context_tokens = GEOMETRIES["small"], torch.float32, FEW_TOKENS
        num_layers = FEW_LAYERS
    config = first_layers(config, num_layers)
    clock = DeviceClock.of(place)
    rows.add(
        f"{num_layers} of 52 layers, {dtype}, {num_context_tokens} tokens of context; a copy moves "
        f"{clock.bytes_per_s / 1e9:.0f} GB/s, read and written",
        kind="setting",
        device=device,
        config=config.to_dict(),
        dtype=str(dtype),
        num_context_tokens=num_context_tokens,
        copy_bytes_per_s=clock.bytes_per_s,
        torch=torch.__version__,
        commit=os.environ.get("COMMIT"),
    )
    model = made_in_place(config, dtype, place)
    pool = FilledPool(model, max(num_reqs), num_context_tokens, max(*BLOCK_SIZES, *NEW_TOKENS))
    for number, shape in enumerate(planned(num_reqs, BLOCK_SIZES, NEW_TOKENS)):
        one = pool.tower_pass(shape)
        times = measure(one, clock, config, num_context_tokens)
        rows.add(line_of(times), kind="pass", floor_s=times.floor_s, **asdict(times))
        if not number:
            with torch.inference_mode():
                kernels = profiled(one.call, place)[:NUM_KERNELS]
            for kernel in kernels:
                text = f"    {1e3 * kernel.seconds:8.3f} ms in {kernel.num_calls:4} calls of {kernel.name[:100]}"
                rows.add(text, kind="kernel", shape=asdict(shape), **asdict(kernel))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
