"""Whether two models mean the same tokens: compared by content, not by size."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from twotower_spec.errors import ArgumentError


def shared_token_ids(
    target: PreTrainedTokenizerBase, drafter: PreTrainedTokenizerBase, target_rows: int, drafter_rows: int
) -> int:
    """How many ids, from 0 on, both models have; ids beyond are never drafted.

    Either embedding table may be padded beyond the other: only ids that a tokenizer gives a meaning are compared, and
    those that both tables hold must mean the same. A token that the target has and the drafter lacks is no mismatch: a
    request that uses it goes on without drafts. Special tokens are compared as all others; which of them begins or ends
    a text is the target's affair.

    Args:
        target, drafter: tokenizers.
        target_rows, drafter_rows: rows of the embedding tables.

    Raises:
        ArgumentError: an id means different tokens; the first one is named.
    """
    shared = min(target_rows, drafter_rows)
    ours, theirs = _tokens(target), _tokens(drafter)
    for token_id in range(shared):
        mine, other = ours.get(token_id), theirs.get(token_id)
        if mine is not None and other is not None and mine != other:
            raise ArgumentError(
                f"token id {token_id} is {mine!r} for the target and {other!r} for the drafter; a drafter must share "
                f"the target's tokenizer, train one with `twotower-spec train all --verifier DIR`"
            )
    return shared


def _tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {token_id: token for token, token_id in tokenizer.get_vocab().items()}
