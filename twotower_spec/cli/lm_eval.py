"""`twotower-spec lm-eval`: the command line of lm-eval, which knows the model `twotower` here."""

from __future__ import annotations

import sys

import typer

from twotower_spec.evaluation.lm_eval_model import register

# All arguments after the command's name go to lm-eval, --help included.
SETTINGS = {"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False}


def lm_eval(context: typer.Context) -> None:
    """Evaluate on tasks of lm-eval: --model twotower --model_args pretrained=DIR,mode=mask-diffusion --tasks gsm8k."""
    register()
    from lm_eval.__main__ import cli_evaluate

    # lm-eval reads the arguments of the process.
    sys.argv = ["lm-eval", *context.args]
    cli_evaluate()
