"""The bundled trio and the demo that runs it."""

from twotower_spec.demo.standalone import DemoText, demo_prompts, run_modes
from twotower_spec.demo.trio import CATEGORIES, HeldOutPrompt, held_out_prompts, trio_directory, trio_path

__all__ = [
    "CATEGORIES",
    "DemoText",
    "HeldOutPrompt",
    "demo_prompts",
    "held_out_prompts",
    "run_modes",
    "trio_directory",
    "trio_path",
]
