"""The demo in real vLLM: the bundled verifier without speculation, and with three ways to draft for it."""

from twotower_bench.demo.measuring import DemoRow, Sizes, demo_engines, demo_systems, measure, rows_of
from twotower_bench.demo.report import as_json, print_table, print_text

__all__ = [
    "DemoRow",
    "Sizes",
    "as_json",
    "demo_engines",
    "demo_systems",
    "measure",
    "print_table",
    "print_text",
    "rows_of",
]
