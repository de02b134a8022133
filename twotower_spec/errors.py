"""The exceptions callers may catch. Each message is one sentence: value received, what is allowed, remedy."""

from twotower_spec.printable import as_message


class TwoTowerError(Exception):
    """Base class of everything this library raises on purpose.

    Values in messages come from anywhere, so every message is bounded and free of control characters.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(as_message(message))


class ConfigError(TwoTowerError, ValueError):
    """A model configuration is missing, contradicts itself, or asks for what is not supported."""


class CheckpointError(TwoTowerError):
    """A checkpoint cannot be found, read, matched with its configuration, or written."""


class ArgumentError(TwoTowerError, ValueError):
    """An argument of a public function or of the command line is outside what is allowed."""


class FileError(ArgumentError):
    """A file that a user brings cannot be read, or a line of it is not what it must be."""


class StateFullError(TwoTowerError):
    """A state pool has no free slot or not enough free KV pages for what was asked."""


class TrainingError(TwoTowerError):
    """Training cannot go on: the loss is no longer finite, or its checkpoint cannot be written."""


def first_line(error: BaseException) -> str:
    """The first line of what an error of another library says; its type where it says nothing."""
    return (str(error).strip() or repr(error)).splitlines()[0]
