"""Whether two models mean the same tokens: compared by content, not by size."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from twotower_spec.errors import ArgumentError


@dataclass(frozen=True)
class TokenDifference:
    """One id that stands for two tokens."""

    token_id: int
    target: str
    drafter: str


@dataclass(frozen=True)
class VocabularyComparison:
    """Meanings of the ids of two models, side by side.

    Attributes:
        num_shared_ids: ids, from 0 on, that both embedding tables hold.
        num_compared: those of them that both tokenizers give a token.
        differences: those of them that mean another token, in their order.
    """

    num_shared_ids: int
    num_compared: int
    differences: tuple[TokenDifference, ...]


def compare_vocabularies(
    target: PreTrainedTokenizerBase, drafter: PreTrainedTokenizerBase, target_rows: int, drafter_rows: int
) -> VocabularyComparison:
    """Compares every id that both models have by the token it stands for.

    Either embedding table may be padded beyond the other, so only ids that both tokenizers name are compared. A token
    that the target has and the drafter lacks is no difference: a request that uses it goes on without drafts. Special
    tokens are compared as all others; which of them begins or ends a text is the target's affair.

    Args:
        target, drafter: tokenizers.
        target_rows, drafter_rows: rows of the embedding tables.
    """
    shared = min(target_rows, drafter_rows)
    ours, theirs = _tokens(target), _tokens(drafter)
    compared = [i for i in range(shared) if i in ours and i in theirs]
    differences = tuple(TokenDifference(i, ours[i], theirs[i]) for i in compared if ours[i] != theirs[i])
    return VocabularyComparison(shared, len(compared), differences)


def shared_token_ids(
    target: PreTrainedTokenizerBase, drafter: PreTrainedTokenizerBase, target_rows: int, drafter_rows: int
) -> int:
    """Counts the ids, from 0 on, that both models have; ids beyond are never drafted.

    Args:
        target, drafter: tokenizers, compared by `compare_vocabularies`.
        target_rows, drafter_rows: rows of the embedding tables.

    Raises:
        ArgumentError: an id means different tokens; the first one is named.
    """
    comparison = compare_vocabularies(target, drafter, target_rows, drafter_rows)
    for first in comparison.differences:
        raise ArgumentError(
            f"token id {first.token_id} is {first.target!r} for the target and {first.drafter!r} for the drafter; a "
            f"drafter must share the target's tokenizer, train one with `twotower-spec train all --verifier DIR`"
        )
    return comparison.num_shared_ids


def _tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {token_id: token for token, token_id in tokenizer.get_vocab().items()}
