"""Which of torch's kernels for attention are used within our passes on a GPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_num_inside = 0
_was_enabled = False


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Leave out cuDNN's attention inside this block, for other threads too: torch has one switch for all.

    cuDNN plans anew for each length of a context, which takes longer than many passes: an answer grows by a
    token a step, and passages are as long as they are.
    """
    global _num_inside, _was_enabled
    backends = torch.backends.cuda
    with _lock:
        if _num_inside == 0:
            # Without another fused kernel attention would be computed in parts, and take more memory.
            others = backends.flash_sdp_enabled() and backends.mem_efficient_sdp_enabled()  # type: ignore[no-untyped-call]
            _was_enabled = others and backends.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
            if _was_enabled:
                backends.enable_cudnn_sdp(False)
        _num_inside += 1
    try:
        yield
    finally:
        with _lock:
            _num_inside -= 1
            if _num_inside == 0 and _was_enabled:
                backends.enable_cudnn_sdp(True)
