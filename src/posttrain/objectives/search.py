"""Search over trees of steps, as pure arithmetic: depth-first with a budget, and the values and scores of ReST-MCTS*.

Sources: Qin et al. 2023, section 3 (DFSDT), OpenBMB/ToolBench DFS.py; Zhang et al. 2024, section 3, THUDM/ReST-MCTS mcts.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from posttrain.errors import DataError


class NodeKind(StrEnum):
    """What a node of a call tree is."""

    THINK = "think"
    """A step that may have children."""
    ANSWER = "answer"
    """A final answer: the search stops."""
    GIVE_UP = "give_up"
    """The model gave up on this branch."""
    ERROR = "error"
    """A call failed."""


@dataclass(frozen=True, slots=True)
class CallNode:
    """One node: what it is and the names of its children in the order they were proposed."""

    kind: NodeKind
    children: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TreeWalk:
    """Nodes in the order visited, and the answer found (None when the budget or the tree ran out first)."""

    visited: tuple[str, ...]
    answer: str | None


def depth_first(tree: Mapping[str, CallNode], root: str, max_nodes: int, max_depth: int) -> TreeWalk:
    """DFSDT: pre-order without ranking children, backtracking on failure, until the first answer or `max_nodes` visits.

    The root has depth 0; a node at `max_depth` is visited but not expanded. Raises DataError for a child that is not in the tree.
    """
    visited: list[str] = []
    stack = [(root, 0)]
    while stack and len(visited) < max_nodes:
        name, depth = stack.pop()
        node = _node(tree, name)
        visited.append(name)
        if node.kind is NodeKind.ANSWER:
            return TreeWalk(tuple(visited), name)
        if node.kind is NodeKind.THINK and depth < max_depth:
            stack += [(child, depth + 1) for child in reversed(node.children)]
    return TreeWalk(tuple(visited), None)


def greedy_chain(tree: Mapping[str, CallNode], root: str, max_depth: int) -> TreeWalk:
    """A single chain (ReAct): always the first child, no way back."""
    visited, node = [root], _node(tree, root)
    while node.kind is NodeKind.THINK and node.children and len(visited) <= max_depth:
        visited.append(node.children[0])
        node = _node(tree, visited[-1])
    return TreeWalk(tuple(visited), visited[-1] if node.kind is NodeKind.ANSWER else None)


def quality_values(steps: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """ReST-MCTS* (weights w, values v) of steps (m, e): v_k = max(v_{k-1} + w_k, 0), w_k = (1 - v_{k-1})/(m_k + 1) (1 - 2 e_k).

    m = steps still needed after this one, e = 1 for a wrong step. v lies in [0, 1] and is 1 at a right last step.
    """
    weights: list[float] = []
    values: list[float] = []
    value = 0.0
    for remaining, error in steps:
        weights.append((1 - value) / (remaining + 1) * (1 - 2 * error))
        value = max(value + weights[-1], 0.0)
        values.append(value)
    return weights, values


def uct_scores(
    children: Sequence[tuple[float, int]], parent_visits: int, c: float = 0.7, unvisited_bonus: float = 1.0
) -> list[float]:
    """V + c sqrt(2 ln N_parent / n) per child (V, n); V + unvisited_bonus for n = 0. The first largest is picked."""
    return [
        value + (c * math.sqrt(2 * math.log(parent_visits) / visits) if visits > 0 else unvisited_bonus)
        for value, visits in children
    ]


def backed_up_value(children: Sequence[tuple[float, int]]) -> float:
    """V_parent = sum n V / sum n over children (V, n); 0 without visits."""
    visits = sum(count for _, count in children)
    return sum(value * count for value, count in children) / visits if visits else 0.0


def blended_value(value: float, rollout_best: float, alpha: float = 0.5) -> float:
    """(1 - alpha) V + alpha times the best value of a short greedy roll-out."""
    return (1 - alpha) * value + alpha * rollout_best


def _node(tree: Mapping[str, CallNode], name: str) -> CallNode:
    if name not in tree:
        raise DataError("a child is not in the tree", where="call tree", value=name, remedy=f"nodes: {', '.join(tree)}")
    return tree[name]
