"""One evaluation of answers, from its options to its result."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from rag_blockcache.errors import InvalidInputError
from rag_blockcache.evaluation.answer_options import EvaluationOptions, listed_numbers
from rag_blockcache.evaluation.answer_run import AnswerRun
from rag_blockcache.evaluation.answer_summary import AnswerReport, summarize
from rag_blockcache.evaluation.arms import FULL_ARM, parse_arms
from rag_blockcache.evaluation.engines import Engines
from rag_blockcache.evaluation.environment import Environment
from rag_blockcache.evaluation.perplexity import text_perplexity
from rag_blockcache.evaluation.predictions import PredictionLog
from rag_blockcache.evaluation.public_sets import load_benchmark
from rag_blockcache.evaluation.qa_examples import QaExample
from rag_blockcache.evaluation.variants import POOL, vary
from rag_blockcache.model import Model

__all__ = ["EvaluationOptions", "evaluate"]

Progress = Callable[[int, int, float], None]

# Questions in a batch, and prompt tokens in it, by kind of device.
_BATCH = {"cpu": (8, 16_384), "cuda": (32, 131_072)}


def evaluate(options: EvaluationOptions, progress: Progress | None = None) -> AnswerReport:
    """Compare reuse policies with full attention on benchmarks.

    Args:
        options: What is measured, and how.
        progress: Called after each batch with questions done, questions in all, and seconds so far.

    Raises:
        InvalidInputError: If an option, a benchmark, or the directory of an earlier run cannot be used.
    """
    options.check()
    arms = parse_arms(options.policies)
    text = None if options.text is None else Path(options.text).read_text(encoding="utf-8")
    examples = [example for name in options.data for example in _benchmark(options, name)]
    with _engines(options) as engines:
        fitting, skipped = _fitting(engines, examples, options.max_new_tokens)
        log = PredictionLog(options.report, _settings(options, engines))
        run = AnswerRun(
            engines,
            arms,
            log,
            max_new_tokens=options.max_new_tokens,
            timed=_to_time(log, fitting, options.timed),
            scores_gold=options.score_gold,
        )
        _measure_all(run, engines.plain.model, fitting, options.batch_size, progress or (lambda *_: None))
        found = None if text is None else text_perplexity(engines.plain.model, text)
        environment = _environment(options, engines)
    return summarize(
        [example for example, _ in fitting.values()],
        arms,
        log,
        environment=environment,
        max_new_tokens=options.max_new_tokens,
        passage_format=options.passage_format,
        num_skipped=skipped,
        text=found,
    )


def _benchmark(options: EvaluationOptions, name: str) -> list[QaExample]:
    numbers = listed_numbers("num_passages", options.num_passages, least=1)
    lengths = listed_numbers("join_words", options.join_words, least=0)
    num_read = options.limit
    if num_read is not None and numbers:  # passages of whole pools, so that a higher limit changes no prompt
        num_read = -(-num_read // POOL) * POOL
    return vary(
        load_benchmark(name, num_read),
        limit=options.limit,
        join_words=lengths,
        num_passages=numbers,
        orders=[order.strip() for order in options.orders.split(",")],
    )


def _engines(options: EvaluationOptions) -> Engines:
    return Engines(
        options.model,
        device=options.device,
        dtype=options.dtype,
        adapter=options.adapter,
        passage_format=options.passage_format,
        preamble=options.preamble,
    )


def _environment(options: EvaluationOptions, engines: Engines) -> Environment:
    where = Environment.of(engines.plain.model, options.model)
    if options.adapter is None:
        return where
    return dataclasses.replace(where, model=f"{where.model} with {Path(options.adapter).name}")


def _settings(options: EvaluationOptions, engines: Engines) -> dict[str, Any]:
    """Return all that predictions depend on beside question and arm."""
    return {
        "model": engines.plain.model.fingerprint,
        "device": engines.plain.model.device.type,
        "max_new_tokens": options.max_new_tokens,
        "passage_format": options.passage_format,
        "preamble": hashlib.blake2b(engines.plain.prompt.preamble.encode(), digest_size=8).hexdigest(),
        "scores_gold": options.score_gold,
    }


Fitting = dict[str, tuple[QaExample, int]]


def _fitting(engines: Engines, examples: Sequence[QaExample], max_new_tokens: int) -> tuple[Fitting, int]:
    """Return the questions that fit the context window by key, with their lengths, and how many do not.

    An answer that crosses into another set of rotary frequencies does not fit either: behind that place
    everything is computed anew, so there is nothing to compare.
    """
    fitting: Fitting = {}
    model, num_skipped = engines.plain.model, 0
    for example in examples:
        length = sum(map(len, engines.plain.segments(example.question, example.passages)))
        end = length + max_new_tokens
        if end <= model.max_length and model.regime(length) == model.regime(end):
            fitting[example.key] = (example, length)
        else:
            num_skipped += 1
    if not fitting:
        raise InvalidInputError(
            f"no question fits the context window of the model, {model.max_length} tokens; "
            "take fewer passages"
        )
    return fitting, num_skipped


def _to_time(log: PredictionLog, keys: Collection[str], number: int) -> set[str]:
    """Choose so many questions: those that full attention was timed on before, then new ones, by their hash.

    So policies that are added later are timed on the questions of the others, and every variant has its part.
    """
    known = {key: log.get(key, FULL_ARM.name) for key in sorted(keys)}
    before = [key for key, found in known.items() if found is not None and found.ttft_seconds is not None]
    new = [key for key, found in known.items() if found is None]
    return set([*before, *new][:number])


def _measure_all(
    run: AnswerRun, model: Model, fitting: Fitting, batch_size: int | None, progress: Progress
) -> None:
    alike: dict[tuple[str | None, ...], list[tuple[QaExample, int]]] = {}
    for example, length in fitting.values():
        if missing := run.missing(example):  # no batch asks what one of its questions has on record
            group = (model.regime(length), *(arm.name for arm in missing))
            alike.setdefault(group, []).append((example, length))
    start, num_done = time.perf_counter(), len(fitting) - sum(map(len, alike.values()))
    progress(num_done, len(fitting), 0.0)
    limits = _BATCH.get(model.device.type, _BATCH["cpu"]) if batch_size is None else (batch_size, None)
    for pending in alike.values():
        for batch in _batches(pending, *limits):
            run.measure(batch)
            num_done += len(batch)
            progress(num_done, len(fitting), time.perf_counter() - start)


def _batches(
    pending: Sequence[tuple[QaExample, int]], max_questions: int, max_tokens: int | None
) -> Iterator[list[QaExample]]:
    """Cut questions into batches, each padded to its longest prompt; a batch has at least one."""
    batch: list[QaExample] = []
    longest = 0
    for example, length in pending:
        longest = max(longest, length)
        is_full = max_tokens is not None and longest * (len(batch) + 1) > max_tokens
        if batch and (is_full or len(batch) == max_questions):
            yield batch
            batch, longest = [], length
        batch.append(example)
    if batch:
        yield batch
