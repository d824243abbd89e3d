"""Results as files: DEVICE.json for programs, a table for people, a plot. Formats in benchmarks/README.md."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_PACKAGES = ("torch", "transformers", "peft", "trl", "llguidance")


def device() -> str:
    """A name for this machine: the accelerator's, else the processor's with its cores and what it multiplies bf16 with."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*:\s*(.+)", text)
    flags = next((flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f" {flag} " in text), "")
    return f"{model.group(1).strip() if model else platform.machine()}, {os.cpu_count()} cores, {flags}".rstrip(", ")


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("(r)", "")).strip("-")


def save(rows: list[Row], folder: Path, about: dict[str, str]) -> Path:
    """Write DEVICE.json, DEVICE.md and DEVICE.png. Rows of works measured earlier on the same device stay."""
    folder.mkdir(parents=True, exist_ok=True)
    name = device()
    path = folder / f"{slug(name)}.json"
    earlier = json.loads(path.read_text("utf-8"))["results"] if path.exists() else []
    again = {_what(row) for row in rows}
    merged = [row for row in earlier if _what(row) not in again] + rows
    versions = {package: _version(package) for package in _PACKAGES}
    whole = {"device": name, "python": platform.python_version(), "versions": versions, **about, "results": merged}
    path.write_text(json.dumps(whole, indent=1) + "\n", "utf-8")
    path.with_suffix(".md").write_text(f"# {name}\n\n{_about(whole)}\n\n{table(merged)}\n", "utf-8")
    plot(merged, name, path.with_suffix(".png"))
    return path


def _what(row: Row) -> tuple[str, str, str]:
    """What a row measures: one work may have several peers."""
    return str(row["work"]), str(row["metric"]), str(row["peer_name"])


def table(rows: list[Row]) -> str:
    """Markdown; a ratio above 1 means that posttrain is better."""
    lines = ["| work | beside | metric | posttrain | peer | ratio | min-max |", "|---|---|---|---:|---:|---:|---:|"]
    lines += [
        f"| {r['work']} | {r['peer_name']} | {r['metric']} | {r['ours']:,} | {r['peer']:,} | **{r['ratio']:.2f}** "
        f"| {r['ratio_min']:.2f}-{r['ratio_max']:.2f} |"
        for r in rows
    ]
    return "\n".join(lines)


def plot(rows: list[Row], title: str, path: Path) -> None:
    """Ratios as bars, with their range over the rounds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [f"{r['work']}\n{r['peer_name']}: {r['metric']}" for r in rows]
    ratios = [r["ratio"] for r in rows]
    spread = [[r["ratio"] - r["ratio_min"] for r in rows], [r["ratio_max"] - r["ratio"] for r in rows]]
    figure, axes = pyplot.subplots(figsize=(9, 0.5 * len(rows) + 1.2))
    colours = ["#2a6f97" if r["metric"] != "peak MiB" else "#a9b4c2" for r in rows]
    axes.barh(range(len(rows)), ratios, xerr=spread, color=colours, error_kw={"lw": 1})
    axes.axvline(1, color="black", lw=0.8)
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("ratio, above 1: posttrain is better")
    axes.set_title(title, fontsize=9)
    axes.margins(y=0.01)
    figure.savefig(path, dpi=110, bbox_inches="tight")  # whatever the labels' length
    pyplot.close(figure)


def _about(whole: Row) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in whole["versions"].items() if version)
    return f"{whole['base']}, {whole['dtype']}, Python {whole['python']}, {versions}."


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
