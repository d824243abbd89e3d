"""Figures as inline SVG by matplotlib: training curves and where the time went. Okabe-Ito colours, readable on light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

_PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_SHOWN = ("loss", "reward", "pass_share", "accuracy", "margin", "drift", "kl_sum", "state_distance", "grad_norm")
_PARTS = ("load", "train", "sample", "evaluate", "release")
_INK = "#7a7a7a"


def curves(name: str, lines: Sequence[Mapping[str, Any]]) -> str:
    """Small multiples over the steps of one stage, one panel per metric, one line per phase. '' when nothing was logged."""
    rows = [line for line in lines if int(line.get("step", -1)) >= 0]
    metrics = [metric for metric in _SHOWN if sum(isinstance(line.get(metric), int | float) for line in rows) >= 2]
    if not metrics:
        return ""
    metrics = metrics[:4]
    figure = Figure(figsize=(2.7 * len(metrics), 1.9), layout="constrained")
    for index, metric in enumerate(metrics):
        axes = figure.add_subplot(1, len(metrics), index + 1)
        for colour, phase in zip(_PALETTE, sorted({str(line.get("phase")) for line in rows}), strict=False):
            points = {  # a resumed run logs a repeated step twice: the later line holds
                line["step"] + 1: line[metric]
                for line in rows
                if str(line.get("phase")) == phase and isinstance(line.get(metric), int | float)
            }
            if points:
                axes.plot(
                    *zip(*sorted(points.items()), strict=True),
                    color=colour,
                    linewidth=1.6,
                    label=phase,
                    marker="o" if len(points) < 12 else None,
                    markersize=3,
                )
        axes.set_title(metric, fontsize=9, color=_INK)
        _quiet(axes)
    if len({str(line.get("phase")) for line in rows}) > 1:
        figure.legend(
            *figure.axes[0].get_legend_handles_labels(),
            loc="outside lower center",
            ncols=4,
            fontsize=7,
            frameon=False,
            labelcolor=_INK,
        )
    return _svg(figure, f"c-{name}")


def time_bars(stages: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """Stacked horizontal bars: seconds by part of each stage."""
    if not stages:
        return ""
    figure = Figure(figsize=(8.2, 0.36 * len(stages) + 0.9), layout="constrained")
    axes = figure.add_subplot()
    left = [0.0] * len(stages)
    for colour, part in zip(_PALETTE, _PARTS, strict=False):
        widths = [float(parts.get(part, 0.0)) for _, parts in stages]
        if any(widths):
            axes.barh(range(len(stages)), widths, left=left, color=colour, label=part, height=0.62)
            left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(stages)), [name for name, _ in stages])
    axes.invert_yaxis()
    axes.set_xlabel("seconds", fontsize=8, color=_INK)
    _quiet(axes)
    figure.legend(loc="outside upper center", ncols=5, fontsize=8, frameon=False, labelcolor=_INK)
    return _svg(figure, "time")


def _quiet(axes: Any) -> None:
    axes.patch.set_alpha(0)
    axes.tick_params(labelsize=7, colors=_INK, length=2)
    axes.grid(alpha=0.25, linewidth=0.5)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_INK)


def _svg(figure: Figure, prefix: str) -> str:
    """The figure as an <svg> whose ids are its own: pages hold several, and matplotlib names their parts alike."""
    figure.patch.set_alpha(0)
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    safe = re.sub(r"[^a-zA-Z0-9-]", "-", prefix)
    text = re.sub(r'id="([^"]+)"', rf'id="{safe}-\1"', text)
    return re.sub(r'(url\(|href=")#', rf"\1#{safe}-", text)
