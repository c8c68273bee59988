"""A progress bar for long work; a line now and then where there is no terminal to draw on."""

from __future__ import annotations

import math
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from rag_blockcache.cli.units import format_bytes, format_seconds
from rag_blockcache.jobs.progress import JobProgress

_LINE_EVERY_SECONDS = 15.0
_UNITS = {
    "scan": "documents",
    "split": "documents",
    "embed": "passages",
    "prefill": "passages",
    "ask": "questions",
    "evaluate": "questions",
    "export": "files",
    "import": "files",
}


def describe(progress: JobProgress) -> str:
    """Say how far a stage has come: units done, tokens per second, bytes, time left."""
    done, total = progress.num_done, progress.num_total
    unit = _UNITS.get(progress.stage, "")
    parts = [f"{done:,} {unit}".rstrip() if total is None else f"{done:,}/{total:,} {unit}".rstrip()]
    if progress.num_tokens and progress.seconds > 0:
        parts.append(f"{progress.num_tokens / progress.seconds:,.0f} tokens/s")
    if progress.num_bytes:
        parts.append(format_bytes(progress.num_bytes))
    if total is not None and 0 < done < total:
        parts.append(f"{format_seconds(math.ceil(progress.seconds * (total - done) / done))} left")
    return ", ".join(parts)


class ProgressBar:
    """Shows the stages of a job: a bar each on a terminal, else a line every 15 seconds.

    A context manager, and the callback that a job reports to.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            SpinnerColumn(finished_text="*"),
            TextColumn("{task.description:<10}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._last_lines: dict[str, float] = {}  # stages take turns

    def __enter__(self) -> ProgressBar:
        """Start drawing."""
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing, and leave the terminal as it was."""
        for task in self._bars.tasks:
            if task.total is None and error is None:  # how much there is to do is known in the end
                self._bars.update(task.id, total=task.completed)
        self._bars.stop()

    def __call__(self, progress: JobProgress) -> None:
        """Show how far a stage has come."""
        detail = describe(progress)
        if self._console.is_terminal:
            if progress.stage not in self._tasks:
                self._tasks[progress.stage] = self._bars.add_task(progress.stage, total=None, detail="")
            self._bars.update(
                self._tasks[progress.stage],
                completed=progress.num_done,
                total=progress.num_total,
                detail=detail,
            )
        elif self._is_line_due(progress):
            self._console.print(f"{progress.stage}: {detail}", markup=False, soft_wrap=True)

    def _is_line_due(self, progress: JobProgress) -> bool:
        now = time.monotonic()
        is_old = now - self._last_lines.get(progress.stage, float("-inf")) >= _LINE_EVERY_SECONDS
        if not is_old and progress.num_done != progress.num_total:
            return False
        self._last_lines[progress.stage] = now
        return True
