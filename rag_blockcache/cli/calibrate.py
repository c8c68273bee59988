"""``calibrate``: the cheapest reuse policy that stays within a loss on the user's own passages."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rag_blockcache.cli.opening import open_index, recorded_settings
from rag_blockcache.cli.options import (
    Adapter,
    AsJson,
    BlocksSee,
    Codec,
    Device,
    Dtype,
    Embedder,
    PassageFormat,
)
from rag_blockcache.cli.output import print_json, print_note, stderr, stdout, to_json
from rag_blockcache.cli.progress import ProgressBar
from rag_blockcache.cli.units import format_count, format_seconds
from rag_blockcache.errors import InvalidInputError
from rag_blockcache.jobs.progress import JobProgress
from rag_blockcache.policy_record import PolicyRecord, without_guard
from rag_blockcache.reuse import FULL, LADDER, parse_policy

if TYPE_CHECKING:
    from rag_blockcache.block_cache import BlockCache
    from rag_blockcache.evaluation.calibration import MeasuredPolicy
    from rag_blockcache.policy_record import Calibration
    from rag_blockcache.retriever import Retriever

_FOLDER = "calibration"  # in the directory


def calibrate(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Directory of an index, or of a BlockCache.")
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Questions with their passages, as eval reads them; may be given several times. Left out, "
            "the model asks questions about passages drawn from the index.",
        ),
    ] = None,
    max_loss: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Fidelity that may be lost, its interval included."),
    ] = 0.05,
    policies: Annotated[
        str | None,
        typer.Option(help=f"Policies to choose among, besides full. {','.join(LADDER[:-1])} if left out."),
    ] = None,
    limit: Annotated[int, typer.Option(min=6, help="Questions to ask, of each file.")] = 40,
    num_passages: Annotated[
        int, typer.Option("--passages", "-k", min=1, help="Passages to a question that the model asks.")
    ] = 5,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Keep questions, answers and a report here; in the directory if left out."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Hub id or folder of the model; an index knows its own.")
    ] = None,
    embedder: Embedder = None,
    adapter: Adapter = None,
    passage_format: PassageFormat = None,
    preamble: Annotated[
        str | None, typer.Option(help="Text before the passages; an index knows its own.")
    ] = None,
    blocks_see: BlocksSee = None,
    codec: Codec = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Find the cheapest reuse policy that answers like full attention on your own passages.

    Measures policies as eval does, chooses the one with the earliest first token that surely loses no more
    than --max-loss, and records it in the directory: policy "auto" of every cache that is opened there, with
    the same model and prompt, uses it. A run that was stopped goes on with the same command.
    """
    from rag_blockcache.evaluation.answer_evaluation import EvaluationOptions, evaluate
    from rag_blockcache.evaluation.answer_page import write_report
    from rag_blockcache.evaluation.arms import way_of
    from rag_blockcache.evaluation.bootstrap import FEWEST
    from rag_blockcache.evaluation.calibration import check_number, choose_cheapest, measured_policies
    from rag_blockcache.evaluation.command import typed_command
    from rag_blockcache.evaluation.public_sets import load_benchmark

    names = _names(policies)
    if data:  # a mistake shows now, not after the model was loaded
        check_number(sum(len(load_benchmark(name, FEWEST)) for name in data))
    asked = {
        "adapter": adapter,
        "passage_format": passage_format,
        "preamble": preamble,
        "blocks_see": blocks_see,
        "codec": codec,
        "dtype": dtype,
    }
    opening = _opening(directory, model, asked, needs_index=not data)
    with ProgressBar(stderr()) as bar:
        with _opened(directory, opening, embedder, device) as (cache, retriever):
            auto, way = cache.auto_policy, way_of(cache)
            if policies is None:  # one that was named and cannot be used is an error
                names = [name for name in names if auto.can_use(parse_policy(name) or FULL)]
            folder = report or directory / _FOLDER / _key(auto.record, max_new_tokens, cache)
            if report is None:
                (directory / _FOLDER).mkdir(mode=0o700, exist_ok=True)  # passages are in it
            if not data:
                assert retriever is not None, "an index has one"
                data = [_write_questions(folder, cache, retriever, limit, num_passages, bar)]
        del cache, retriever  # the evaluation loads the model anew, and two may not fit
        options = EvaluationOptions(
            data=data,
            policies=",".join(name + way for name in names),
            limit=limit,
            max_new_tokens=max_new_tokens,
            report=str(folder),
            device=device,
            model=opening.model,
            adapter=opening.adapter,
            passage_format=opening.passage_format,
            preamble=opening.preamble,
            dtype=opening.dtype,
        )
        found = evaluate(options, lambda done, total, took: bar(_progress("evaluate", done, total, took)))
    measured = measured_policies(found)
    num_questions = max(row["num_questions"] for row in found.rows)
    chosen = choose_cheapest(measured, max_loss=max_loss, num_questions=num_questions)
    auto.update(lambda record: dataclasses.replace(without_guard(record), calibration=chosen))
    page = write_report(found, typed_command(), folder)
    print_note(f"report: {page}")
    if as_json:
        shown = [{**to_json(each), "loss_at_most": each.loss_at_most} for each in measured]
        print_json({**to_json(chosen), "reason": chosen.reason, "measured": shown, "report": page})
    else:
        _show(chosen, measured, directory, stdout())


def _names(policies: str | None) -> list[str]:
    """Read policies; a mistake shows now, not after the model was loaded."""
    names = [name.strip() for name in (policies or ",".join(LADDER)).split(",") if name.strip()]
    for name in names:
        if parse_policy(name) is None:
            raise InvalidInputError(f"calibration chooses what {name!r} stands for; name other policies")
    return [name for name in names if name != FULL.name]  # which is measured in any case


@dataclass(frozen=True)
class _Opening:
    """With what a directory is opened, in the words of ``BlockCache``."""

    model: str
    adapter: str | None
    passage_format: str
    preamble: str | None
    blocks_see: str | None
    codec: str
    dtype: str | None


def _opening(directory: Path, model: str | None, asked: Mapping[str, Any], *, needs_index: bool) -> _Opening:
    """Take what an index has on record; of a cache without index, what was asked for."""
    settings = recorded_settings(directory)
    if settings is None:
        return _opening_of_a_cache(directory, model, asked, needs_index=needs_index)
    given = [f"--{name.replace('_', '-')}" for name, value in asked.items() if value is not None]
    if given:
        raise InvalidInputError(f"the index in {directory} has it on record; leave out {' and '.join(given)}")
    return _Opening(
        model=model or settings.model,
        adapter=settings.adapter or None,
        passage_format=settings.passage_format,
        preamble=settings.preamble,
        blocks_see=settings.blocks_see,
        codec=settings.codec,
        dtype=settings.dtype or None,
    )


def _opening_of_a_cache(
    directory: Path, model: str | None, asked: Mapping[str, Any], *, needs_index: bool
) -> _Opening:
    if needs_index:
        raise InvalidInputError(
            f"there is no index in {directory} to draw passages from; give questions with --data"
        )
    if model is None or not directory.is_dir():
        raise InvalidInputError(
            f"there is no index in {directory}; name the directory of a BlockCache, and --model with it"
        )
    usual = {"passage_format": "paper", "codec": "none"}
    return _Opening(model=model, **{**asked, **{name: asked[name] or usual[name] for name in usual}})


@contextmanager
def _opened(
    directory: Path, opening: _Opening, embedder: str | None, device: str | None
) -> Iterator[tuple[BlockCache, Retriever | None]]:
    """Open an index; or a cache, which then has no retriever."""
    if recorded_settings(directory) is not None:
        with open_index(directory, model=opening.model, embedder=embedder, device=device) as opened:
            yield opened
        return
    from rag_blockcache.block_cache import BlockCache

    with BlockCache(directory=directory, device=device, **dataclasses.asdict(opening)) as cache:
        yield cache, None


def _key(record: PolicyRecord, max_new_tokens: int, cache: BlockCache) -> str:
    """Name the folder of all runs whose answers can be compared."""
    named = [record.fingerprint, record.prompt, max_new_tokens, cache.model.device.type]
    return hashlib.blake2b(json.dumps(named).encode(), digest_size=8).hexdigest()


def _write_questions(
    folder: Path,
    cache: BlockCache,
    retriever: Retriever,
    limit: int,
    num_passages: int,
    bar: ProgressBar,
) -> str:
    from rag_blockcache.evaluation.calibration import check_number
    from rag_blockcache.evaluation.question_writing import write_questions

    start = time.perf_counter()

    def show(num_done: int, num_total: int) -> None:
        bar(_progress("ask", num_done, num_total, time.perf_counter() - start))

    path = folder / "questions.jsonl"
    number = write_questions(path, cache, retriever, number=limit, num_passages=num_passages, progress=show)
    check_number(number)
    if number < limit:
        print_note(f"the index had passages for {format_count(number, 'question')}, {limit:,} were wanted")
    return str(path)


def _progress(stage: str, num_done: int, num_total: int, seconds: float) -> JobProgress:
    return JobProgress(stage, num_done, num_total, seconds=seconds)


def _show(chosen: Calibration, measured: list[MeasuredPolicy], directory: Path, console: Console) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("policy", "fidelity", "95 %", "computed again", "first token", ""):
        is_text = heading in ("policy", "")
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=not is_text)
    for each in measured:
        table.add_row(*map(Text, _row(each, chosen)))
    console.print(table)
    console.print(Text(f"auto in {directory}: {chosen.policy} ({chosen.reason})"), soft_wrap=True)


def _row(each: MeasuredPolicy, chosen: Calibration) -> list[Any]:
    mark = "chosen" if each.policy == chosen.policy else ""
    return [
        each.policy,
        f"{each.fidelity:.3f}",
        f"{each.fidelity_low:.3f} to {each.fidelity_high:.3f}",
        f"{100 * each.recomputed:.0f} %",
        "-" if each.ttft_seconds is None else format_seconds(each.ttft_seconds),
        mark if each.loss_at_most <= chosen.max_loss else "loses too much",
    ]
