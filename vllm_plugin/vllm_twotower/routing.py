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
from collections.abc import Mapping
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Any

PROPOSER = "vllm_twotower.TwoTowerProposer"
PROPOSER_PATHS = (PROPOSER, "vllm_twotower.v1.proposer.TwoTowerProposer")
METHOD = "twotower"

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
    if given is None or not _is_ours(given):
        return
    from vllm_twotower import metrics
    from vllm_twotower.config import FOUND, KNOBS, DrafterKnobs, knobs_in
    from vllm_twotower.requirements import check_requirements

    additional = dict(engine_args.additional_config or {})
    given_knobs = {**knobs_in(additional), **knobs_in(given)}
    given.pop(KNOBS, None)
    if given.get("model") not in PROPOSER_PATHS:  # the other spelling may have been here before
        additional.pop(FOUND, None)
        revision = given.pop("revision", None)
        given_knobs = {"model": given.get("model"), "revision": revision, **given_knobs}
    knobs = DrafterKnobs.parse(given_knobs)
    num_speculative_tokens = given.get("num_speculative_tokens")
    found = check_requirements(knobs, additional.get(FOUND), num_speculative_tokens, model_config, parallel_config)
    given |= {
        "method": "custom_class",
        "model": PROPOSER,
        "num_speculative_tokens": num_speculative_tokens or found.block_size,
    }
    engine_args.spec_model = engine_args.spec_method = engine_args.spec_tokens = None
    engine_args.speculative_config = given
    engine_args.additional_config = {**additional, KNOBS: given_knobs, FOUND: asdict(found)}
    metrics.publish()


def _speculative_settings(engine_args: Any) -> dict[str, Any] | None:
    """The speculative settings and their flags together; None if they differ, which vLLM refuses itself."""
    given = {key.replace("-", "_"): value for key, value in (engine_args.speculative_config or {}).items()}
    for key, flag in (("method", "spec_method"), ("model", "spec_model"), ("num_speculative_tokens", "spec_tokens")):
        value = getattr(engine_args, flag)
        if value is not None and given.setdefault(key, value) != value:
            return None
    return given


def _is_two_tower(model: object, revision: object = None) -> bool:
    """Whether a directory or hub id holds a TwoTower checkpoint, by its config.json alone; never raises."""
    from transformers import PretrainedConfig

    from twotower_spec.config import ARCHITECTURE

    if not isinstance(model, str) or (Path(model).is_dir() and not Path(model, "config.json").is_file()):
        return False
    try:
        raw, _ = PretrainedConfig.get_config_dict(model, revision=revision)
        return ARCHITECTURE in (raw.get("architectures") or [])
    except Exception:  # whatever is wrong there, vLLM will say it
        return False


def _is_ours(given: Mapping[str, Any]) -> bool:
    method, model = given.get("method"), given.get("model")
    if method == METHOD or (model in PROPOSER_PATHS and method in (None, "custom_class")):
        return True
    elsewhere = model is None or model.strip("[]") == "ngram" or _is_import_path(model)
    return method is None and not elsewhere and _is_two_tower(model, given.get("revision"))


def _is_import_path(model: str) -> bool:
    """Whether a model is named like a class of another drafter, `package.module.Class`, as vLLM sees it."""
    return "." in model and all(part.isidentifier() for part in model.split(".")) and not Path(model).exists()
