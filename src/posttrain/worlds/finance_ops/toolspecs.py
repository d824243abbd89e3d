"""The eight tools as the model sees them: few short properties, enums where the choice is closed, money as decimal strings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.data.records import ToolSpec
from posttrain.worlds.finance_ops.chart import BANK
from posttrain.worlds.finance_ops.differences import NO_ACCOUNT, Kind
from posttrain.worlds.finance_ops.money import AMOUNT_PATTERN

# The prefix of a document's reference names its table.
PREFIXES = {
    "INV": "receivables",
    "BILL": "payables",
    "PO": "purchase_orders",
    "JE": "journal",
    "BNK": "bank_lines",
    "PAY": "payment_requests",
}
SIDES = ("receivables", "payables")
ROLES = {"receivables": "customer", "payables": "vendor", "purchase_orders": "vendor"}  # what a party is to a table
DRAFT = "DRAFT"  # of entries that are proposed and not posted
TABLES = tuple(PREFIXES.values())
READ_TOOLS = ("query_erp", "cash_position", "ageing", "budget_status", "search_policy")
RISKY_TOOLS = ("post_entry", "transfer_funds")

# Grounded: names, references, tokens, accounts, amounts and periods must have been seen in the conversation (grammar/evidence.py), and
# what releases money or a posting must have been said by the user: a request that the books hold approved is no order to pay it.
_TEXT = {"type": "string", "minLength": 1, "maxLength": 60, "x-grounded": True}
_PERIOD = {"type": "string", "pattern": r"^20[0-9]{2}-(0[1-9]|1[0-2])$", "x-grounded": True}
_AMOUNT = {"type": "string", "pattern": AMOUNT_PATTERN.replace("-?", ""), "x-grounded": ["0.00"]}
_PAID = {**_AMOUNT, "x-grounded": "user"}
_PAYEE = {**_TEXT, "x-grounded": "user"}
_TOKEN = {"type": "string", "pattern": r"^APT-[0-9]{4}[A-Z]$", "x-grounded": "user"}
_ACCOUNT = {"type": "string", "pattern": r"^([0-9]{4}|none)$", "x-grounded": [NO_ACCOUNT]}


def _ref(*prefixes: str) -> dict[str, Any]:
    """A reference of these kinds, of any kind without one: a draft is not in the documents, only a payment request can be paid."""
    kinds = f"({'|'.join(prefixes)})" if prefixes else "[A-Z]{2,5}"
    return {"type": "string", "pattern": f"^{kinds}-[0-9]{{3,6}}$", "x-grounded": True}


def _one_of(*values: str) -> dict[str, Any]:
    return {"type": "string", "enum": list(values)}


def _tool(name: str, description: str, properties: Mapping[str, Any], optional: tuple[str, ...] = ()) -> ToolSpec:
    required = [key for key in properties if key not in optional]
    schema = {"type": "object", "properties": dict(properties), "required": required, "additionalProperties": False}
    return ToolSpec(name, description, schema)


TOOLS: tuple[ToolSpec, ...] = (
    _tool(
        "query_erp",
        "documents and journals",
        # what narrows it down first: after the table, a small model closes the call without the party or the period
        {"ref": _ref(*PREFIXES), "party": _TEXT, "period": _PERIOD, "table": _one_of(*TABLES)},
        ("ref", "party", "period"),
    ),
    _tool("cash_position", "bank balance", {"account": _one_of(*BANK)}),
    _tool("ageing", "overdue amounts", {"party": _TEXT, "side": _one_of(*SIDES)}, ("party",)),
    _tool("budget_status", "budget use", {"cost_centre": _TEXT, "period": _PERIOD}),
    _tool("search_policy", "find a rule", {"query": _TEXT}),
    _tool(
        "propose_entry",
        "correct on trial",
        # the kind last: it follows from the accounts, and what is written first is decided first
        {"ref": _ref(), "debit": _ACCOUNT, "credit": _ACCOUNT, "amount": _AMOUNT, "kind": _one_of(*Kind)},
    ),
    _tool("post_entry", "post a proposal", {"ref": _ref(DRAFT), "token": _TOKEN}),
    _tool("transfer_funds", "pay an approved request", {"ref": _ref("PAY"), "to": _PAYEE, "amount": _PAID}),
)

BY_NAME: Mapping[str, ToolSpec] = {tool.name: tool for tool in TOOLS}
