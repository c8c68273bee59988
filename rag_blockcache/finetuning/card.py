"""The model card of an adapter: what it is, what it was trained on, and what was measured meanwhile."""

from __future__ import annotations

from pathlib import Path

from rag_blockcache.finetuning.curves import CURVES_FILE, History, points
from rag_blockcache.training_record import TrainingRecord

_CARD = """\
---
base_model: {base}
library_name: {library}
tags: [block-attention, rag, rag_blockcache]
---

# {name}

{what}

```python
from rag_blockcache import BlockCache

cache = BlockCache({use})
```

## Data

| file | examples | samples of them | sha256 |
|---|---:|---:|---|
{data}

{steps:,} steps, {samples:,} samples with {questions:,} questions, {tokens:,} tokens, of which
{answer_tokens:,} of answers and {text_tokens:,} of general text are in the loss. Each question was drawn
twice, in the modes {modes}, with other passages around those that its answer rests on.

## Recipe

{recipe}

## Measured during training

{measured}

![curves]({curves})

## Limits

What it answers rests on the passages that it is given, and on data of the kinds above; it was measured on
no others. The weights of the base model and the data have licences of their own.
"""
_APART = (
    "It answers over passages that were encoded apart{seen} and do not see one another (block attention), "
    "and under full attention too."
)
_FULL = "It was trained under full attention only, to compare with. It is not block-fine-tuned."
_SEEN = {"themselves": "", "stand-ins": ", behind stand-ins for other passages,"}
_KINDS = {"block": "answers, block attention", "full": "answers, full attention", "text": "general text"}


def write_card(record: TrainingRecord, history: History, out: Path, *, is_adapter: bool) -> None:
    """Write ``README.md`` beside the weights."""
    shown = {name: value for name, value in record.recipe.items() if name not in ("data", "eval_data")}
    (out / "README.md").write_text(
        _CARD.format(
            base=record.base_model,
            library="peft" if is_adapter else "transformers",
            name=out.resolve().name,
            what=_APART.format(seen=_SEEN[record.blocks_see]) if record.block_fine_tuned else _FULL,
            use=f'"{record.base_model}", "./kv", adapter="FOLDER"' if is_adapter else '"FOLDER", "./kv"',
            data="\n".join(
                f"| {file['name']} | {file['num_examples']:,} | {file['num_samples']:,} "
                f"| `{file['sha256'][:16]}…` |"
                for file in record.data
            ),
            modes=record.recipe["modes"],
            recipe="\n".join(f"- {name}: `{value}`" for name, value in shown.items()),
            measured=_measured(history),
            curves=CURVES_FILE,
            **record.totals,
        ),
        encoding="utf-8",
    )


def _measured(history: History) -> str:
    """Compare the first and the last measurement on held-out examples."""
    lines = ["| held out | before | after |", "|---|---:|---:|"]
    for label, name in (
        ("loss of a token", "eval_loss_{}"),
        ("exact to the token", "eval_exact_{}"),
        ("right", "eval_accuracy_{}"),
    ):
        for kind, shown in _KINDS.items():
            found = points(history, name.format(kind))
            if found:
                lines.append(f"| {shown}: {label} | {found[0][1]:.3f} | {found[-1][1]:.3f} |")
    return "\n".join(lines) if len(lines) > 2 else "Nothing: no held-out examples were given."
