"""Check of vLLM for `twotower-spec doctor`: what it would make of two models, asked in a process of its own.

vLLM's own `EngineArgs.create_engine_config` is asked, which refuses what a server refuses before it loads anything.
"""

from __future__ import annotations

import json
import logging
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

from twotower_spec.diagnosis import Case, Finding, Verdict
from twotower_spec.diagnosis.finding import refusal
from twotower_spec.errors import TwoTowerError, first_line
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

note = partial(Finding, AREA)


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
    if case.verifier is None or case.drafter is None:
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


def write_findings(order: str, output: str) -> None:
    """Writes what is found in this process.

    Args:
        order: arguments of an engine, as JSON; an empty object for vLLM alone.
        output: file for the findings, as JSON.
    """
    findings = [asdict(finding) for finding in look(json.loads(order))]
    Path(output).write_text(json.dumps(findings))


def look(arguments: dict[str, Any]) -> Iterator[Finding]:
    """Imports vLLM and has it read the settings of a server; changes this process.

    Args:
        arguments: of an engine; empty for vLLM alone.
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
    yield from _server(config, on_cpu)
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
    """Says what was raised; of a report by pydantic the sentence."""
    found = re.search(r"Value error, (.*?)(?: \[type=|\n|$)", str(error), flags=re.S)
    return f"{type(error).__name__}: {found[1] if found else first_line(error)}"


def _server(config: Any, on_cpu: bool) -> Iterator[Finding]:
    """Looks at what vLLM would run."""
    model, scheduler = config.model_config, config.scheduler_config
    if model.runner_type != "generate":
        detail = f"{model.model} is a {model.architecture}, which vLLM runs for {model.runner_type}, not to write text"
        yield note("verifier", "fault", detail, "give the directory or hub id of a language model")
        return
    on_v2, found = drafts_on_v2(config.speculative_config), config.additional_config[FOUND]
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
