"""How far a job has come, as its callback is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class JobProgress:
    """How far one stage of a job has come.

    Attributes:
        stage: What is being done: ``"scan"``, ``"split"``, ``"embed"``, ``"prefill"``, ...
        num_done: Units done: documents, passages, or files.
        num_total: Of how many; None while that is not known.
        num_tokens: Tokens worked on so far in this stage.
        num_bytes: Bytes read or written so far in this stage.
        seconds: Time spent in this stage so far.
    """

    stage: str
    num_done: int
    num_total: int | None = None
    num_tokens: int = 0
    num_bytes: int = 0
    seconds: float = 0.0


ProgressCallback: TypeAlias = Callable[[JobProgress], None]
