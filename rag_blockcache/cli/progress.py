"""A progress bar for long work; a line now and then where there is no terminal to draw on."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from rag_blockcache.cli.units import format_bytes, format_seconds

_LINE_EVERY_SECONDS = 15.0


class Work(Protocol):
    """How far a prefill has come: what ``BlockCache.prefill`` passes to its callback."""

    @property
    def num_done(self) -> int:
        """Passages done."""

    @property
    def num_total(self) -> int:
        """Passages in all."""

    @property
    def num_tokens(self) -> int:
        """Tokens encoded."""

    @property
    def num_bytes(self) -> int:
        """Bytes written."""

    @property
    def seconds(self) -> float:
        """Time spent."""


def describe(work: Work) -> str:
    """Say how far it has come: passages, tokens per second, bytes, time left."""
    parts = [f"{work.num_done:,}/{work.num_total:,} passages"]
    if work.seconds > 0:
        parts.append(f"{work.num_tokens / work.seconds:,.0f} tokens/s")
    parts.append(format_bytes(work.num_bytes))
    if work.num_done and work.num_done < work.num_total:
        left = work.seconds * (work.num_total - work.num_done) / work.num_done
        parts.append(f"{format_seconds(left)} left")
    return ", ".join(parts)


class ProgressBar:
    """Shows the stages of a job on stderr: a bar on a terminal, else a line every 15 seconds.

    Use it as a context manager, and ``stage`` and ``advance`` as callbacks.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._is_drawn = console.is_terminal
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not self._is_drawn,
            transient=True,
        )
        self._stage = ""
        self._task: TaskID | None = None
        self._last_line = 0.0

    def __enter__(self) -> ProgressBar:
        """Start drawing."""
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing, and leave the terminal as it was."""
        self._bar.stop()

    def advance(self, stage: str, num_done: int, num_total: int | None, detail: str = "") -> None:
        """Show how far a stage has come; a new name starts a new line.

        Args:
            stage: What is being done: ``"embed"``.
            num_done: How many units are done.
            num_total: Of how many; None if that is not known.
            detail: What else to say behind the bar.
        """
        if self._task is None or stage != self._stage:
            self._stage, self._last_line = stage, 0.0
            self._task = self._bar.add_task(stage, total=num_total, detail=detail)
        self._bar.update(self._task, completed=num_done, total=num_total, detail=detail)
        if not self._is_drawn and self._is_line_due(num_done == num_total):
            self._console.print(f"{stage}: {detail or num_done}", markup=False, soft_wrap=True)

    def _is_line_due(self, is_last: bool) -> bool:
        now = time.monotonic()
        if not is_last and self._last_line and now - self._last_line < _LINE_EVERY_SECONDS:
            return False
        self._last_line = now
        return True
