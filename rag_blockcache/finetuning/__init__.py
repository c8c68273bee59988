"""Block fine-tuning: a model learns to answer over passages that do not see one another.

Reading order: ``recipe`` (all options), ``examples`` (files to questions, passages and answers), ``order``
(which example comes next), ``samples`` (one example to tokens, by the same code that serves), ``packing``
(samples to rows of equal length), ``rows`` (all of this together, in parallel), ``mask`` (what a token sees),
``network`` (the model, its adapter, saving and merging), ``own_answers`` (to questions without one),
``trainer`` (the loss, on top of transformers' Trainer), ``held_out`` and ``progress`` (what is measured
meanwhile), ``curves``, ``card`` and ``results`` (what is written in the end), ``run_folder`` (how far a run
has come), and ``run``, which wires them.

``python -m rag_blockcache.finetuning --help`` lists the options, and ``rag-blockcache finetune`` takes the
same ones.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from rag_blockcache.errors import MissingDependencyError

if TYPE_CHECKING:
    from rag_blockcache.finetuning.recipe import Recipe
    from rag_blockcache.finetuning.results import TrainingReport
    from rag_blockcache.finetuning.run import finetune

_HOMES = {
    "Recipe": "rag_blockcache.finetuning.recipe",
    "TrainingReport": "rag_blockcache.finetuning.results",
    "finetune": "rag_blockcache.finetuning.run",
}
_NEEDED = ("accelerate", "matplotlib", "peft")  # the last thing a run does is to draw its curves

__all__ = ["Recipe", "TrainingReport", "finetune"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, and what training needs only for training."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    missing = [each for each in _NEEDED if importlib.util.find_spec(each) is None]
    if missing and name != "Recipe":
        raise MissingDependencyError(
            f"fine-tuning needs {', '.join(missing)}, which is not installed; "
            "pip install 'rag_blockcache[finetune]'"
        )
    return getattr(importlib.import_module(_HOMES[name]), name)
