"""One evaluation of answers, from its options to its result."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rag_blockcache.errors import InvalidInputError
from rag_blockcache.evaluation.answer_run import AnswerRun
from rag_blockcache.evaluation.answer_summary import AnswerReport, summarize
from rag_blockcache.evaluation.arms import parse_arms
from rag_blockcache.evaluation.engines import Engines
from rag_blockcache.evaluation.environment import Environment
from rag_blockcache.evaluation.perplexity import text_perplexity
from rag_blockcache.evaluation.predictions import PredictionLog
from rag_blockcache.evaluation.public_sets import load_benchmark
from rag_blockcache.evaluation.qa_examples import QaExample
from rag_blockcache.evaluation.variants import vary
from rag_blockcache.model import Model

Progress = Callable[[int, int, float], None]

# Questions in a batch, and prompt tokens in it, by kind of device.
_BATCH = {"cpu": (8, 16_384), "cuda": (32, 131_072)}


@dataclass(frozen=True)
class EvaluationOptions:
    """What is measured, and how.

    Attributes:
        model: Hub id or folder of the model.
        data: Benchmarks; see ``public_sets.load_benchmark``.
        policies: Arms with commas between them; see ``arms.parse_arm``. Full attention and no passages are
            measured in any case.
        limit: Questions of each benchmark; None for all.
        num_passages: Ask each question with these numbers of passages; empty for those it has.
        orders: Ask each question with its passages in these orders; see ``variants.ORDERS``.
        max_new_tokens: Longest answer.
        batch_size: Questions at a time; None chooses by the device and the length of the prompts.
        timed: How many questions are asked alone as well, to time the first token.
        score_gold: Whether gold answers are scored too, for their perplexity; it takes one more pass each.
        text: File of a text whose perplexity under full attention is measured too; None for none.
        report: Directory for predictions, so that a run that was killed goes on; None keeps none.
        adapter: Hub id or folder of a PEFT adapter to load into the model.
        passage_format: How passages are shown, by name.
        preamble: Text before them; None for that of the format.
        device: Where the model runs; None for a GPU if there is one.
        dtype: What it computes in; None for that of its files.
    """

    model: str
    data: list[str]
    policies: str = "block,link-16"
    limit: int | None = None
    num_passages: list[int] = field(default_factory=list)
    orders: list[str] = field(default_factory=lambda: ["given"])
    max_new_tokens: int = 64
    batch_size: int | None = None
    timed: int = 20
    score_gold: bool = False
    text: str | None = None
    report: str | None = None
    adapter: str | None = None
    passage_format: str = "paper"
    preamble: str | None = None
    device: str | None = None
    dtype: str | None = None


def evaluate(options: EvaluationOptions, progress: Progress | None = None) -> AnswerReport:
    """Compare reuse policies with full attention on benchmarks.

    Args:
        options: What is measured, and how.
        progress: Called after each batch with questions done, questions in all, and seconds so far.

    Raises:
        InvalidInputError: If an option, a benchmark, or the directory of an earlier run cannot be used.
    """
    arms = parse_arms(options.policies)
    if options.max_new_tokens < 1 or not options.data:
        raise InvalidInputError("max_new_tokens must be at least 1, and data name one benchmark at least")
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
            timed=_evenly(list(fitting), options.timed),
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
    return vary(load_benchmark(name, options.limit), num_passages=options.num_passages, orders=options.orders)


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


def _evenly(keys: Sequence[str], number: int) -> set[str]:
    """Choose so many of the questions, spread over all of them."""
    number = min(number, len(keys))
    return {keys[index * len(keys) // number] for index in range(number)} if number > 0 else set()


def _measure_all(
    run: AnswerRun, model: Model, fitting: Fitting, batch_size: int | None, progress: Progress
) -> None:
    pending = [(example, length) for example, length in fitting.values() if run.missing(example)]
    start, num_done = time.perf_counter(), len(fitting) - len(pending)
    progress(num_done, len(fitting), 0.0)
    limits = _BATCH.get(model.device.type, _BATCH["cpu"]) if batch_size is None else (batch_size, None)
    for regime in dict.fromkeys(model.regime(length) for _, length in pending):  # never beside one another
        alike = [(example, length) for example, length in pending if model.regime(length) == regime]
        for batch in _batches(alike, *limits):
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
