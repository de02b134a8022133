"""Calls as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """Captures a call on the current CUDA device as one graph, and gives what replays it.

    Raises:
        RuntimeError: it cannot be captured.
    """
    # The first call on a stream sets up workspaces, which must not happen inside the graph.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    replay: Callable[[], object] = graph.replay
    return replay
