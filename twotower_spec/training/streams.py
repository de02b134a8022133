"""Token streams on disk, and the batches drawn from them: a pure function of seed and step."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from twotower_spec.errors import ArgumentError


@dataclass(frozen=True)
class TokenStream:
    """Tokens of documents, one after the other.

    Attributes:
        tokens: uint32 [num_tokens].
        starts: int64 [num_starts], where a training row may begin: at documents, and inside long ones.
    """

    tokens: npt.NDArray[np.uint32]
    starts: npt.NDArray[np.int64]

    @classmethod
    def from_documents(cls, documents: Iterable[list[int]], max_row: int = 512) -> TokenStream:
        """Joins documents; one longer than `max_row` tokens may also be entered at every half of that."""
        tokens: list[npt.NDArray[np.uint32]] = []
        starts: list[int] = []
        length = 0
        for ids in documents:
            stride = max_row // 2
            inside = range(stride, len(ids) - stride, stride) if len(ids) > max_row else ()
            starts.extend([length, *(length + offset for offset in inside)])
            tokens.append(np.asarray(ids, dtype=np.uint32))
            length += len(ids)
        joined = np.concatenate(tokens) if tokens else np.zeros(0, dtype=np.uint32)
        return cls(joined, np.asarray(starts, dtype=np.int64))

    def save(self, directory: Path) -> None:
        """Writes two arrays; the directory appears whole or not at all, whoever else writes the same."""
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=directory.parent) as name:
            draft = Path(name) / "stream"
            draft.mkdir()
            np.save(draft / "starts.npy", self.starts)
            np.save(draft / "tokens.npy", self.tokens)
            try:
                draft.rename(directory)
            except OSError:
                if not self.is_saved(directory):  # otherwise another process was first, with the same content
                    raise

    @classmethod
    def load(cls, directory: Path) -> TokenStream:
        """Maps what `save` wrote."""
        tokens = np.load(directory / "tokens.npy", mmap_mode="r", allow_pickle=False)
        return cls(tokens, np.load(directory / "starts.npy", allow_pickle=False))

    @staticmethod
    def is_saved(directory: Path) -> bool:
        """Whether a stream lies there."""
        return (directory / "tokens.npy").is_file()


class Mixture:
    """Rows of tokens from several streams, each chosen with its own weight.

    Args:
        streams: by name.
        weights: by name; need not sum to 1.
        sequence_length: inputs per row; a row holds one token more.
        batch_size: rows.
        seed: a batch depends on it and the step alone.

    Raises:
        ArgumentError: a stream is missing or shorter than one row.
    """

    def __init__(
        self,
        streams: Mapping[str, TokenStream],
        weights: Mapping[str, float],
        sequence_length: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self._row, self._batch_size, self._seed = sequence_length + 1, batch_size, seed
        self._streams: list[TokenStream] = []
        for name in weights:
            if name not in streams:
                raise ArgumentError(f"text source {name!r} is not there; the recipe's corpus has {sorted(streams)}")
            stream = streams[name]
            last = len(stream.tokens) - self._row
            if last < 0:
                raise ArgumentError(
                    f"text source {name!r} has {len(stream.tokens)} tokens, fewer than one row of {self._row}; give "
                    f"more text or a smaller sequence_length"
                )
            starts = stream.starts[stream.starts <= last]
            self._streams.append(TokenStream(stream.tokens, starts if len(starts) else np.zeros(1, dtype=np.int64)))
        shares = np.asarray(list(weights.values()), dtype=np.float64)
        self._shares = shares / shares.sum()

    def batch(self, step: int) -> Tensor:
        """Token ids int64 [batch_size, sequence_length + 1] of a step."""
        rng = np.random.default_rng([self._seed, step])
        rows = np.empty((self._batch_size, self._row), dtype=np.int64)
        for row, source in zip(rows, rng.choice(len(self._streams), self._batch_size, p=self._shares), strict=True):
            stream = self._streams[source]
            start = stream.starts[rng.integers(len(stream.starts))]
            row[:] = stream.tokens[start : start + self._row]
        return torch.from_numpy(rows)
