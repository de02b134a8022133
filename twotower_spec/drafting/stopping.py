"""End of a text: exact to the token, also inside a block of accepted drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from twotower_spec.errors import ArgumentError

FinishReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class StopConditions:
    """Conditions that end a text. Tokens are looked at one by one, as if they had come one by one.

    Attributes:
        max_new_tokens: most new tokens.
        eos_token_ids: a text ends with one of these; it is kept.
        stop_strings: a text ends with the token that completes one of these.
        tokenizer: for stop strings.

    Raises:
        ArgumentError: stop strings without a tokenizer, or an empty one.
    """

    max_new_tokens: int
    eos_token_ids: frozenset[int] = frozenset()
    stop_strings: Sequence[str] = ()
    tokenizer: PreTrainedTokenizerBase | None = None

    def __post_init__(self) -> None:
        """Checks the stop strings."""
        if isinstance(self.stop_strings, str):
            raise ArgumentError(f"stop_strings {self.stop_strings!r} is one string; give a list of strings")
        if self.stop_strings and self.tokenizer is None:
            raise ArgumentError(f"stop_strings {list(self.stop_strings)} need a tokenizer; give the target's")
        if not all(self.stop_strings):
            raise ArgumentError("a stop string is empty; give text")

    def cut(self, text: Sequence[int], new: Sequence[int]) -> tuple[list[int], FinishReason | None]:
        """The new tokens that still belong to a text, and why it ends with them, if it does.

        Args:
            text: its new tokens so far.
            new: tokens that come next.
        """
        whole = list(text)
        for count, token in enumerate(new, 1):
            whole.append(token)
            reason = self._reason(whole)
            if reason:
                return list(new[:count]), reason
        return list(new), None

    def _reason(self, text: list[int]) -> FinishReason | None:
        if text[-1] in self.eos_token_ids:
            return "eos"
        if self.tokenizer is not None and self.stop_strings:
            # Enough to hold a stop string that ends here, though tokens may be bytes of a character.
            decoded = str(self.tokenizer.decode(text[-4 * max(map(len, self.stop_strings)) - 8 :]))
            if any(stop in decoded for stop in self.stop_strings):
                return "stop"
        return "length" if len(text) >= self.max_new_tokens else None
