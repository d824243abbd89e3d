"""One exception tree. Every message says what failed, where, with which value, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def nearest(name: str, known: Iterable[str], *, most: int = 1, cutoff: float = 0.6) -> str:
    """The remedy for a misspelt name: `did you mean a or b?`, at most so many of the known ones; empty where none is near.
    cutoff: how alike names must be, as difflib measures it, from 0 to 1."""
    near = difflib.get_close_matches(name, list(known), n=most, cutoff=cutoff)
    return f"did you mean {' or '.join(near)}?" if near else ""


def nearest_of(name: str, known: Sequence[str], kind: str = "known") -> str:
    """`nearest`, and all the names there are."""
    return f"{nearest(name, known)} {kind}: {', '.join(known)}".lstrip()


class PosttrainError(Exception):
    """Base of everything posttrain raises on purpose.

    A message is built from four parts so that none is forgotten: `what` happened, `where` (file, row, key, release),
    `value` as it was found, and the `remedy`. The parts stay readable as attributes for programs.
    """

    def __init__(self, what: str, *, where: str | None = None, value: object = None, remedy: str | None = None) -> None:
        self.what, self.where, self.value, self.remedy = what, where, value, remedy
        parts = [what if where is None else f"{where}: {what}"]
        if value is not None:
            shown = repr(value)
            parts.append(f"got {shown if len(shown) <= 200 else shown[:197] + '...'}")
        if remedy is not None:
            parts.append(remedy)
        super().__init__("; ".join(parts))


class DataError(PosttrainError, ValueError):
    """A record, a pair, a task or a file of them is malformed."""


class RecipeError(PosttrainError, ValueError):
    """The recipe names an unknown key, a wrong type, or a combination that cannot run."""


class ContractError(PosttrainError, ValueError):
    """A template, tokenizer or lock does not match what the artifact was made with."""


class PreflightError(PosttrainError, ValueError):
    """Data and contract are each valid, but training on them would be wrong (nothing to learn, too long)."""


class GrammarError(PosttrainError, ValueError):
    """A schema or grammar cannot be compiled or cannot be enforced."""


class BaseModelError(PosttrainError, FileNotFoundError):
    """The base model named in a recipe or release cannot be found or is not what was expected."""


class TrainingError(PosttrainError, ArithmeticError):
    """Training diverged: a step's gradients are no finite numbers."""


class CheckpointError(PosttrainError, RuntimeError):
    """A checkpoint is missing a part, was made by another run, or was altered."""


class StorageError(PosttrainError, OSError):
    """The disk is full, the folder is not writable, or a file vanished while it was used."""


class IntegrityError(PosttrainError, RuntimeError):
    """An artifact's bytes do not match its manifest: altered, truncated or swapped."""


class BindingError(PosttrainError, ValueError):
    """An adapter is asked to run on a parent other than the exact one it was trained on."""


class GateError(PosttrainError, RuntimeError):
    """A release was asked to be promoted without a passed verdict and without a recorded override."""


class RegistryError(PosttrainError, KeyError):
    """An unknown release or channel."""

    __str__ = Exception.__str__  # KeyError would show repr(message)


class PermissionDenied(PosttrainError, PermissionError):
    """A tenant, a user or a tool call lies outside what its policy permits."""


class SamplerError(PosttrainError, RuntimeError):
    """A sampling server cannot be reached, is late, or answered what was not asked."""


class VerifierError(PosttrainError, RuntimeError):
    """A verifier could not judge. The episode is then unscored, never passed."""
