"""Memory: what weights, states and keys take on each device beside what it has."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from twotower_spec.diagnosis.case import Case
from twotower_spec.diagnosis.finding import Finding
from twotower_spec.printable import byte_text
from twotower_spec.serving_memory import MemoryLine

# What vLLM takes of a GPU unless it is told otherwise, as a share of all its memory; beyond it stand graphs and what
# other libraries take.
DEFAULT_UTILISATION = 0.92
MOST_UTILISATION = 0.98
# Lines by where they are; states of prefix caching stand beside those without it, of which a server has one.
OF_CONTEXT = ("context tower", "Mamba states", "keys and values", "last logits")
LEFT_OUT = ("Mamba states, align",)

MOST_NAMED = 4

note = partial(Finding, "memory")


class DeviceMemory(NamedTuple):
    """Bytes of a device: those a server can have, and all; the same of a host, whose other processes come and go."""

    free: int
    total: int


class CacheSize(NamedTuple):
    """Bytes on the first device of the verifier: a token's in its cache, and all but such tokens, with one request."""

    per_token: int
    fixed: int


def examine(case: Case) -> Iterator[Finding]:
    """Looks at every device, then at the states that drafts hold."""
    memory = case.memory
    if memory.unknown:
        yield note("verifier's cache", "warning", f"not counted: {memory.unknown}", "leave room for it by hand")
    missing, num_gpus = [], torch.cuda.device_count()
    for device, lines in _lines_by_device(case).items():
        kind, _, number = device.partition(":")  # torch's number of a device has eight bits
        if case.memory_gib is None and kind == "cuda" and int(number) >= num_gpus:
            missing.append(device)
        else:
            yield _device(case, device, lines)
    if missing:
        ranks = f"{case.tensor_parallel_size} ranks of the verifier"
        named = ", ".join(missing) if len(missing) <= MOST_NAMED else f"{missing[0]} to {missing[-1]}"
        detail = f"{ranks} need {named}, this machine has {num_gpus} GPUs"
        yield note("ranks", "fault", detail, "fewer --tensor-parallel-size, or --memory-gib for another machine's GPUs")
    state, (fewest, most) = memory.state_bytes, memory.num_drafts
    num_drafts = memory.num_speculative_tokens
    if not state:
        yield note("Mamba states per draft", "ok", "the verifier keeps none: drafts cost no memory of theirs")
        return
    detail = (
        f"each of {num_drafts} drafts of a request holds a state of {byte_text(state)} beside the request's own, "
        f"{byte_text((1 + num_drafts) * state)} altogether (two more with prefix caching)"
    )
    yield note("Mamba states per draft", "warning", detail, f"--spec-tokens {fewest} to {most}").unless(
        num_drafts <= most
    )


def _lines_by_device(case: Case) -> dict[str, list[MemoryLine]]:
    verifier, context, denoiser = case.devices
    first, found = torch.device(verifier), dict[str, list[MemoryLine]]()
    ranks = [
        f"cuda:{first.index + rank}" if first.type == "cuda" else verifier for rank in range(case.tensor_parallel_size)
    ]
    for line in case.memory.lines:
        if line.holder == "verifier":
            places = ranks if line.name not in LEFT_OUT else []
        elif line.name in OF_CONTEXT:
            places = [context]
        elif line.name == "scratch":
            places = [context] if torch.device(context).type == "cuda" else []
        elif line.name == "mirror":
            places = [denoiser] if context != denoiser else []
        elif line.name == "copied keys":
            places = [denoiser] if torch.device(denoiser).type == "cpu" and context == denoiser else []
        else:
            places = [denoiser]
        for place in places:
            found.setdefault(place, []).append(line)
    return found


def _device(case: Case, device: str, lines: list[MemoryLine]) -> Finding:
    room, total = memory_here(case, device)
    unknown = [line.name for line in lines if line.num_bytes is None]
    # A server starts with room for one request; those for which there is none wait.
    growing = [line for line in lines if line.holder == "verifier" and line.per]
    all_requests = sum(line.total or 0 for line in lines)
    one_request = all_requests - sum(line.total or 0 for line in growing) * (case.max_num_seqs - 1) // case.max_num_seqs
    parts = Counter(f"{line.holder}'s {line.name} {byte_text(line.total)}" for line in lines)
    held = ", ".join(f"{count} x {part}" if count > 1 else part for part, count in parts.items())
    detail = (
        f"{case.max_num_seqs} requests of {case.context_length} tokens take {byte_text(all_requests)} of "
        f"{byte_text(room)}, one {byte_text(one_request)} ({held}; graphs come on top)"
    )
    if one_request > room:
        remedy = (
            "give towers devices of their own, experts_dtype int4, int8 or float8_e4m3fn, or the verifier more ranks"
        )
        return note(device, "fault", f"a single request does not fit: {detail}", remedy)
    if all_requests > room:
        fitting = max(1, int(case.max_num_seqs * (room - one_request) / max(1, all_requests - one_request)))
        remedy = f"--max-num-seqs {fitting}, shorter contexts, or more memory"
        return note(device, "warning", f"not all requests fit at once, and some will wait: {detail}", remedy)
    if all_requests > total * DEFAULT_UTILISATION and torch.device(device).type == "cuda":
        most = min(MOST_UTILISATION, int(100 * room / total) / 100)  # with more than is free vLLM does not start
        remedy = f"--gpu-memory-utilization {min(most, all_requests / total + 0.02):.2f}"
        return note(device, "warning", f"more than vLLM takes of a GPU by itself: {detail}", remedy)
    if unknown:
        remedy = "put the index of the shards or the safetensors files there, or leave room for them"
        return note(device, "warning", f"{', '.join(unknown)} are not counted: {detail}", remedy)
    return note(device, "ok", detail)


def memory_here(case: Case, device: str) -> DeviceMemory:
    """Looks up the memory of a device: what the user says it has, or else what it has."""
    if case.memory_gib is None:
        return _memory_of(torch.device(device))
    given = int(case.memory_gib * 2**30)
    return DeviceMemory(given, given)


def cache_size(case: Case) -> CacheSize:
    """Counts what a request of any length takes on the first device of the verifier.

    Raises:
        TwoTowerError: a config.json cannot be read.
    """
    per_token, fixed = 0, 0
    for line in dict.fromkeys(_lines_by_device(case)[case.devices[0]]):  # of several ranks on a CPU one
        if line.holder == "verifier" and line.per == "token":
            per_token += line.num_bytes or 0
        else:
            fixed += (line.num_bytes if line.holder == "verifier" else line.total) or 0
    return CacheSize(per_token, fixed)


def _memory_of(device: torch.device) -> DeviceMemory:
    """Bytes that a device has: of a GPU by its driver, of the host by Linux, within the limit of a container."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        # What this process holds itself is free again when a server starts.
        return DeviceMemory(int(free) + torch.cuda.memory_reserved(device), int(total))
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else ""
    total = min(pages, int(text)) if text.isdigit() else pages
    return DeviceMemory(total, total)
