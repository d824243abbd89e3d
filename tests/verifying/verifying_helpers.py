"""A call written by hand, and a world of one table."""

from __future__ import annotations

import json
import sqlite3
from typing import Any

from posttrain.data import ToolCall


def call(name: str, **arguments: Any) -> ToolCall:
    return ToolCall("call_0", name, json.dumps(arguments))


class Ledger:
    """A world of one table."""

    def __init__(self) -> None:
        self.connection = sqlite3.connect(":memory:")
        self.connection.execute("CREATE TABLE entries (account TEXT, amount TEXT)")

    def query(self, sql: str, parameters: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        return self.connection.execute(sql, parameters).fetchall()

    def post(self, *rows: tuple[str, str]) -> Ledger:
        self.connection.executemany("INSERT INTO entries VALUES (?, ?)", rows)
        return self
