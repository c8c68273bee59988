"""``python -m rag_blockcache.evaluation``: compare answers without the rest of the command line."""

from __future__ import annotations

import json
import sys

from transformers import HfArgumentParser

from rag_blockcache.errors import RagBlockCacheError
from rag_blockcache.evaluation.answer_evaluation import EvaluationOptions, evaluate
from rag_blockcache.evaluation.answer_page import write_report
from rag_blockcache.evaluation.command import typed_command


def main() -> None:
    """Evaluate by the options of the command line; progress on stderr, one JSON object on stdout."""
    parser = HfArgumentParser(EvaluationOptions, prog="python -m rag_blockcache.evaluation")  # type: ignore[arg-type]
    [options] = parser.parse_args_into_dataclasses()
    try:
        report = evaluate(options, _tell)
        if options.report is not None:
            write_report(report, typed_command(), options.report)
    except (RagBlockCacheError, OSError) as error:
        sys.exit(f"error: {error}")
    print(json.dumps({"command": typed_command(), **report.to_json()}))


def _tell(num_done: int, num_total: int, seconds: float) -> None:
    print(f"{num_done:,}/{num_total:,} questions, {seconds:,.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
