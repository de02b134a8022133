"""Makes vLLM know TwoTower checkpoints as models: `vllm serve T` and `LLM(model=T)` load the context tower."""

from __future__ import annotations

import contextlib
import importlib
import logging
from functools import wraps
from typing import Any

from twotower_spec.config import ARCHITECTURE
from vllm_twotower import compat, hook_table
from vllm_twotower.checkpoints import is_two_tower

# A string, since vLLM looks at the class in a process of its own.
MODEL = "vllm_twotower.model.context_tower:NemotronHTwoTowerForCausalLM"
NEMOTRON_H = "NemotronHForCausalLM"

logger = logging.getLogger("vllm.twotower")


def install() -> None:
    """Registers the model in this process, and has vLLM's settings for it checked; never raises."""
    try:
        # Where one of these is absent, the check of the settings says so.
        with contextlib.suppress(ImportError, AttributeError, KeyError):
            _register()
        engine_args = importlib.import_module(hook_table.ARG_UTILS).EngineArgs
        if hasattr(engine_args, "create_model_config"):
            compat.wrap_once(engine_args, "create_model_config", _checked)
    except Exception:
        logger.warning("twotower-spec could not register its model in this vLLM.", exc_info=True)


def _register() -> None:
    registry = importlib.import_module(hook_table.MODELS).ModelRegistry
    settings = importlib.import_module(hook_table.MODEL_SETTINGS).MODELS_CONFIG_MAP
    if ARCHITECTURE not in registry.get_supported_archs():  # else ours already, or a vLLM that has one of its own
        registry.register_model(ARCHITECTURE, MODEL)
        settings.setdefault(ARCHITECTURE, settings[NEMOTRON_H])


def _checked(stock: Any) -> Any:
    @wraps(stock)
    def create_model_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_two_tower(self.hf_config_path or self.model, self.revision):
            return stock(self, *args, **kwargs)
        from vllm_twotower.model.settings import check, prepare

        config = prepare(self)
        model_config = stock(self, *args, **kwargs)
        check(config, model_config)
        return model_config

    return create_model_config
