"""Reasoning parser for the bundled verifier; models bring such a file, for `--reasoning-parser-plugin`.

Its solutions of word problems begin with a sentence on how they go about it; "Step one:" ends that.
"""

from vllm.reasoning import ReasoningParserManager
from vllm.reasoning.deepseek_r1_reasoning_parser import DeepSeekR1ReasoningParser


@ReasoningParserManager.register_module("trio")
class TrioReasoningParser(DeepSeekR1ReasoningParser):
    """Reasoning until the first "Step", which is one token of the bundled models."""

    @property
    def start_token(self) -> str:
        """A token that no text has."""
        return "<pad>"

    @property
    def end_token(self) -> str:
        """The word behind which the answer begins."""
        return "Step"
