"""The demo in real vLLM: the bundled verifier without speculation, and with three ways to draft for it."""

from vllm_twotower.demo.engine_process import EngineError, EngineProcess
from vllm_twotower.demo.measuring import DemoRow, Engines, Sizes, measure, running_engines, warm_up
from vllm_twotower.demo.report import as_json, check_writable, print_table, print_text, write_atomically
from vllm_twotower.demo.systems import SYSTEMS, System

__all__ = [
    "SYSTEMS",
    "DemoRow",
    "EngineError",
    "EngineProcess",
    "Engines",
    "Sizes",
    "System",
    "as_json",
    "check_writable",
    "measure",
    "print_table",
    "print_text",
    "running_engines",
    "warm_up",
    "write_atomically",
]
