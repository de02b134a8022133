"""Links between devices: whether they reach each other's memory, and how fast."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from itertools import permutations

import torch

from twotower_spec.diagnosis.case import Case
from twotower_spec.diagnosis.finding import Finding
from twotower_spec.printable import byte_text

COPIED = 64 << 20
# Slower than any PCIe that such devices have: something stands between them.
SLOW = 8e9

note = partial(Finding, "links")


def examine(case: Case) -> Iterator[Finding]:
    """Looks at every pair of CUDA devices that the models are on."""
    devices = sorted({device for device in case.devices if torch.device(device).type == "cuda"})
    if len(devices) < 2:
        yield note("devices", "ok", f"{' and '.join(sorted(set(case.devices)))}: nothing crosses between CUDA devices")
        return
    for first, second in permutations(devices, 2):
        peers = torch.cuda.can_device_access_peer(torch.device(first), torch.device(second))
        speed = _bytes_per_s(first, second)
        how = "directly" if peers else "by way of the host"
        detail = f"{byte_text(COPIED)} cross {how}, {speed / 1e9:.0f} GB/s: the way of a round's states"
        remedy = "put both towers on one device, or choose devices that are linked: nvidia-smi topo -m shows which"
        yield note(f"{first} to {second}", "warning", detail, remedy).unless(peers and speed >= SLOW)


def _bytes_per_s(first: str, second: str) -> float:
    """Speed of the second of two copies: the first one makes the connection."""
    source = torch.zeros(COPIED, dtype=torch.uint8, device=first)
    target = torch.empty(COPIED, dtype=torch.uint8, device=second)
    seconds = 0.0
    for _ in range(2):
        torch.cuda.synchronize(first)
        torch.cuda.synchronize(second)
        started = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize(second)
        seconds = time.perf_counter() - started
    return COPIED / max(seconds, 1e-9)
