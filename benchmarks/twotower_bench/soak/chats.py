"""Chats with reasoning and tools, as far as the bundled models can lead them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

TOOL: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": "work_out",
        "strict": True,  # else only the name is
        "parameters": {
            "type": "object",
            "properties": {
                "left": {"type": "integer", "minimum": 0, "maximum": 99},
                "sign": {"enum": ["+", "-", "*"]},
                "right": {"type": "integer", "minimum": 0, "maximum": 99},
            },
            "required": ["left", "sign", "right"],
            "additionalProperties": False,
        },
    },
}
NAMED: Mapping[str, Any] = {"type": "function", "function": {"name": "work_out"}}


def chat_arguments(folder: Path) -> list[str]:
    """Arguments of `vllm serve` for such chats; the bundled models have no template, which is put into the folder."""
    template = folder / "chat.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}", encoding="utf-8")
    parser = Path(__file__).with_name("reasoning_parser.py")
    words = ["--chat-template", str(template), "--reasoning-parser-plugin", str(parser), "--reasoning-parser", "trio"]
    return [*words, "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
