"""``python -m rag_blockcache.finetuning``: block fine-tuning without the rest of the command line."""

from __future__ import annotations

import sys

from rag_blockcache.errors import RagBlockCacheError
from rag_blockcache.finetuning.recipe import Recipe


def main() -> None:
    """Train by the options of the command line; progress on stderr, the folder on stdout."""
    # Not above: the processes that tokenize import this file.
    from transformers import HfArgumentParser

    try:
        from rag_blockcache.finetuning import finetune

        parser = HfArgumentParser(Recipe, prog="python -m rag_blockcache.finetuning")  # type: ignore[arg-type]
        [recipe] = parser.parse_args_into_dataclasses()
        report = finetune(recipe, tell=lambda line: print(line, file=sys.stderr, flush=True))
    except RagBlockCacheError as error:
        sys.exit(f"error: {error}")
    print(report.folder)


if __name__ == "__main__":
    main()
