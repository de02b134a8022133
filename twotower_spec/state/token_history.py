"""The token ids that a request's state was computed from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# The token ids of a request, prompt included; an array is compared faster.
TokenSequence = Sequence[int] | npt.NDArray[np.integer]
FIRST_CAPACITY = 64


class TokenHistory:
    """A list of token ids that compares itself with long sequences at the speed of memory."""

    def __init__(self) -> None:
        self._ids = np.empty(FIRST_CAPACITY, dtype=np.int32)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def extend(self, tokens: Sequence[int]) -> None:
        """Appends tokens."""
        length = self._length + len(tokens)
        if length > len(self._ids):
            grown = np.empty(max(length, 2 * len(self._ids)), dtype=np.int32)
            grown[: self._length] = self._ids[: self._length]
            self._ids = grown
        self._ids[self._length : length] = tokens
        self._length = length

    def truncate(self, length: int) -> None:
        """Forgets all but the first `length` tokens."""
        self._length = min(self._length, length)

    def begins(self, token_ids: TokenSequence) -> bool:
        """Whether a sequence begins with all of these tokens."""
        if len(token_ids) < self._length:
            return False
        if isinstance(token_ids, np.ndarray):
            return bool((self._ids[: self._length] == token_ids[: self._length]).all())
        return self.tolist() == list(token_ids[: self._length])

    def tolist(self) -> list[int]:
        """The ids as Python integers."""
        ids: list[int] = self._ids[: self._length].tolist()
        return ids


def tokens_from(token_ids: TokenSequence, start: int) -> list[int]:
    """The ids from index `start` on, as Python integers."""
    rest = token_ids[start:]
    return rest.tolist() if isinstance(rest, np.ndarray) else list(rest)


def all_below(token_ids: TokenSequence, bound: int) -> bool:
    """Whether all ids are from 0 to `bound` - 1."""
    if isinstance(token_ids, np.ndarray):
        return not len(token_ids) or bool(token_ids.min() >= 0 and token_ids.max() < bound)
    return all(0 <= token < bound for token in token_ids)
