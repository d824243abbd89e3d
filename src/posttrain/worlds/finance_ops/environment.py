"""One private copy of a company for one episode: calls are checked against their schema, run over SQL, answered as compact JSON."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from functools import cache
from typing import Any

import jsonschema_rs

from posttrain.agents.world import ToolResult
from posttrain.errors import DataError
from posttrain.worlds.finance_ops import money, policies, tools
from posttrain.worlds.finance_ops.books import books
from posttrain.worlds.finance_ops.toolspecs import BY_NAME

WORLD = "finance_ops"


@cache
def _validator(name: str) -> Any:
    return jsonschema_rs.validator_for(dict(BY_NAME[name].parameters))


def compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _error(code: str, detail: str) -> ToolResult:
    return ToolResult(compact({"error": code, "detail": detail[:120]}), ok=False)


class FinanceEnvironment:
    """The live company. `tenant` decides which policies are searched; text found in data is returned, never acted on."""

    def __init__(self, split: str, seed: int, *, tenant: str | None = None, searcher: policies.Searcher | None = None) -> None:
        self._connection = books(split, seed).open()
        self._tenant = tenant
        self._searcher = searcher or policies.overlap_search

    def query(self, sql: str, parameters: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """Read-only rows, for verifiers. Raises DataError when the statement would write."""
        self._connection.execute("PRAGMA query_only = ON")
        try:
            return self._connection.execute(sql, parameters).fetchall()
        except sqlite3.Error as error:
            raise DataError(f"query failed: {error}", where=WORLD, value=sql, remedy="verifiers may only read") from error
        finally:
            self._connection.execute("PRAGMA query_only = OFF")

    def call(self, name: str, arguments: Mapping[str, Any], *, tenant: str | None = None) -> ToolResult:
        """Run one tool. Every failure is a ToolResult with ok=False; a failed call leaves the database as it was."""
        if name not in BY_NAME:
            return _error("unknown_tool", str(name))
        problem = next(iter(_validator(name).iter_errors(dict(arguments))), None)
        if problem is not None:
            return _error("bad_arguments", str(problem.message))
        try:
            if name == "search_policy":
                return ToolResult(compact(self._search(str(arguments["query"]), tenant or self._tenant)))
            with self._connection:  # commits, or rolls back when the tool raises
                found = dict(tools.HANDLERS[name](self._connection, arguments))
            if name == "propose_entry":
                found["approval"] = policies.approval_level(self._tenant, _amount(arguments))
            return ToolResult(compact(found))
        except tools.ToolError as error:
            return _error(error.code, str(error))
        except sqlite3.Error as error:
            return _error("database", str(error))

    def _search(self, query: str, tenant: str | None) -> dict[str, Any]:
        if tenant not in policies.TENANTS:
            raise tools.ToolError("unknown_tenant", "policies belong to a tenant")
        found = self._searcher(str(tenant), query)
        if not found:
            raise tools.ToolError("not_found", f"no rule about {query}")
        return {"id": found[0]["id"], "text": found[0]["text"]}

    def facts(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """What the permission guard must know about a call, read from the database and never from what the caller claims.

        Every key is always present: {amount_minor: int, approvals: int, has_token: bool, period_open: bool, known_request: bool}.
        """
        db, ref = self._connection, str(arguments.get("ref", ""))
        context = {
            "amount_minor": _amount(arguments),
            "approvals": 0,
            "has_token": False,
            "period_open": False,
            "known_request": False,
        }
        if name == "transfer_funds":
            context["approvals"] = tools.approvals(db, ref)
            context["known_request"] = db.execute("SELECT 1 FROM payment_requests WHERE ref = ?", (ref,)).fetchone() is not None
        if name == "post_entry":
            draft = db.execute("SELECT period, amount FROM drafts WHERE ref = ?", (ref,)).fetchone()
            context["has_token"] = tools.token_valid(db, ref, str(arguments.get("token", "")))
            context["period_open"] = draft is not None and tools.period_open(db, draft[0])
            context["amount_minor"] = draft[1] if draft else 0
        return context

    def close(self) -> None:
        self._connection.close()


def _amount(arguments: Mapping[str, Any]) -> int:
    try:
        return money.minor(str(arguments.get("amount", "0.00")))
    except DataError:
        return 0
