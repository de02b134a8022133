"""Folder of a training, where every stage finds its inputs and leaves its result."""

from __future__ import annotations

import hashlib
import json
import platform
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerBase

from twotower_spec.checkpoint import load_tokenizer
from twotower_spec.config import TwoTowerConfig, read_config
from twotower_spec.errors import ArgumentError, first_line
from twotower_spec.files import make_folder, write_atomically
from twotower_spec.reading import STDIN, holds_json_lines, is_file, read_text
from twotower_spec.training.corpus import gsm8k_train, standard_library, training_documents, user_texts
from twotower_spec.training.corpus.arithmetic import arithmetic_documents
from twotower_spec.training.corpus.generated import version
from twotower_spec.training.loop import TrainingRun
from twotower_spec.training.recipe import Recipe, TrainingConfig
from twotower_spec.training.streams import Mixture, TokenStream
from twotower_spec.training.tokenizer import document_ids

VERIFIER_SAMPLES = "verifier"


class Workspace:
    """Folder of a training, with its recipe and texts.

    Args:
        directory: is created.
        recipe: what is trained.
        verifier: directory of a verifier of the user's own, whose tokenizer the towers then share; None for the
            recipe's.
        texts: files of the user's own text; the recipe's corpus is used where there are none.
    """

    def __init__(
        self, directory: Path, recipe: Recipe, verifier: Path | None = None, texts: Iterable[Path] = ()
    ) -> None:
        self.directory, self.recipe, self._verifier, self.texts = directory, recipe, verifier, list(texts)
        if verifier is not None and not is_file(verifier / "config.json"):
            raise ArgumentError(f"verifier {verifier} has no config.json; give the directory of a model")
        if verifier is not None:
            read_config(verifier)
        if verifier is None and recipe.verifier is None:
            raise ArgumentError("the recipe has no section [verifier]; add one, or give --verifier DIR")
        for path in self.texts:
            if not is_file(path):
                raise ArgumentError(f"text file {path} is not there; give files of UTF-8 text or JSON lines")
        deque(user_texts(self.texts), maxlen=0)  # whatever cannot be read is refused before anything is trained
        make_folder(directory)

    @property
    def verifier(self) -> Path:
        """Directory of the verifier, the user's or the recipe's."""
        return self._verifier or self.directory / "verifier"

    @property
    def brings_verifier(self) -> bool:
        """Whether the verifier is the user's own."""
        return self._verifier is not None

    def require(self, name: str, stage: str) -> Path:
        """Finds the directory of a finished stage.

        Raises:
            ArgumentError: the stage has not been run.
        """
        path = self.verifier if name == "verifier" else self.directory / name
        if not is_file(path / "config.json") and not is_file(path / "tokenizer.json"):
            raise ArgumentError(f"{path} is not there; run `twotower-spec train {stage}` first")
        return path

    @property
    def context(self) -> Path:
        """Directory of the context tower that the denoiser is trained on."""
        return (
            self.require("context-distilled", "distill") if self.recipe.distill else self.require("context", "context")
        )

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that all models share."""
        path = self.verifier if self.brings_verifier else self.require("tokenizer", "tokenizer")
        tokenizer = load_tokenizer(path)
        if tokenizer is None or tokenizer.eos_token_id is None:
            raise ArgumentError(f"{path} has no tokenizer with an end-of-sequence token; the towers must share one")
        return tokenizer

    def vocab_size(self) -> int:
        """Number of rows of the embedding tables: as in the user's verifier, or else one per token."""
        if self.brings_verifier:
            try:
                config = AutoConfig.from_pretrained(self.verifier, local_files_only=True, trust_remote_code=False)
                return int(config.get_text_config().vocab_size)
            except (OSError, ValueError, AttributeError) as error:
                reason = first_line(error)
                raise ArgumentError(f"config.json of verifier {self.verifier} cannot be read: {reason}") from error
        return len(self.tokenizer())

    def two_tower_config(self) -> TwoTowerConfig:
        """The towers' configuration for the shared tokenizer.

        A tokenizer without a mask token gets one row more than the verifier has; the mask token is never drafted.
        """
        tokenizer, vocab_size = self.tokenizer(), self.vocab_size()
        mask = tokenizer.mask_token_id
        if mask is None:
            mask, vocab_size = vocab_size, vocab_size + 1
        return self.recipe.two_tower_config(
            vocab_size=vocab_size,
            mask_token_id=mask,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )

    def sample_counts(self) -> dict[str, int]:
        """Number of beginnings of each source that the verifier continues."""
        assert self.recipe.distill is not None
        counts = dict(self.recipe.distill.sampling.documents)
        if self.texts:
            return {"text": sum(counts.values())}
        unknown = sorted(set(counts) - set(self.sources()))
        if unknown:
            raise ArgumentError(
                f"text source {unknown[0]!r} of distill.sampling is not there; there are {', '.join(self.sources())}"
            )
        return counts

    def sources(self) -> list[str]:
        """Names of the text sources, without the verifier's samples."""
        if self.texts:
            return ["text"]
        corpus = self.recipe.corpus
        present = {
            "maths": corpus.maths > 0,
            "python": corpus.python > 0,
            "arithmetic": corpus.arithmetic > 0,
            "gsm8k": corpus.gsm8k,
            "standard_library": corpus.standard_library,
        }
        return [name for name, there in present.items() if there]

    def documents(self, source: str) -> Iterator[str]:
        """The texts of a source."""
        if source == "text":
            return user_texts(self.texts)
        if source == "gsm8k":
            return gsm8k_train()
        if source == "standard_library":
            return (text for _, text in standard_library())
        count = getattr(self.recipe.corpus, source)
        if source == "arithmetic":
            return arithmetic_documents(count, self.recipe.seed)
        return (document.text for document in training_documents(source, count, self.recipe.seed))

    def stream(self, source: str) -> TokenStream:
        """The tokens of a source; made when first asked for.

        Raises:
            ArgumentError: the verifier has not been sampled yet.
        """
        place = self.stream_directory(source)
        if not TokenStream.is_saved(place):
            if source == VERIFIER_SAMPLES:
                raise ArgumentError(f"{place} is not there; run `twotower-spec train distill` first")
            ids = document_ids(self.tokenizer(), list(self.documents(source)))
            TokenStream.from_documents(ids).save(place)
        return TokenStream.load(place)

    def stream_directory(self, source: str) -> Path:
        """Directory of a source's tokens, named by a digest of what they are made from."""
        made_from: list[Any] = [self._tokenizer_digest(), self.recipe.seed, asdict(self.recipe.corpus), self._texts()]
        made_from += [version(), platform.python_version()]
        if source == VERIFIER_SAMPLES:
            assert self.recipe.distill is not None
            made_from += [asdict(self.recipe.distill.sampling), file_digests(self.verifier, "*.safetensors")]
        return self.directory / "corpus" / f"{source}-{fingerprint(made_from)}"

    def _tokenizer_digest(self) -> list[str]:
        path = self.verifier if self.brings_verifier else self.require("tokenizer", "tokenizer")
        return file_digests(path, "tokenizer*")

    def _texts(self) -> list[str]:
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in self.texts]

    def mixture(self, training: TrainingConfig, seed: int) -> Mixture:
        """The batches of a run."""
        weights = self.mixture_weights(training)
        streams = {name: self.stream(name) for name in weights}
        return Mixture(streams, weights, training.sequence_length, training.batch_size, seed)

    def mixture_weights(self, training: TrainingConfig) -> dict[str, float]:
        """Weight of every source of a run; the user's own text takes the place of the whole corpus.

        Raises:
            ArgumentError: the recipe names a source that the corpus does not have.
        """
        weights = dict(training.sources)
        if self.texts:
            samples = weights.pop(VERIFIER_SAMPLES, 0.0)
            return {"text": sum(weights.values())} | ({VERIFIER_SAMPLES: samples} if samples else {})
        allowed = [*self.sources(), *([VERIFIER_SAMPLES] if self.recipe.distill else [])]
        unknown = sorted(set(weights) - set(allowed))
        if unknown:
            raise ArgumentError(
                f"text source {unknown[0]!r} of the recipe is not there; there are {', '.join(allowed)}"
            )
        return weights

    def run(self, name: str, training: TrainingConfig, *inputs: Any) -> TrainingRun:
        """A training run in this folder.

        Args:
            name: of the run and its folder.
            training: its schedule.
            inputs: whatever else determines the result. A run is resumed only with the schedule, texts and inputs that
                it began with.
        """
        texts = [self.stream_directory(source).name for source in self.mixture_weights(training)]
        made_from = [asdict(training), self.recipe.seed, texts, *inputs]
        return TrainingRun(name, self.directory / "runs" / name, training, fingerprint(made_from))


def keep_standard_input(texts: Iterable[Path], directory: Path) -> list[Path]:
    """Files of text with standard input, `-`, among them as a file of the folder, which every stage can read.

    Raises:
        ArgumentError: it cannot be read, or not be written there.
    """
    return [_written(directory) if path == STDIN else path for path in texts]


def _written(directory: Path) -> Path:
    text = read_text(STDIN)
    path = directory / ("stdin.jsonl" if holds_json_lines(STDIN, text) else "stdin.txt")
    make_folder(directory)
    write_atomically(path, text, "--text")
    return path


def fingerprint(made_from: Sequence[Any]) -> str:
    """Twelve hexadecimal digits that change with any of the values."""
    return hashlib.sha256(json.dumps(made_from, default=str, sort_keys=True).encode()).hexdigest()[:12]


def file_digests(directory: Path, pattern: str) -> list[str]:
    """SHA-256 of the matching files of a directory, in order of their names."""
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.glob(pattern))]
