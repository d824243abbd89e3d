"""What a person sees while a run goes on: stages, progress with rates and time left, verdicts. Silent for programs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from posttrain.evaluation import RunSummary
    from posttrain.recipe import Recipe

_SHOWN = ("loss", "reward", "pass_share", "accuracy", "drift", "kl_sum", "state_distance", "lr")
_EVERY = 10.0  # seconds between lines where there is no terminal


class Console:
    """Progress bars on a terminal, a line now and then elsewhere, nothing at all when quiet. Writes to stderr: stdout is for results."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._rich = RichConsole(file=sys.stderr, highlight=False, quiet=quiet)
        self._started = time.monotonic()

    def say(self, text: str) -> None:
        self._rich.print(text)

    def notes(self, lines: Iterable[str]) -> None:
        """Lines of the user's own words: brackets in them are no markup."""
        for line in lines:
            self._rich.print(line, markup=False)

    def stage(self, name: str, lever: str) -> None:
        self.say(f"\n[bold]{name}[/bold]  {lever}  [dim]{self._clock()}[/dim]")

    def verdict(self, name: str, outcome: str, reasons: tuple[str, ...]) -> None:
        colour = "green" if outcome == "real_gain" else "yellow"
        self.say(f"  [{colour}]{outcome.replace('_', ' ')}[/{colour}]" + (f": {'; '.join(reasons)}" if reasons else ""))

    def meter(self) -> Callable[[str, int, int, Mapping[str, float]], None]:
        """A line for training steps: phase, step of total, metrics, seconds left."""
        last = begun = before = time.monotonic()
        first = expected = 0

        def show(phase: str, step: int, total: int, values: Mapping[str, float]) -> None:
            nonlocal last, begun, before, first, expected
            now = time.monotonic()
            if step != expected:  # another phase or adapter, or a run that goes on: rates start anew
                begun, first = before, step
            before, expected = now, step + 1
            if now - last < _EVERY and 0 < step + 1 < total:
                return
            last = now
            shown = "  ".join(f"{key} {values[key]:.4g}" for key in _SHOWN if key in values)
            left = (now - begun) / (step + 1 - first) * (total - step - 1) if step >= 0 else 0.0
            self.say(f"  {phase} {step + 1}/{total}  {shown}  [dim]{left:.0f} s left[/dim]")

        return show

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar over `total` items, or lines with rate and time left; yields a function that advances it."""
        if self.quiet or not self._rich.is_terminal:
            yield self._lines(label, total)
            return
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._rich, transient=True) as bar:
            task = bar.add_task(label, total=total)
            yield lambda count: bar.advance(task, count)

    def _lines(self, label: str, total: int) -> Callable[[int], None]:
        start = last = time.monotonic()
        done = 0

        def advance(count: int) -> None:
            nonlocal done, last
            done += count
            now = time.monotonic()
            if now - last >= _EVERY and 0 < done < total:
                last, rate = now, done / (now - start)
                self.say(f"  {label} {done}/{total}  {rate:.1f}/s  [dim]{(total - done) / rate:.0f} s left[/dim]")

        if total > 1:
            self.say(f"  {label} 0/{total}")
        return advance

    def _clock(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        return f"{minutes}:{seconds:02d}"

    def table(self, rows: list[tuple[Any, ...]], headers: tuple[str, ...]) -> None:
        from rich.table import Table

        table = Table(*headers, box=None, pad_edge=False)
        for row in rows:
            table.add_row(*(str(cell) for cell in row))
        self._rich.print(table)

    def finished(self, summary: RunSummary, page: Path, recipe: Recipe) -> None:
        """The last words of a run: what passed, where the report is, how to serve."""
        self.say("")
        rows = [
            (stage.name, stage.verdict.replace("_", " "), next(iter(stage.releases.values()), ""), f"{stage.seconds:.0f} s")
            for stage in summary.stages
        ]
        self.table(rows, ("stage", "verdict", "release", "time"))
        minutes = summary.seconds / 60
        self.say(f"\n{minutes:.1f} minutes, peak memory {summary.peak_memory_mb:.0f} MB")
        self.say(f"report: {page}")
        if not summary.channels:
            self.say("no stage passed its gate: there is nothing to serve")
            return
        command = sys.argv[0] if Path(sys.argv[0]).name == "posttrain" else "posttrain"
        self.say(f"serve:  {command} serve --runs {recipe.output} --base {recipe.base}")
