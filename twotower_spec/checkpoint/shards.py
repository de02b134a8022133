"""Reads tensors out of shards: in place for the host, and ahead of a CUDA device by way of two pinned buffers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from twotower_spec.checkpoint.index import StoredTensor
from twotower_spec.errors import CheckpointError

# A shard is mapped into memory while it is read. Opening it anew after this many bytes lets go of the pages already
# copied, so that a load needs the memory of the weights and no more.
_WINDOW_BYTES = 128 << 20
# Bytes of each of the two pinned buffers, and of the copy of one that a device holds for a moment.
BUFFER_BYTES = 64 << 20
# Tensors begin at multiples of it in a buffer, as CUDA's own allocations do.
_ALIGNMENT = 256


@dataclass(frozen=True)
class Piece:
    """A stored tensor, or some of its rows.

    Attributes:
        name: of the tensor.
        rows: along its first axis; None for all.
        stored: shape and dtype of the piece, and the shard it is in.
    """

    name: str
    rows: slice | None
    stored: StoredTensor


def read_tensors(
    wanted: Mapping[str, StoredTensor], devices: Mapping[str, torch.device]
) -> Generator[tuple[Piece, Tensor], None, None]:
    """Yields every tensor, on its device if that is a CUDA device, perhaps in pieces; close it if you leave early.

    Args:
        wanted: tensors by name.
        devices: of all of them, by name.

    Raises:
        CheckpointError: a shard cannot be read.
    """
    ahead = {name for name in wanted if devices[name].type == "cuda"}
    yield from read_in_place({name: stored for name, stored in wanted.items() if name not in ahead})
    yield from read_ahead({name: stored for name, stored in wanted.items() if name in ahead}, devices, BUFFER_BYTES)


def read_in_place(wanted: Mapping[str, StoredTensor]) -> Iterator[tuple[Piece, Tensor]]:
    """Yields every tensor, a view of its shard that holds until the next one is asked for.

    Raises:
        CheckpointError: a shard cannot be read.
    """
    for window in _together(_whole(wanted), lambda piece: piece.stored.shard, _WINDOW_BYTES):
        with _opened(window[0].stored.shard) as read:
            for piece in window:
                yield piece, read(piece)


def read_ahead(
    wanted: Mapping[str, StoredTensor], devices: Mapping[str, torch.device], buffer_bytes: int
) -> Iterator[tuple[Piece, Tensor]]:
    """Yields every tensor on its CUDA device, while a thread reads what comes next.

    The thread fills one pinned buffer while the content of the other goes to the device, in one copy. Tensors share a
    buffer; one that does not fit comes in pieces. The thread has ended when this returns or raises.

    Args:
        wanted: tensors by name, in the order in which they are read.
        devices: of all of them, by name.
        buffer_bytes: of each buffer; more if a single row needs it, less if there is less to read.

    Raises:
        CheckpointError: a shard cannot be read.
    """
    pieces = [part for piece in _whole(wanted) for part in _split(piece, buffer_bytes)]
    loads = list(_together(pieces, lambda piece: (piece.stored.shard, devices[piece.name]), buffer_bytes))
    if not loads:
        return
    buffers = [_PinnedBuffer(max(_room(load) for load in loads)) for _ in loads[:2]]
    with ThreadPoolExecutor(1, thread_name_prefix="twotower-reader") as reader:
        coming = reader.submit(buffers[0].fill, loads[0])
        for number, load in enumerate(loads):
            coming.result()
            here = buffers[number % 2]
            if number + 1 < len(loads):
                following = buffers[(number + 1) % 2]
                following.wait()
                coming = reader.submit(following.fill, loads[number + 1])
            yield from zip(load, here.sent(load, devices[load[0].name]), strict=True)


class _PinnedBuffer:
    """Memory of the host that a device copies from by itself."""

    def __init__(self, num_bytes: int) -> None:
        self._bytes = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        self._sent: torch.cuda.Event | None = None

    def fill(self, load: list[Piece]) -> None:
        """Reads pieces of one shard into it; in the reader's thread."""
        with _opened(load[0].stored.shard) as read:
            for piece, place in zip(load, _places(self._bytes, load), strict=True):
                place.copy_(read(piece))

    def sent(self, load: list[Piece], device: torch.device) -> list[Tensor]:
        """Begins to copy the pieces to a device, where the tensors share memory."""
        # PyTorch gives memory away again in the order of the stream, so that this copy may be let go of at once.
        there = self._bytes[: _room(load)].to(device, non_blocking=True)
        self._sent = torch.cuda.Event()
        self._sent.record(torch.cuda.current_stream(device))
        return _places(there, load)

    def wait(self) -> None:
        """Returns when it may be filled again."""
        if self._sent is not None and not self._sent.query():
            self._sent.synchronize()


@contextmanager
def _opened(shard: Path) -> Iterator[Callable[[Piece], Tensor]]:
    """A function that reads pieces of a shard: views of the file, which is mapped into memory."""
    try:
        with safe_open(shard, framework="pt") as opened:

            def read(piece: Piece) -> Tensor:
                values: Tensor = opened.get_tensor(piece.name)
                return values if piece.rows is None else values[piece.rows]

            yield read
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{shard} is truncated or corrupt ({error}); download it again") from error


def _whole(wanted: Mapping[str, StoredTensor]) -> list[Piece]:
    """All tensors, shard by shard."""
    by_shard: dict[Path, list[Piece]] = {}
    for name, stored in wanted.items():
        by_shard.setdefault(stored.shard, []).append(Piece(name, None, stored))
    return [piece for pieces in by_shard.values() for piece in pieces]


def _split(piece: Piece, most_bytes: int) -> Iterator[Piece]:
    """A tensor in pieces of at most so many bytes, or of one row."""
    stored = piece.stored
    if stored.nbytes <= most_bytes:
        yield piece
        return
    num_rows, *row = stored.shape
    step = max(1, most_bytes * num_rows // stored.nbytes)
    for first in range(0, num_rows, step):
        rows = slice(first, min(first + step, num_rows))
        yield Piece(piece.name, rows, StoredTensor(stored.shard, stored.dtype, (rows.stop - rows.start, *row)))


def _together(pieces: list[Piece], key: Callable[[Piece], object], most_bytes: int) -> Iterator[list[Piece]]:
    """Neighbours of one key, as many as fit into so many bytes, and at least one."""
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        room = _padded(piece)
        if group and (size + room > most_bytes or key(piece) != key(group[0])):
            yield group
            group, size = [], 0
        group.append(piece)
        size += room
    if group:
        yield group


def _room(load: list[Piece]) -> int:
    """Bytes that pieces take one after the other."""
    return sum(map(_padded, load))


def _padded(piece: Piece) -> int:
    """Bytes of a piece, and those until the next one may begin."""
    return -(-piece.stored.nbytes // _ALIGNMENT) * _ALIGNMENT


def _places(memory: Tensor, load: list[Piece]) -> list[Tensor]:
    """Tensors of the pieces' shapes and dtypes in memory, uint8 [bytes]."""
    places, first = [], 0
    for piece in load:
        place = memory[first : first + piece.stored.nbytes]
        places.append(place.view(piece.stored.dtype).view(piece.stored.shape))
        first += _padded(piece)
    return places
