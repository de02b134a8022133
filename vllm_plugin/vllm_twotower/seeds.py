"""Seeds of requests, the same on all ranks and in both model runners."""

from __future__ import annotations

import hashlib

from twotower_spec.generation.sampling import signed_seed


def request_seed(given: int | None, engine_seed: int | None, request_id: str) -> int:
    """Seed of a request's noise: its own, or where it brings none another one for every request id."""
    if given is not None:
        return signed_seed(given)
    digest = hashlib.blake2b(f"{engine_seed}:{request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
