"""The road of a run as hand-written SVG: accepted stages in line, rejected ones branching off, tenants' adapters as leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_STEP, _TOP, _WIDTH, _HEIGHT = 158, 46, 128, 50
_LETTER = 6.5  # of a flag's text, on average
_MARKS = {"real_gain": "✓", "reward_hacking": "⚠", "idle_drift": "≈", "regression": "✗"}


def road_svg(base: str, stages: Sequence[Mapping[str, Any]], channels: Mapping[str, str]) -> str:
    """An SVG that scales with its column; colours come from the page's style sheet."""
    parts: list[str] = []
    x, last = 4.0, 4.0
    parts.append(_node(x, _TOP, "base", base, "base", ""))
    lowest, right = _TOP, 0.0
    for stage in stages:
        accepted, leaves = bool(stage.get("accepted")), "main" not in (stage.get("releases") or {})
        x += _STEP
        y = _TOP if accepted else _TOP + 92
        lowest = max(lowest, y)
        parts.append(_edge(last, x, y, accepted))
        mark = _MARKS.get(str(stage.get("verdict")), "")
        parts.append(
            _node(
                x,
                y,
                f"{mark} {stage['name']}",
                str(stage.get("verdict", "")).replace("_", " "),
                "ok" if accepted else "no",
                str(stage.get("kind")),
            )
        )
        if accepted:
            pointed = [name for name, release in channels.items() if release in (stage.get("releases") or {}).values()]
            if pointed:
                flag = "⚑ " + ", ".join(pointed)
                parts.append(_flag(x, y, flag))
                right = max(right, x + (_WIDTH + _LETTER * len(flag)) / 2)
        if accepted and not leaves:
            last = x
    width, height = max(right, x + _WIDTH) + 8, lowest + _HEIGHT + 14
    label = "the road from the base through all stages"
    return f'<svg class="road" viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _node(x: float, y: float, title: str, note: str, style: str, kind: str) -> str:
    short = note if len(note) <= 20 else note[:19] + "…"
    return (
        f'<g class="node {style}"><title>{escape(f"{title} {kind} {note}")}</title>'
        f'<rect x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="8"/>'
        f'<text x="{x + _WIDTH / 2}" y="{y + 21}" class="name">{escape(title)}</text>'
        f'<text x="{x + _WIDTH / 2}" y="{y + 38}" class="note">{escape(short)}</text></g>'
    )


def _edge(start: float, end: float, y: float, accepted: bool) -> str:
    x1, y1, y2 = start + _WIDTH, _TOP + _HEIGHT / 2, y + _HEIGHT / 2
    middle = end - 18
    path = f"M{x1},{y1} H{middle} V{y2} H{end}" if y2 != y1 else f"M{x1},{y1} H{end}"
    return f'<path class="edge {"ok" if accepted else "no"}" d="{path}"/>'


def _flag(x: float, y: float, text: str) -> str:
    return f'<text class="flag" x="{x + _WIDTH / 2}" y="{y - 12}">{escape(text)}</text>'
