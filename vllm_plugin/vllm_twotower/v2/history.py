"""Token ids of the requests that vLLM's model runner V2 holds on the device, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class Step(NamedTuple):
    """Values of the requests of a step, in the order of its rows.

    Attributes:
        token_ids: int32 arrays, all tokens of each; views, valid until the next step.
        num_sampled: tokens that the step committed.
    """

    token_ids: list[npt.NDArray[np.int32]]
    num_sampled: list[int]


class TokenHistory:
    """Copies of V2's rows of token ids; a step costs one copy from the device, and one for every new request."""

    def __init__(self, req_states: Any, most_per_step: int) -> None:
        """Begins empty; the system gives memory to a row when it is written.

        Args:
            req_states: vLLM's `RequestState`.
            most_per_step: tokens that a step can commit at most for one request.
        """
        self._states, self._width = req_states, most_per_step
        self._rows = np.zeros(tuple(req_states.all_token_ids.gpu.shape), dtype=np.int32)
        # Slot and length by request.
        self._known: dict[str, tuple[int, int]] = {}

    def forget(self, request_id: str) -> None:
        """Reads a request anew the next time, which ends or begins again; unknown ids are ignored."""
        self._known.pop(request_id, None)

    def read(self, request_ids: Sequence[str], slots: Sequence[int], idx_mapping: Tensor, num_sampled: Tensor) -> Step:
        """Waits for the step that has just been launched.

        Args:
            request_ids, slots: of the step's rows.
            idx_mapping: int64 [num_reqs], the slots, on the device.
            num_sampled: int32 [num_reqs], on the device.
        """
        tokens = self._states.all_token_ids.gpu
        lengths = self._states.total_len.gpu[idx_mapping].long()[:, None]
        places = lengths - self._width + torch.arange(self._width, device=lengths.device)
        tails = tokens[idx_mapping[:, None], places.clamp_(min=0)]
        found = torch.cat([lengths, num_sampled[:, None], tails], dim=1).cpu().numpy()
        rows = []
        for request_id, slot, (length, _, *_), tail in zip(request_ids, slots, found, found[:, 2:], strict=True):
            known_slot, known = self._known.get(request_id, (-1, 0))
            row = self._rows[slot]
            if known_slot == slot and known <= length <= known + self._width:
                row[known:length] = tail[self._width - (length - known) :]
            else:
                row[:length] = tokens[slot, :length].cpu().numpy()
            self._known[request_id] = slot, int(length)
            rows.append(row[:length])
        return Step(rows, found[:, 1].tolist())
