"""Lines of `vllm serve` in the documentation: vLLM with the plugin takes each, and knows the parsers that it names."""

from __future__ import annotations

import json
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.packaging.test_docs import PAGES, code_blocks
from tests.vllm_plugin.fork_server import results_of

pytestmark = [pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM"), pytest.mark.slow]

# Lies beside the weights of Nemotron-3 Nano.
BROUGHT = {"nano_v3"}


def documented() -> list[list[str]]:
    """Words behind `vllm serve` of every line in a block."""
    found = []
    for page in PAGES:
        for _, block in code_blocks(page):
            for line in block.replace("\\\n", " ").splitlines():
                _, separator, rest = line.partition("vllm serve ")
                if separator:
                    found.append(shlex.split(rest, comments=True))
    return found


def write_parsed(order: str, output: str) -> None:
    """Parses lines in this process as `vllm serve` would."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_twotower import register

    register()
    parser = make_arg_parser(FlexibleArgumentParser())
    lines = [vars(parser.parse_args(words)) for words in json.loads(order)]
    results = {
        "settings": [line["speculative_config"] for line in lines],
        "reasoning_parsers": sorted({line["reasoning_parser"] for line in lines} - {"", None}),
        "tool_parsers": sorted({line["tool_call_parser"] for line in lines} - {None}),
        "known_reasoning_parsers": ReasoningParserManager.list_registered(),
        "known_tool_parsers": ToolParserManager.list_registered(),
    }
    Path(output).write_text(json.dumps(results))


def test_vllm_takes_every_documented_line() -> None:
    lines = documented()
    found, _ = results_of(f"{__name__}:write_parsed", json.dumps(lines))
    assert len(found["settings"]) == len(lines) >= 10
    assert set(found["reasoning_parsers"]) - BROUGHT <= set(found["known_reasoning_parsers"])
    assert set(found["tool_parsers"]) <= set(found["known_tool_parsers"])
    assert {"nemotron_v3", "nano_v3"} <= set(found["reasoning_parsers"])
    assert {"qwen3_coder", "qwen3_xml"} <= set(found["tool_parsers"])
