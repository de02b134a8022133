"""The command line as files and reports keep it: without keys, tokens and passwords."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

HIDDEN = "HIDDEN"  # a word that no shell needs quotes for

# Names of what nobody else may know: --api-key, hf_token, HF_TOKEN, password; not --token-ids or --max-new-tokens.
_SECRET_NAME = re.compile(
    r"""(?ix)
    (^|[-_.]) (api|access|private|secret|auth|bearer|session|refresh|encryption|hf|hub) [-_]? (key|token)s?$
    | ^-*(key|token)$ | pass(word|wd|phrase) | secret | credential | authorization | (^|[-_])cookie
    | (?-i: ^[A-Z0-9_]*(TOKEN|KEY)$ )"""
)
# Secrets that show by themselves, wherever they stand: in URLs, headers, and tokens of well-known forms.
_SECRET_VALUE = re.compile(
    r"""(?x)
    (?<=://) [^/\s@]+ (?=@)
    | (?i: (?<=bearer\ ) [^\s"',]+ )
    | \b (hf|api_org)_[A-Za-z0-9]{8,}
    | \b sk-[A-Za-z0-9_-]{8,}
    | \b gh[pousr]_[A-Za-z0-9]{8,}
    | (?<=[?&]) (?i: (api_?key|key|token|password|secret|access_token) = ) [^&\s"']+"""
)


def recorded_command(program: str = "twotower-spec") -> str:
    """Command line of this process as one would type it, secrets hidden."""
    return shlex.join([program, *without_secrets(sys.argv[1:])])


def recorded_text(command: str) -> str:
    """Hides the secrets of a command line that was recorded as text, by whatever version."""
    words = _split(command)
    hidden = without_secrets(words)
    return command if hidden == words else shlex.join(hidden)


def without_secrets(words: Sequence[str]) -> list[str]:
    """Hides the values of secret options, and secrets in arguments that are themselves JSON or a command line."""
    return list(_words(words))


def without_secret_values(value: Any) -> Any:
    """Hides secrets in what JSON holds: the values of secret names, and texts that show by themselves."""
    if isinstance(value, Mapping):
        return {k: HIDDEN if _SECRET_NAME.search(k) and v else without_secret_values(v) for k, v in value.items()}
    if isinstance(value, list):
        return [without_secret_values(one) for one in value]
    return _SECRET_VALUE.sub(HIDDEN, value) if isinstance(value, str) else value


def _words(words: Sequence[str]) -> Iterator[str]:
    is_secret = False  # all values up to the next option: --api-key takes several
    for word in words:
        assigned = re.match(r"(-*[\w.-]+=)+", word)
        if assigned:
            names, value = assigned[0].split("="), word[assigned.end() :]
            is_secret = False
            yield assigned[0] + (HIDDEN if any(map(_is_secret, names)) else _word(value))
        elif re.fullmatch(r"-+[\w.-]+", word):
            is_secret = _is_secret(word)
            yield word
        else:
            yield HIDDEN if is_secret else _word(word)


def _word(word: str) -> str:
    try:
        value = json.loads(word) if word.startswith(("{", "[")) else None
        hidden = without_secret_values(value)
    except (ValueError, RecursionError):
        value = hidden = None
    if hidden != value:
        return json.dumps(hidden)
    if re.search(r"(^|\s)-+\w", word) and _split(word) != [word]:
        return recorded_text(word)
    return _SECRET_VALUE.sub(HIDDEN, word)


def _is_secret(name: str) -> bool:
    return _SECRET_NAME.search(name) is not None


def _split(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:  # no quote to the quote
        return command.split()
