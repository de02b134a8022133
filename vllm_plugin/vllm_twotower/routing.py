"""Leads `--speculative-model T` to our proposer: vLLM's settings are rewritten before vLLM checks them.

vLLM makes its engine out of a dictionary of speculative settings. Where that names a TwoTower checkpoint, it is turned
into the spelling that vLLM has for drafters from outside (`custom_class`), and the knobs travel in `additional_config`.
Everything then goes through vLLM's own code, and no process but this one needs to know.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import wraps
from typing import Any

from vllm_twotower.checkpoints import is_same, is_two_tower
from vllm_twotower.runner import DRAFTS_ON_V2, PROPOSER_PATHS, V1_SETTINGS, V2_SETTINGS, Wish

METHOD = "twotower"
HYBRID_CPU_WORKER = "vllm_twotower.v1.cpu_hybrid.HybridCPUWorker"

# Read by oneDNN when a process computes for the first time; vLLM's processes inherit it.
PRIMITIVE_CACHE_VARIABLE, MOST_PRIMITIVES = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128"

# Settings of vLLM that count with our drafter; those for vLLM's own sampler, which replaces ours for them, included.
COUNTING_SETTINGS = {
    "method",
    "model",
    "num_speculative_tokens",
    "rejection_sample_method",
    "synthetic_acceptance_rates",
    "synthetic_acceptance_length",
}
COUNTING_ON_V2 = {"num_speculative_tokens_per_batch_size"}
# Methods of vLLM that a TwoTower checkpoint may stand beside; those of the second row do not look at a checkpoint.
OPEN_METHODS = (None, "draft_model", "custom_class")
METHODS_WITHOUT_CHECKPOINT = ("ngram", "[ngram]", "ngram_gpu", "suffix", "extract_hidden_states")

logger = logging.getLogger("vllm.twotower")


def install() -> None:
    """Wraps three functions of vLLM, once per process; a missing one costs a warning, and what it is needed for."""
    from vllm_twotower import compat, hook_table

    try:
        missing = compat.missing_hooks(hook_table.hooks_of("routing"))
        if missing:
            logger.warning(compat.warning_text(missing))
        if any(hook.need.required for hook in missing):
            return
        absent = {hook.name for hook in missing}
        for module, owner, name, wrapper in (
            (hook_table.ARG_UTILS, "EngineArgs", "create_speculative_config", _routing),
            (hook_table.ARG_UTILS, "EngineArgs", "add_cli_args", _with_alias),
            (hook_table.SAMPLING_PARAMS, "SamplingParams", "_validate_spec_decode", _lenient),
        ):
            if f"{owner}.{name}" not in absent:
                compat.wrap_once(getattr(importlib.import_module(module), owner), name, wrapper)
    except Exception:
        logger.warning("twotower-spec could not hook into this vLLM, which goes on without it.", exc_info=True)


def _routing(stock: Any) -> Any:
    @wraps(stock)
    def create_speculative_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        named = dict(zip(("target_model_config", "target_parallel_config"), args, strict=False)) | kwargs
        route(self, named["target_model_config"], named["target_parallel_config"])
        choose_worker(named["target_model_config"], named["target_parallel_config"])
        return stock(self, *args, **kwargs)

    return create_speculative_config


def _with_alias(stock: Any) -> Any:
    @wraps(stock)
    def add_cli_args(parser: Any) -> Any:
        parser = stock(parser)
        with contextlib.suppress(argparse.ArgumentError):  # vLLM or another plugin has it
            parser.add_argument(
                "--speculative-model",
                dest="spec_model",
                default=None,
                help="Draft model, as --spec-model; a TwoTower checkpoint drafts whole blocks (twotower-spec).",
            )
        for action in parser._actions:
            if "--spec-method" in action.option_strings and action.choices is not None:
                action.choices = [*action.choices, METHOD]
        return parser

    return add_cli_args


def _lenient(stock: Any) -> Any:
    """vLLM refuses min_p and logit_bias with speculative decoding; our sampler applies both."""

    @wraps(stock)
    def _validate_spec_decode(self: Any, speculative_config: Any) -> None:
        ours = getattr(speculative_config, "model", None) in PROPOSER_PATHS
        # Its lossy methods are vLLM's own sampler's.
        if not ours or speculative_config.rejection_sample_method != "standard":
            stock(self, speculative_config)

    return _validate_spec_decode


def route(engine_args: Any, model_config: Any, parallel_config: Any) -> None:
    """Rewrites engine arguments whose speculative settings name a TwoTower checkpoint; leaves all others alone.

    Args:
        engine_args: `EngineArgs`; changed in place.
        model_config, parallel_config: vLLM's, of the verifier.

    Raises:
        TwoTowerError: a knob, the checkpoint or the verifier is refused.
    """
    given = _speculative_settings(engine_args)
    if given is None:
        return
    if not (_is_ours(given) or _asks_for_itself(given, engine_args.additional_config)):
        _refuse_knobs_of_nobody(given)
        return
    from twotower_spec.drafting.session import MOST_DRAFT_TOKENS
    from vllm_twotower import metrics
    from vllm_twotower.config import FOUND, KNOBS, DrafterKnobs, knobs_in
    from vllm_twotower.requirements import check_requirements, chooses_v2
    from vllm_twotower.v2 import registration

    wish = Wish.of(engine_args.async_scheduling)
    additional = {} if engine_args.additional_config is None else dict(engine_args.additional_config)
    given_knobs = {**knobs_in(additional), **knobs_in(given)}
    given.pop(KNOBS, None)
    if given.get("model") not in PROPOSER_PATHS:  # the other spelling may have been here before
        additional.pop(FOUND, None)
        given_knobs = _naming_checkpoint(given_knobs, given.get("model"), given.pop("revision", None))
    given_knobs, drafts_for_itself = _naming_itself(given_knobs, given.get("method"), model_config)
    knobs = DrafterKnobs.parse(given_knobs)
    if FOUND in additional:  # these arguments have been here before
        drafts_for_itself = bool(additional[FOUND]["drafts_for_itself"])
    on_v2 = chooses_v2(wish, parallel_config, drafts_for_itself=drafts_for_itself)
    num_speculative_tokens = given.get("num_speculative_tokens")
    found = check_requirements(
        knobs,
        additional.get(FOUND),
        num_speculative_tokens,
        model_config,
        parallel_config,
        drafts_for_itself=drafts_for_itself,
        on_v2=on_v2,
    )
    if on_v2:
        os.environ[DRAFTS_ON_V2] = "1"
        registration.install_scheduler()
    _drop_settings_without_meaning(given, on_v2)
    _bound_primitive_cache()
    if num_speculative_tokens is None:
        # Where the drafter reads the verifier's own state, a block begins with a token that is no draft.
        num_speculative_tokens = min(max(1, found.block_size - found.drafts_for_itself), MOST_DRAFT_TOKENS)
    given |= {**(V2_SETTINGS if on_v2 else V1_SETTINGS), "num_speculative_tokens": num_speculative_tokens}
    engine_args.spec_model = engine_args.spec_method = engine_args.spec_tokens = None
    engine_args.speculative_config = given
    engine_args.additional_config = {**additional, KNOBS: given_knobs, FOUND: asdict(found)}
    # Of several API servers each reads the arguments again; the engines are started by the process above them.
    is_api_server = getattr(engine_args, "_api_process_count", 1) > 1 and engine_args._api_process_rank >= 0
    metrics.publish(starts_engines=not is_api_server)


def _bound_primitive_cache() -> None:
    """On a CPU, bounds what oneDNN keeps for every number of tokens that a step had, unless the user has chosen.

    Drafts make these numbers many more: with oneDNN's own bound of 1024 an engine grows by hundreds of MiB.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        os.environ.setdefault(PRIMITIVE_CACHE_VARIABLE, MOST_PRIMITIVES)


def choose_worker(model_config: Any, parallel_config: Any) -> None:
    """Has a verifier with Mamba layers run in our worker on a CPU, where vLLM's own lacks what such layers need.

    With any speculative method or none; a worker class that the user names stays.

    Args:
        model_config, parallel_config: vLLM's, of the verifier; the latter is changed in place.
    """
    from vllm.platforms import current_platform

    from vllm_twotower import compat, requirements
    from vllm_twotower.hook_table import hooks_of

    runs_on_cpu = model_config.is_hybrid and current_platform.is_cpu() and parallel_config.worker_cls == "auto"
    if runs_on_cpu and model_config.architecture in requirements.MAMBA2_ON_CPU:
        missing = compat.missing_hooks(hooks_of("hybrid", on_cpu=True))
        if missing:
            logger.warning(compat.warning_text(missing))
        else:
            parallel_config.worker_cls = HYBRID_CPU_WORKER


def _speculative_settings(engine_args: Any) -> dict[str, Any] | None:
    """The speculative settings and their flags together; None for what vLLM refuses itself, as where they differ."""
    settings = {} if engine_args.speculative_config is None else engine_args.speculative_config
    if not isinstance(settings, Mapping) or not all(isinstance(key, str) for key in settings):
        return None
    given = {key.replace("-", "_"): value for key, value in settings.items()}
    for key, flag in (("method", "spec_method"), ("model", "spec_model"), ("num_speculative_tokens", "spec_tokens")):
        value = getattr(engine_args, flag)
        if value is not None and given.setdefault(key, value) != value:
            return None
    return given


def _naming_checkpoint(knobs: Mapping[str, Any], model: object, revision: object) -> dict[str, Any]:
    """Puts the checkpoint of the speculative settings among the knobs.

    Raises:
        ArgumentError: the knobs name another one.
    """
    from twotower_spec.errors import ArgumentError

    named = dict(knobs)
    for name, value in (("model", model), ("revision", revision)):
        if named.get(name) is None:
            named[name] = value
        elif value is not None and named[name] != value:
            raise ArgumentError(
                f"the speculative settings name {name} {value!r} and the twotower knobs {named[name]!r}; give one"
            )
    return named


def _asks_for_itself(given: Mapping[str, Any], additional_config: object) -> bool:
    """Whether the knobs alone ask for the drafter: `"twotower": {"self": true}` without model or method."""
    holders = [holder for holder in (given, additional_config) if holder]
    if given.get("method") is not None or given.get("model") is not None or not holders:
        return False
    from vllm_twotower.config import KNOBS, SELF

    return any(
        isinstance(holder, Mapping) and isinstance(holder.get(KNOBS), Mapping) and SELF in holder[KNOBS]
        for holder in holders
    )


def _naming_itself(knobs: Mapping[str, Any], method: object, model_config: Any) -> tuple[dict[str, Any], bool]:
    """Names the verifier's checkpoint where it is to draft for itself, and says whether it is.

    Args:
        knobs: of the drafter, with "self" where the user gives it; False has the same checkpoint loaded twice.
        method: of the speculative settings; our own without a model means the verifier.
        model_config: vLLM's, of the verifier.

    Returns:
        The knobs without "self", and whether the drafter is the verifier's own checkpoint and may be read in it.

    Raises:
        ArgumentError: the verifier is no TwoTower checkpoint, or another model is named beside.
    """
    from twotower_spec.errors import ArgumentError
    from vllm_twotower.config import SELF

    named = dict(knobs)
    asked = named.pop(SELF, None)
    if asked is not None and not isinstance(asked, bool):
        raise ArgumentError(f"twotower knob self {asked!r} is not allowed; give true, or leave it out")
    verifier, revision = str(model_config.model), model_config.revision
    can = is_two_tower(verifier, revision)
    if asked and not can:
        raise ArgumentError(
            f"twotower knob self is true, and the verifier {verifier} is no TwoTower checkpoint; name one as the "
            f"speculative model, or serve one"
        )
    if named.get("model") is None and (asked or (can and asked is None and _is_our_name(method))):
        named |= {"model": verifier, "revision": revision}
    model = named.get("model")
    if not can or not isinstance(model, str):
        return named, False
    same = is_same(model, named.get("revision"), verifier, revision)
    if asked and not same:
        raise ArgumentError(
            f"twotower knob self is true, and the speculative settings name {model} beside the verifier {verifier}; "
            f"give one of the two"
        )
    return named, same and asked is not False


def _drop_settings_without_meaning(given: dict[str, Any], on_v2: bool) -> None:
    """Removes settings of vLLM that our drafter does not have, and names them in one line of the log."""
    from vllm.config.speculative import SpeculativeConfig

    counting = COUNTING_SETTINGS | (COUNTING_ON_V2 if on_v2 else set())
    defaults = {field.name: field.default for field in fields(SpeculativeConfig)}
    if given.get("model") in PROPOSER_PATHS:  # they have been here before
        for name in V2_SETTINGS.keys() - V1_SETTINGS.keys():
            given.pop(name, None)
    ignored = [name for name in given if name in defaults and name not in counting]
    if given.get("rejection_sample_method") == "block":  # it weighs probabilities of drafts, which ours do not have
        ignored.append("rejection_sample_method")
    asked = [name for name in ignored if given[name] is not None and given[name] != defaults[name]]
    for name in ignored:
        del given[name]
    if asked:
        logger.warning("TwoTower: %s of the speculative settings mean nothing to this drafter.", ", ".join(asked))


def _is_ours(given: Mapping[str, Any]) -> bool:
    """Whether speculative settings mean our drafter.

    Raises:
        ArgumentError: they name a TwoTower checkpoint and a method that cannot draft with it.
    """
    from twotower_spec.errors import ArgumentError

    method, model = given.get("method"), given.get("model")
    if _is_our_name(method):
        return True
    if model in PROPOSER_PATHS:
        return method in (*OPEN_METHODS, V2_SETTINGS["method"])
    elsewhere = not isinstance(model, str) or model.strip("[]") == "ngram" or _is_import_path(model)
    if elsewhere or method in METHODS_WITHOUT_CHECKPOINT or not is_two_tower(model, given.get("revision")):
        return False
    if method not in OPEN_METHODS:
        raise ArgumentError(
            f"method {method!r} cannot draft with {model}, which is a TwoTower checkpoint; leave the method out, or "
            f"give {METHOD!r}"
        )
    return True


def _refuse_knobs_of_nobody(given: Mapping[str, Any]) -> None:
    """Refuses knobs of our drafter beside a model that is none, of which vLLM would say that it does not know them.

    Raises:
        ArgumentError: there are some.
    """
    from twotower_spec.errors import ArgumentError
    from vllm_twotower.config import KNOBS

    if KNOBS in given:
        raise ArgumentError(
            f"the speculative settings have knobs for a TwoTower drafter, and model {given.get('model')!r} is no "
            f"checkpoint of one, or its config.json cannot be read; give its directory or hub id"
        )


def _is_our_name(method: object) -> bool:
    return isinstance(method, str) and method.lower().replace("-", "").replace("_", "") == METHOD


def _is_import_path(model: str) -> bool:
    """Whether a model is named like a class of another drafter, `package.module.Class`, as vLLM sees it."""
    is_dotted = "." in model and all(part.isidentifier() for part in model.split("."))
    return is_dotted and not os.path.exists(model)  # noqa: PTH110 (Path.exists raises for names that are too long)
