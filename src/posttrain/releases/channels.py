"""Channels: names that point at releases. The history is the truth; the pointers are read out of it.

A move is one appended, hash-chained line, so it happened or it did not. `channels.json` is written after it, for people and to
notice a history that was cut off at its end; a crash between the two leaves a longer history, which is right.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from posttrain.errors import IntegrityError, RegistryError
from posttrain.files.atomic import exclusive, write_json
from posttrain.files.chainlog import ChainLog, Head
from posttrain.releases.artifact import Release
from posttrain.releases.manifest import read_json
from posttrain.releases.registry import Registry, unknown

HISTORY, VIEW, _LOCK = "channels.history.jsonl", "channels.json", "channels.lock"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")


class Action(StrEnum):
    """What moved a channel."""

    PROMOTE = "promote"  # to a release somebody chose
    ROLLBACK = "rollback"  # to the release that was accepted before


@dataclass(frozen=True, slots=True)
class Move:
    """One line of the history: which channel moved from what to what, by whom, why and when (UTC)."""

    channel: str
    action: Action
    release: str
    previous: str | None
    by: str
    why: str
    at: str


class Channels:
    """The channels of one registry. Every method may be called from several processes at once."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self._log = ChainLog(registry.root / HISTORY)
        self._seen: tuple[tuple[int, int, int], tuple[Move, ...]] | None = None

    # -- moving --------------------------------------------------------------------------------------------------------

    def promote(self, channel: str, release: str, by: str, why: str) -> Move:
        """Point `channel` at a release of the registry. Pointing it where it already points changes nothing.

        Raises GateError for what no gate passed and nobody overrode, RegistryError for an unknown id, IntegrityError for
        altered files.
        """
        _check_move(channel, by, why)
        target = self.registry.get(release)
        with exclusive(self.registry.root / _LOCK):
            moves = self._moves()
            previous = _stacks(moves).get(channel, [None])[-1]
            if previous == target.id:
                return next(move for move in reversed(moves) if move.channel == channel)
            return self._append(Action.PROMOTE, channel, target.id, previous, (by, why))

    def rollback(self, channel: str, by: str, why: str) -> Move:
        """Point `channel` back at the release accepted before the present one; a second rollback goes one further.

        Raises RegistryError when there is none, IntegrityError when it was altered since: the channel then stays where it is.
        """
        return self.roll_back_together([channel], by, why)[0]

    def roll_back_together(self, channels: Sequence[str], by: str, why: str) -> list[Move]:
        """`rollback` of several channels, all of which are checked before one is moved: adapters go back with the base they belong to."""
        for channel in channels:
            _check_move(channel, by, why)
        with exclusive(self.registry.root / _LOCK):
            stacks = _stacks(self._moves())
            targets = {channel: self._before(channel, stacks) for channel in dict.fromkeys(channels)}
            return [
                self._append(Action.ROLLBACK, channel, target.id, stacks[channel][-1], (by, why))
                for channel, target in targets.items()
            ]

    def _before(self, channel: str, stacks: Mapping[str, list[str]]) -> Release:
        """The release accepted before the present one, verified."""
        stack = stacks.get(channel)
        if stack is None:
            raise unknown("channel", channel, list(stacks))
        if len(stack) < 2:
            raise RegistryError(
                "there is no earlier release to go back to",
                where=f"channel {channel}",
                value=stack[-1],
                remedy="promote another release instead",
            )
        return self.registry.get(stack[-2])

    # -- reading -------------------------------------------------------------------------------------------------------

    def current(self, channel: str) -> str:
        """Id of the release the channel points at. Raises RegistryError with the nearest names."""
        pointers = self.pointers()
        if channel not in pointers:
            raise unknown("channel", channel, pointers)
        return pointers[channel]

    def release(self, channel: str) -> Release:
        """The release the channel points at, verified."""
        return self.registry.get(self.current(channel))

    def pointers(self) -> Mapping[str, str]:
        """Every channel's release id."""
        return {channel: stack[-1] for channel, stack in _stacks(self._moves()).items()}

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.pointers()))

    def history(self, channel: str | None = None) -> tuple[Move, ...]:
        """All moves, oldest first, of one channel or of all. Raises IntegrityError when a line was altered or the end cut off."""
        return tuple(move for move in self._moves() if channel in (None, move.channel))

    def serving(self, release_id: str) -> tuple[str, ...]:
        """The channels that point at a release."""
        return tuple(sorted(channel for channel, current in self.pointers().items() if current == release_id))

    # -- the history ---------------------------------------------------------------------------------------------------

    def _moves(self) -> tuple[Move, ...]:
        """The verified history; read again only when the file changed."""
        path = self.registry.root / HISTORY
        stamp = _stamp(path)
        if self._seen is not None and stamp == self._seen[0]:
            return self._seen[1]
        view = self.registry.root / VIEW
        head = _head(view) if view.exists() else None  # before the log: a mover writes the log first
        self._log.verify(head)
        moves = tuple(_move(entry, str(path)) for entry in self._log)
        self._seen = (stamp, moves)
        return moves

    def _append(self, action: Action, channel: str, release: str, previous: str | None, said: tuple[str, str]) -> Move:
        by, why = said
        entry = self._log.append(
            {"channel": channel, "action": action.value, "release": release, "previous_release": previous, "by": by, "why": why}
        )
        latest = {
            move.channel: {"release": move.release, "by": move.by, "why": move.why, "at": move.at} for move in self._moves()
        }
        write_json(self.registry.root / VIEW, {"channels": latest, "head": {"lines": entry["seq"] + 1, "hash": entry["hash"]}})
        return _move(entry, str(self._log.path))


def _stacks(moves: tuple[Move, ...]) -> dict[str, list[str]]:
    """Each channel's accepted releases, the present one last: a promotion pushes, a rollback pops."""
    stacks: dict[str, list[str]] = {}
    for move in moves:
        stack = stacks.setdefault(move.channel, [])
        if move.action is Action.PROMOTE:
            stack.append(move.release)
        else:
            stack.pop()
    return stacks


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return (0, 0, 0)
    return (stat.st_ino, stat.st_mtime_ns, stat.st_size)


def _move(entry: Mapping[str, Any], where: str) -> Move:
    try:
        return Move(
            entry["channel"],
            Action(entry["action"]),
            entry["release"],
            entry["previous_release"],
            entry["by"],
            entry["why"],
            entry["time"],
        )
    except (KeyError, ValueError) as error:
        raise IntegrityError(
            f"a line is not a channel move ({error})", where=where, remedy="restore the file from a backup"
        ) from error


def _head(view: Path) -> Head:
    try:
        head = read_json(view)["head"]
        return Head(int(head["lines"]), str(head["hash"]))
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(
            f"the record of the history's end cannot be read ({error})",
            where=str(view),
            remedy=f"restore it from a backup; or, if you trust {HISTORY}, delete it",
        ) from error


def check_channel_name(channel: str) -> None:
    """Raises RegistryError for what no channel can be called."""
    if not _NAME.fullmatch(channel):
        raise RegistryError(
            "not a channel name", where="channel", value=channel, remedy="letters, digits and . _ / - only, at most 128"
        )


def _check_move(channel: str, by: str, why: str) -> None:
    check_channel_name(channel)
    for name, value in (("by", by), ("why", why)):
        if not value.strip():
            raise RegistryError(
                f"a move needs `{name}`", where=f"channel {channel}", remedy="say who moves it and why: it is kept in the history"
            )
