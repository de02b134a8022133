"""Memory: what weights, states and keys take on each device beside what it has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from twotower_spec.diagnosis.case import Case
from twotower_spec.diagnosis.finding import Finding
from twotower_spec.printable import byte_text
from twotower_spec.serving_memory import MemoryLine

# What vLLM takes of a GPU unless it is told otherwise; beyond it stand graphs and what other libraries take.
DEFAULT_UTILISATION = 0.9
# Lines by where they are; states of prefix caching stand beside those without it, of which a server has one.
OF_CONTEXT = ("context tower", "Mamba states", "keys and values", "last logits")
LEFT_OUT = ("Mamba states, align",)

note = partial(Finding, "memory")


def examine(case: Case) -> Iterator[Finding]:
    """Looks at every device, then at the states that drafts hold."""
    memory = case.memory
    if memory.unknown:
        yield note("verifier's cache", "warning", f"not counted: {memory.unknown}", "leave room for it by hand")
    missing, num_gpus = [], torch.cuda.device_count()
    for device, lines in _lines_by_device(case).items():
        if case.memory_gib is None and torch.device(device).type == "cuda" and torch.device(device).index >= num_gpus:
            missing.append(device)
        else:
            yield _device(case, device, lines)
    if missing:
        ranks = f"{case.tensor_parallel_size} ranks of the verifier"
        detail = f"{ranks} need {', '.join(missing)}, this machine has {num_gpus} GPUs"
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
    total = int(case.memory_gib * 2**30) if case.memory_gib else _memory_of(torch.device(device))
    unknown = [line.name for line in lines if line.num_bytes is None]
    # A server starts with room for one request; those for which there is none wait.
    growing = [line for line in lines if line.holder == "verifier" and line.per]
    all_requests = sum(line.total or 0 for line in lines)
    one_request = all_requests - sum(line.total or 0 for line in growing) * (case.max_num_seqs - 1) // case.max_num_seqs
    held = ", ".join(f"{line.holder}'s {line.name} {byte_text(line.total)}" for line in lines)
    detail = (
        f"{case.max_num_seqs} requests of {case.context_length} tokens take {byte_text(all_requests)} of "
        f"{byte_text(total)}, one {byte_text(one_request)} ({held}; graphs come on top)"
    )
    if one_request > total:
        remedy = (
            "give towers devices of their own, experts_dtype int4, int8 or float8_e4m3fn, or the verifier more ranks"
        )
        return note(device, "fault", f"a single request does not fit: {detail}", remedy)
    if all_requests > total:
        fitting = max(1, int(case.max_num_seqs * (total - one_request) / max(1, all_requests - one_request)))
        remedy = f"--max-num-seqs {fitting}, shorter contexts, or more memory"
        return note(device, "warning", f"not all requests fit at once, and some will wait: {detail}", remedy)
    if all_requests > total * DEFAULT_UTILISATION and torch.device(device).type == "cuda":
        remedy = f"--gpu-memory-utilization {min(0.98, all_requests / total + 0.02):.2f}"
        return note(device, "warning", f"more than vLLM takes of a GPU by itself: {detail}", remedy)
    if unknown:
        remedy = "put the index of the shards or the safetensors files there, or leave room for them"
        return note(device, "warning", f"{', '.join(unknown)} are not counted: {detail}", remedy)
    return note(device, "ok", detail)


def _memory_of(device: torch.device) -> int:
    """Bytes that a device has free: of a GPU by its driver, of the host by Linux, within the limit of a container."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else ""
    return min(pages, int(text)) if text.isdigit() else pages
