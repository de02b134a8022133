"""Corpus that the bundled trio is trained on."""

from twotower_spec.training.corpus.generated import HeldOut, training_documents
from twotower_spec.training.corpus.real_text import gsm8k_train, standard_library, user_texts
from twotower_spec.training.corpus.slots import Document

__all__ = [
    "Document",
    "HeldOut",
    "gsm8k_train",
    "standard_library",
    "training_documents",
    "user_texts",
]
