"""How far training has come, in words."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

logger = logging.getLogger(__name__)

Tell = Callable[[str], None]


class Progress(TrainerCallback):
    """Tells the loss and the time left whenever the Trainer logs.

    Args:
        tell: Called with a line.
        step_tokens: Tokens of one step, about.
    """

    def __init__(self, tell: Tell, step_tokens: int) -> None:
        self._tell, self._step_tokens = tell, step_tokens
        self._start, self._first_step = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self._start, self._first_step = time.monotonic(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Say what was logged."""
        if not state.is_world_process_zero:
            return
        numbers = ", ".join(
            f"{name.replace('_', ' ')} {value:.4g}"
            for name, value in given["logs"].items()
            if name.startswith(("loss", "eval_"))
        )
        if numbers:
            self._tell(f"step {state.global_step:,} of {state.max_steps:,}: {numbers}{self._pace(state)}")

    def _pace(self, state: Any) -> str:
        done, seconds = state.global_step - self._first_step, time.monotonic() - self._start
        if done == 0 or seconds == 0:
            return ""
        left = seconds / done * (state.max_steps - state.global_step)
        return f"; {done * self._step_tokens / seconds:,.0f} tokens/s, {left / 60:.1f} min left"
