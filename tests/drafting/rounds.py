"""Rounds of a session for rows of token ids by request."""

from collections.abc import Mapping
from typing import Any

from twotower_spec.drafting import DraftBlock, DraftingSession, DraftRequest
from twotower_spec.state.token_history import TokenSequence


def draft_rows(
    session: DraftingSession,
    rows: Mapping[Any, TokenSequence],
    max_draft_tokens: Mapping[Any, int] | None = None,
    seeds: Mapping[Any, int] | None = None,
) -> DraftBlock:
    limits, own_seeds = max_draft_tokens or {}, seeds or {}
    requests = [DraftRequest(name, row, limits.get(name), seed=own_seeds.get(name)) for name, row in rows.items()]
    return session.draft(requests).block
