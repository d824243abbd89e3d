"""One self-contained HTML page per run: the road, the evidence, the way back. For the engineer who must sign."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from posttrain.errors import DataError
from posttrain.files.atomic import write_text
from posttrain.files.chainlog import RESERVED
from posttrain.reporting import curves, road_svg, time_bars

_NUMBERS = {"sft": "1", "adapters": "2", "preference": "3", "tools": "4", "reason": "5", "distill": "6"}
_LEVERS = {
    "sft": "Supervised fine-tuning on four shapes of records; loss only on what the assistant writes.",
    "adapters": "One small adapter per tenant on the one accepted base, from the tenant's own data.",
    "preference": "DPO: pairs of a better and a worse answer, held to the parent by the reference.",
    "tools": "Tool trajectories to learn; schemas, permissions and execution at inference.",
    "reason": "Best-of-K samples that passed the verifier, demonstrations where none did if asked, then GRPO on the verifier's score.",
    "distill": "A student cut from the teacher learns its answers, then its distributions; the teacher is locked.",
}
_PARTS = ("load", "train", "sample", "evaluate", "release")
_FIRST = (
    "schema_validity_constrained", "schema_validity_free", "task_success", "tool_success", "verifier_pass", "verifier_score",
    "groundedness", "high_risk_refusal", "false_refusal", "unasked_action", "policy_conformity",
    "kl_to_parent", "latency_ratio", "latency_s", "mean_length",
)  # fmt: skip
_PAIRS_SHOWN = 4


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into a run folder from its files; a run that is still going, or was killed, is shown as far as it came.

    Raises DataError when the folder holds no summary.
    """
    summary = _json(run_folder / "summary.json")
    if summary is None:
        raise DataError(
            "the folder holds no summary.json", where=str(run_folder), remedy="name a run's folder, such as runs/finance-demo"
        )
    lines = _metrics(run_folder / "metrics.jsonl")
    stages = summary["stages"]
    tables = [summary["base"].get("metrics", {}), *(stage["metrics"] for stage in stages)]
    names = [*(n for n in _FIRST if any(n in t for t in tables)), *sorted({n for t in tables for n in t} - set(_FIRST))]
    base_parts = (_json(run_folder / "stages" / "base" / "done.json") or {}).get("seconds_by_part", {})
    times = [("base", base_parts, summary["base"].get("seconds", 0.0), 0.0)]
    times += [(stage["name"], stage["seconds_by_part"], stage["seconds"], stage["peak_memory_mb"]) for stage in stages]
    page = _environment().get_template("page.html.jinja").render(
        s=summary, accepted=sum(stage["accepted"] for stage in stages), warnings=_warnings(summary), numbers=_NUMBERS, levers=_LEVERS,
        road=Markup(road_svg(str(summary["base"].get("name", "base")), stages, summary["channels"])), metrics=names, tables=tables,
        units={name: next(t[name]["unit"] for t in tables if name in t) for name in names},
        counts={name: max(t[name]["n"] for t in tables if name in t) for name in names},
        curves={stage["name"]: Markup(curves(stage["name"], [x for x in lines if x.get("stage") == stage["name"]])) for stage in stages},
        prepared={stage["name"]: _prepared([x for x in lines if x.get("stage") == stage["name"]]) for stage in stages},
        pairs=_pairs(run_folder, stages), bars=Markup(time_bars([(name, parts) for name, parts, _, _ in times])), parts=_PARTS, times=times,
        channel_of=lambda stage: _channel_of(stage, summary["channels"]),
    )  # fmt: skip
    path = run_folder / "report.html"
    write_text(path, page)
    return path


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("posttrain.reporting", "."), autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined, trim_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "value": _value, "range": _range, "num": _num, "signed": lambda x: "" if x is None else f"{x:+.3f}", "duration": _duration,
        "pretty": lambda value: json.dumps(value, ensure_ascii=False, indent=1),
    }  # fmt: skip
    return environment


def _value(metric: Mapping[str, Any]) -> str:
    return f"{100 * metric['value']:.0f} %" if metric["unit"] == "share" else f"{metric['value']:.3g}"


def _range(metric: Mapping[str, Any]) -> str:
    low, high = metric["low"], metric["high"]
    return f"{100 * low:.0f}–{100 * high:.0f}" if metric["unit"] == "share" else f"{low:.2g} … {high:.2g}"


def _num(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _warnings(summary: Mapping[str, Any]) -> list[str]:
    """What a reader must not miss."""
    found = [] if summary["status"] == "finished" else [f"This run is {summary['status']}: the page shows what is done so far."]
    for stage in summary["stages"]:
        if not stage["accepted"]:
            verdict, parent = stage["verdict"].replace("_", " "), stage["parent"] or "the base"
            found.append(f"{stage['name']} did not pass its gate ({verdict}). The road went on from {parent}.")
        for name, why in stage.get("stopped", {}).items():
            found.append(f"{stage['name']} ({name}) was stopped early: {why}.")
        unscored = stage["metrics"].get("unscored", {}).get("value", 0)
        if unscored:
            found.append(f"{stage['name']}: {100 * unscored:.0f} % of the tasks could not be judged and count nowhere.")
    return found


def _pairs(run_folder: Path, stages: list[Mapping[str, Any]]) -> dict[str, list[tuple[Any, Any]]]:
    """Answers of a stage beside its parent's on the same task: those that changed from failed to passed or back first."""
    before = _samples(run_folder, "base")
    found = {}
    for stage in stages:
        after = _samples(run_folder, stage["name"])
        pairs = [(before.get(task), sample) for task, sample in after.items()]
        changed = [p for p in pairs if p[0] is not None and p[0]["passed"] != p[1]["passed"]]
        found[stage["name"]] = (changed + [p for p in pairs if p not in changed])[:_PAIRS_SHOWN]
        if stage["accepted"] and "main" in stage["releases"]:
            before = after
    return found


_NOT_MEASURED = {"stage", "phase", "step", "at", *RESERVED}


def _prepared(lines: list[dict[str, Any]]) -> dict[str, float]:
    """What a stage measured before its first step: what it collected, how close a fit came. Of a resumed one the last."""
    found: dict[str, float] = {}
    for line in lines:
        if line.get("step") == -1:
            found |= {name: value for name, value in line.items() if name not in _NOT_MEASURED and isinstance(value, int | float)}
    return found


def _samples(run_folder: Path, name: str) -> dict[str, Any]:
    return {sample["task"]: sample for sample in _json(run_folder / "stages" / name / "samples.json") or []}


def _channel_of(stage: Mapping[str, Any], channels: Mapping[str, str]) -> str:
    pointed = [name for name, release in channels.items() if release in stage["releases"].values()]
    return pointed[0] if pointed else next((name for name in channels if name not in stage["releases"]), "CHANNEL")


def _metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of the metrics log; a torn last line of a killed run is left out."""
    lines = []
    for text in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8")) if path.exists() else None
    except ValueError as error:  # not JSON, or not text
        raise DataError(f"is not JSON ({error})", where=str(path), remedy="let `posttrain run` write it again") from error
