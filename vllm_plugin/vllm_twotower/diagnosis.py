"""Check of vLLM for `twotower-spec doctor`: what it would make of two models, asked in a process of its own.

vLLM's own `EngineArgs.create_engine_config` is asked, which refuses what a server refuses before it loads anything.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from twotower_spec.diagnosis import Case, Finding, Verdict
from twotower_spec.diagnosis.case import holds_two_towers
from twotower_spec.diagnosis.finding import refusal
from twotower_spec.diagnosis.memory import CacheSize, DeviceMemory, cache_size, memory_here
from twotower_spec.errors import TwoTowerError, first_line
from twotower_spec.printable import byte_text, shortened
from vllm_twotower import compat, hook_table
from vllm_twotower.config import FOUND, KNOBS
from vllm_twotower.hook_table import Kind, Stage, hooks_of
from vllm_twotower.requirements import reason_for_v1
from vllm_twotower.runner import Wish, drafts_on_v2

AREA = "vllm"
PLUGIN, PLUGINS = "twotower", "VLLM_PLUGINS"
TIMEOUT_S = 600
INSTALL = "pip install 'twotower-spec[gpu]', or without a GPU 'twotower-spec[cpu]'"
REPAIR_CPU = "python -m vllm_twotower.cpu_install"

NOT_KNOWN = CacheSize(0, 0)

note = partial(Finding, AREA)


@dataclass(frozen=True)
class Asked:
    """Questions about a server beside the arguments of its engine, which vLLM is not told.

    Attributes:
        context_length: tokens per request.
        memory_bytes: of every device, as the user says; None for this machine's.
        gpus: of this machine, that the verifier's ranks would be on.
        cache: of the verifier; zeros where it is not known.
    """

    context_length: int = Case.context_length
    memory_bytes: int | None = None
    gpus: tuple[DeviceMemory, ...] = ()
    cache: CacheSize = NOT_KNOWN

    @classmethod
    def of_case(cls, case: Case) -> Asked:
        """Takes it from a case, and counts the GPUs' memory here, where a process more does not take any of it."""
        try:
            cache = cache_size(case)
        # Files that are not as expected are findings of other areas.
        except Exception:
            cache = NOT_KNOWN
        if case.memory_gib is not None:
            return cls(case.context_length, memory_here(case, "cpu").total, (), cache)
        first = torch.device(case.devices[0])
        numbers = range(first.index, first.index + case.tensor_parallel_size) if first.type == "cuda" else range(0)
        gpus = [memory_here(case, f"cuda:{number}") for number in numbers if number < torch.cuda.device_count()]
        return cls(case.context_length, None, tuple(gpus), cache)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Asked:
        """Reads it as it comes from JSON."""
        gpus = tuple(DeviceMemory(*gpu) for gpu in content["gpus"])
        return cls(**{**content, "gpus": gpus, "cache": CacheSize(*content["cache"])})


@dataclass(frozen=True)
class KnownFault:
    """Fault of some versions of vLLM that no plugin can mend, whatever drafts.

    Attributes:
        first, end: the oldest version that has it, and the oldest one after it that has not.
        detail: what happens.
        cpu_only: whether it happens on a CPU only.
    """

    first: tuple[int, int]
    end: tuple[int, int]
    detail: str
    cpu_only: bool = False


KNOWN_FAULTS = (
    KnownFault((0, 30), (0, 31), "its own rejection sampler, which takes over from ours after a fault, ends it", True),
    KnownFault((0, 0), (0, 31), "a request may get the allowed_token_ids of another one"),
    KnownFault((0, 0), (0, 32), "token ids behind a stop string stay in an answer, and min_tokens ends at a step"),
    KnownFault((0, 0), (0, 32), "verifiers with Mamba layers do not run", True),
)


def examine(case: Case) -> Iterator[Finding]:
    """Looks at vLLM, in another process: to import it changes the one that it is in."""
    if find_spec("vllm") is None:
        verdict: Verdict = "skipped" if case.is_bundled or case.verifier is None else "fault"
        yield note("installed", verdict, "vLLM is not installed", INSTALL)
        return
    yield from _metadata()
    if PLUGIN not in os.environ.get(PLUGINS, PLUGIN).split(","):
        detail = f"{PLUGINS}={os.environ[PLUGINS]} switches the plugin off: --speculative-model is no argument then"
        yield note("plugin", "fault", detail, f"unset {PLUGINS}, or add {PLUGIN} to it")
        return
    with TemporaryDirectory() as folder:
        output = Path(folder, "findings.json")
        command = [sys.executable, "-m", __name__, json.dumps(_order(case)), str(output)]
        command.append(json.dumps(asdict(Asked.of_case(case))) if case.is_pair else "")
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            yield note("start", "fault", f"vLLM did not read its settings in {TIMEOUT_S} s", "try `vllm serve` by hand")
            return
        if not output.is_file():
            last = (done.stderr.strip() or "it said nothing").splitlines()[-1]
            yield note(
                "start", "fault", f"its process ended with {done.returncode}: {last}", "see `python -c 'import vllm'`"
            )
            return
        yield from (Finding(**one) for one in json.loads(output.read_text()))


def _metadata() -> Iterator[Finding]:
    """Looks for what `vllm serve` asks for: the version of a distribution called vllm."""
    try:
        version("vllm")
    except PackageNotFoundError:
        detail = "no distribution is called vllm: `vllm serve` does not start, and the CPU is not recognised"
        yield note("metadata", "fault", detail, REPAIR_CPU)


def _order(case: Case) -> dict[str, Any]:
    """Arguments of an engine, None where nothing is to be served; as JSON."""
    if not case.is_pair:
        return {}
    knobs = {
        "context_device": case.context_device,
        "denoiser_device": case.denoiser_device,
        "experts_dtype": case.experts_dtype,
    }
    speculative = {
        "model": case.drafter,
        "revision": case.revision,
        "num_speculative_tokens": case.num_speculative_tokens,
        KNOBS: {name: knob for name, knob in knobs.items() if knob is not None},
    }
    return {
        "model": case.verifier,
        "tensor_parallel_size": case.tensor_parallel_size,
        "max_num_seqs": case.max_num_seqs,
        "speculative_config": {name: value for name, value in speculative.items() if value},
    }


def write_findings(order: str, output: str, asked: str = "") -> None:
    """Writes what is found in this process.

    Args:
        order: arguments of an engine, as JSON; an empty object for vLLM alone.
        output: file for the findings, as JSON.
        asked: an `Asked`, as JSON; "" for one of defaults.
    """
    about = Asked.from_dict(json.loads(asked)) if asked else Asked()
    findings = [asdict(finding) for finding in look(json.loads(order), about)]
    Path(output).write_text(json.dumps(findings))


def look(arguments: dict[str, Any], asked: Asked = Asked()) -> Iterator[Finding]:
    """Imports vLLM and has it read the settings of a server; changes this process.

    Args:
        arguments: of an engine; empty for vLLM alone.
        asked: what is looked at beside them.
    """
    try:
        import vllm
        from vllm.platforms import current_platform
    # Anything may be raised there, by torch, the platform or other plugins.
    except Exception as error:
        others = any(name in str(error) for name in ("torchvision", "torchaudio", "torchcodec", "load this library"))
        remedy = REPAIR_CPU if others else f"reinstall it: {INSTALL}"
        yield note("import", "fault", f"{type(error).__name__}: {first_line(error)}", remedy)
        return
    on_cpu = current_platform.is_cpu()
    yield from of_version(vllm.__version__, on_cpu)
    yield from _hooks(["routing"], on_cpu)
    if not arguments:
        yield note("server", "skipped", "two models are needed for it", "--verifier V --drafter T")
        return
    said = _Said()
    try:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.usage.usage_lib import UsageContext

        engine_args = EngineArgs(**arguments)
        logging.getLogger("vllm.twotower").addHandler(said)  # only now: vLLM has set up its log
        config = engine_args.create_engine_config(UsageContext.OPENAI_API_SERVER)  # as `vllm serve` does
    except TwoTowerError as error:
        yield refusal(AREA, "settings", error)
        return
    except Exception as error:
        yield note(
            "settings", "fault", _reason(error), "mend what vLLM says there; it says so before it loads anything"
        )
        return
    try:
        yield from _server(config, on_cpu, asked)
    # vLLM's configuration has other parts with every version.
    except Exception as error:
        detail = f"its settings cannot be read ({type(error).__name__}: {first_line(error)})"
        yield note("server", "fault", detail, "report it, with the config.json of both models")
    for record in said.records:
        yield note("log", "warning", record.getMessage(), "docs/vllm.md says more of it")


def of_version(installed: str, on_cpu: bool) -> Iterator[Finding]:
    """Looks a version up: whether it was run, and what is wrong with it.

    Args:
        installed: vLLM's version, as it states it.
        on_cpu: whether it runs on a CPU.
    """
    oldest, newest = compat.CHECKED_VERSIONS[0], compat.CHECKED_VERSIONS[-1]
    supported, remedy = f"versions {oldest} to {newest} are supported", f"pip install 'vllm>={oldest},<={newest}'"
    numbers = _numbers(installed)
    if numbers is None:
        yield note("version", "warning", f"{installed} names no release; {supported}", remedy)
        return
    if numbers < (_numbers(oldest) or ()):
        yield note("version", "fault", f"vLLM {installed} requires another torch; {supported}", remedy)
    elif numbers > (_numbers(newest) or ()):
        yield note("version", "warning", f"vLLM {installed} was never looked at; {supported}", remedy)
    else:
        yield note("version", "ok", f"vLLM {installed}; {supported}")
    for fault in KNOWN_FAULTS:
        if fault.first <= numbers < fault.end and (on_cpu or not fault.cpu_only):
            where = " on a CPU" if fault.cpu_only else ""
            yield note("known faults", "warning", f"vLLM {installed}{where}: {fault.detail}", "use vLLM 0.32")


def _numbers(text: str) -> tuple[int, int] | None:
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def _hooks(stages: list[Stage], on_cpu: bool) -> Iterator[Finding]:
    """Looks for the places of vLLM that the plugin touches."""
    hooks = [hook for stage in stages for hook in hooks_of(stage, on_cpu=on_cpu)]
    looked_at, missing = f"hooks of {', '.join(stages)}", compat.missing_hooks(hooks)
    if missing:
        verdict: Verdict = "fault" if any(hook.need.required for hook in missing) else "warning"
        yield note(looked_at, verdict, compat.warning_text(missing), "install one of these versions")
    else:
        yield note(looked_at, "ok", f"all {len(hooks)} places of vLLM are as expected")


class _Said(logging.Handler):
    """Warnings of our plugin in the log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps a line of the log."""
        self.records.append(record)


def _reason(error: Exception) -> str:
    """Says what was raised: of a report by pydantic its first error, of others two lines."""
    name, said = type(error).__name__, " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
    if hasattr(error, "errors") and hasattr(error, "title"):
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        name, said = error.title, f"{where}: {first['msg']}" if where else first["msg"]
    said = said.replace("Value error, ", "").partition(" Supported architectures:")[0]
    return shortened(f"{name}: {said or repr(error)}")


def _server(config: Any, on_cpu: bool, asked: Asked) -> Iterator[Finding]:
    """Looks at what vLLM would run."""
    model, scheduler = config.model_config, config.scheduler_config
    if model.runner_type != "generate":
        detail = f"{model.model} is a {model.architecture}, which vLLM runs for {model.runner_type}, not to write text"
        yield note("verifier", "fault", detail, "give the directory or hub id of a language model")
        return
    found = (config.additional_config or {}).get(FOUND)
    if found is None:
        yield _no_twotower(config)
        return
    on_v2 = drafts_on_v2(config.speculative_config)
    reason = reason_for_v1(Wish.of(None), config.parallel_config, drafts_for_itself=found["drafts_for_itself"])
    yield note("model runner", "ok", "V2, with asynchronous scheduling" if on_v2 else f"V1: {reason}")
    stages: list[Stage] = ["v2" if on_v2 else "v1"]
    stages += ["hybrid"] if model.is_hybrid and (on_cpu or not on_v2) else []
    stages += ["model", "own state"] if found["drafts_for_itself"] else []
    yield from _hooks(stages, on_cpu)
    yield note("repairs", "ok", _repairs(model.is_hybrid, on_v2, on_cpu))
    yield note("worker", "ok", str(config.parallel_config.worker_cls))
    num_drafts = config.speculative_config.num_speculative_tokens
    needed = scheduler.max_num_seqs * (1 + num_drafts)
    most = scheduler.max_num_batched_tokens
    detail = f"{most}; {scheduler.max_num_seqs} requests need {needed}, or some are left out of steps"
    remedy = f"--max-num-batched-tokens {needed} or more"
    yield note("tokens of a step", "warning", detail, remedy).unless(most >= needed)
    towers = "one context tower, the verifier's" if found["drafts_for_itself"] and not on_v2 else "two towers"
    detail = f"blocks of {found['block_size']}, {num_drafts} drafts, {found['num_token_ids']} shared ids, {towers}"
    yield note("drafter", "ok", detail)
    devices = asked.gpus
    if asked.memory_bytes is not None:
        devices = (DeviceMemory(asked.memory_bytes, asked.memory_bytes),)
    elif on_cpu:
        devices = _host_memory()
    yield _longest_request(config, devices[0].total if devices else None, asked)
    # A CPU's share is not taken where the size of the cache is given.
    if devices and asked.memory_bytes is None and not (on_cpu and config.cache_config.kv_cache_memory_bytes):
        least = min(devices, key=lambda device: device.free / device.total)
        yield of_free_memory(least, config.cache_config.gpu_memory_utilization, on_cpu, asked.cache.fixed)


def _no_twotower(config: Any) -> Finding:
    drafter, verifier = config.speculative_config.model, config.model_config.model
    remedy = "--drafter with the directory or hub id of a TwoTower checkpoint"
    if holds_two_towers(verifier):
        remedy = f"swap the two, --verifier {drafter} --drafter {verifier}, or --verifier {verifier} alone"
    detail = f"vLLM takes {drafter} for an ordinary draft model, not for a TwoTower checkpoint"
    return note("drafter", "fault", detail, remedy)


def _host_memory() -> tuple[DeviceMemory, ...]:
    """Asks vLLM for the memory of the node that its first worker would be bound to, as `CPUWorker` does."""
    try:
        from vllm.utils import cpu_resource_utils as resources

        nodes, first = resources.get_visible_memory_node(), resources.get_allowed_cpu_list()[0].numa_node
        memory = resources.get_memory_node_info(first if first in nodes else nodes[0])
        return (DeviceMemory(memory.available_memory, memory.total_memory),)
    # Other versions have other functions, and some machines no nodes.
    except Exception:
        return ()


def _longest_request(config: Any, total: int | None, asked: Asked) -> Finding:
    """Looks at the most tokens of a request: whether the model has them, and whether vLLM finds room for one such.

    Args:
        config: vLLM's.
        total: bytes of the verifier's device; None where they are not known.
        asked: how long requests shall be.
    """
    from vllm import envs

    limit, length, cache = config.model_config.max_model_len, asked.context_length, config.cache_config
    # Nobody has asked for the default.
    if length > limit and length != Case.context_length and not envs.VLLM_ALLOW_LONG_MAX_MODEL_LEN:
        detail = f"{length} tokens are asked for, and the verifier has positions for {limit}: vLLM refuses a longer "
        remedy = f"--context-length {limit} or fewer, or a verifier for longer texts"
        return note("longest request", "fault", f"{detail}--max-model-len", remedy)
    needed, room = limit * asked.cache.per_token, cache.kv_cache_memory_bytes
    if room is None and total is not None:
        room = max(0, int(total * cache.gpu_memory_utilization) - asked.cache.fixed)
    if limit > length and room is not None and needed > room:
        detail = (
            f"vLLM will not start unless it is told a shorter one than {limit} tokens, whose keys and values take "
            f"{byte_text(needed)} of {byte_text(room)}"
        )
        return note("longest request", "warning", detail, f"set --max-model-len {length}")
    return note("longest request", "ok", f"{limit} tokens")


def of_free_memory(memory: DeviceMemory, utilisation: float, on_cpu: bool, fixed: int = 0) -> Finding:
    """Looks at what vLLM asks for at start: that its share of a device's memory is free.

    Args:
        memory: of the device that has the least.
        utilisation: the share.
        on_cpu: whether vLLM runs on a CPU, where memory that is busy now may be free later.
        fixed: bytes of a server beside its keys and values.
    """
    free, total, share = byte_text(memory.free), byte_text(memory.total), f"{utilisation:.0%}"
    enough = memory.free >= math.ceil(memory.total * utilisation)
    if enough:
        return note("free memory", "ok", f"{free} of {total}, of which vLLM takes {share}")
    fitting = f"--gpu-memory-utilization {math.floor(100 * memory.free / memory.total) / 100:.2f}"
    detail = f"vLLM will not start while only {free} of {total} are free, unless it is told to take less than {share}"
    if on_cpu:
        size = max(1, (memory.free - fixed) // 2**31)  # half: the processes of a server take some, too
        return note("free memory", "warning", detail, f"VLLM_CPU_KVCACHE_SPACE={size}, or {fitting} or less")
    return note("free memory", "fault", detail, f"end what holds the rest, or {fitting}")


def _repairs(is_hybrid: bool, on_v2: bool, on_cpu: bool) -> str:
    """Names the functions of vLLM that are repaired while it runs."""
    needs = [hook_table.CPU_SAMPLING] if on_cpu and not on_v2 else []
    needs += [hook_table.HYBRID] if is_hybrid and (on_cpu or not on_v2) else []
    needs += [hook_table.HYBRID_ON_CPU] if is_hybrid and on_cpu else []
    repaired = []
    for need in needs:
        functions = [hook.name for hook in hook_table.HOOKS if hook.need is need and hook.kind is Kind.FUNCTION]
        repaired.append(f"{need.purpose}: {', '.join(functions)}")
    if not on_v2 and not compat.rejection_sampler_runs_without_drafts():
        repaired.append("steps without drafts: GPUModelRunner._sample")
    return "; ".join(repaired) or "none are needed"


if __name__ == "__main__":
    write_findings(*sys.argv[1:])
