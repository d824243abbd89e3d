"""Text comparisons of data bootstrapping: ROUGE-L against near-duplicates, and call matching on syntax trees.

Sources: Wang et al. 2022, section 2 (Self-Instruct); Patil et al. 2023, section 3 (Gorilla), ShishirPatil/gorilla ast_eval_hf.py.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class RougeL:
    """Length of the longest common subsequence, precision over the existing text, recall over the new one, and their F1."""

    lcs: int
    precision: float
    recall: float
    f1: float


def rouge_l(new: Sequence[Hashable], existing: Sequence[Hashable]) -> RougeL:
    """l = LCS(new, existing), P = l/|existing|, R = l/|new|, F1 = 2PR/(P+R); all 0 for an empty side. Keep new iff F1 < 0.7.

    Tokens are the caller's: words, or characters for Chinese, whose words a [a-z0-9] tokeniser would drop altogether.
    """
    lcs = _lcs(new, existing)
    if lcs == 0:
        return RougeL(0, 0.0, 0.0, 0.0)
    precision, recall = lcs / len(existing), lcs / len(new)
    return RougeL(lcs, precision, recall, 2 * precision * recall / (precision + recall))


def _lcs(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


class CallMatch(StrEnum):
    """How a predicted call compares with a reference call."""

    MATCH = "match"
    """Same function, and every argument of the reference with the same value."""
    MISMATCH = "mismatch"
    """An existing function, but another one, or an argument is missing or differs."""
    HALLUCINATION = "hallucination"
    """A function that is not in the list."""
    UNPARSABLE = "unparsable"
    """Not one call expression."""


def match_call(predicted: str, reference: str, functions: Collection[str]) -> CallMatch:
    """Compare two calls as syntax trees: keyword order is irrelevant, extra arguments are allowed, 5 is not 15 and 100 not 100.0."""
    call, expected = _parse_call(predicted), _parse_call(reference)
    assert expected is not None, f"the reference is not a call: {reference!r}"
    if call is None:
        return CallMatch.UNPARSABLE
    if ast.unparse(call.func) not in functions:
        return CallMatch.HALLUCINATION
    same = ast.unparse(call.func) == ast.unparse(expected.func) and len(call.args) >= len(expected.args)
    same = same and all(ast.dump(got) == ast.dump(want) for got, want in zip(call.args, expected.args, strict=False))
    named = {keyword.arg: ast.dump(keyword.value) for keyword in call.keywords}
    same = same and all(named.get(keyword.arg) == ast.dump(keyword.value) for keyword in expected.keywords)
    return CallMatch.MATCH if same else CallMatch.MISMATCH


def _parse_call(text: str) -> ast.Call | None:
    try:
        body = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return body if isinstance(body, ast.Call) else None
