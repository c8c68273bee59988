"""From files to rows: draws examples, makes samples of them in parallel, and packs these."""

from __future__ import annotations

import itertools
import multiprocessing
import pickle
import random
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.context import BaseContext

from transformers import PreTrainedTokenizerBase

from rag_blockcache.errors import InvalidInputError
from rag_blockcache.finetuning.companions import Companions, SharedPassages
from rag_blockcache.finetuning.examples import DataFile, Example, TextExample
from rag_blockcache.finetuning.order import Draw, draws
from rag_blockcache.finetuning.packing import Row, pack
from rag_blockcache.finetuning.recipe import Mode, Recipe
from rag_blockcache.finetuning.samples import Sample, SampleMaker

_CHUNK = 64  # draws that one process makes samples of at a time
_MAX_FRUITLESS = 1000  # draws in a row of which none fits


@dataclass(frozen=True)
class TrainingRows:
    """What is trained on, in order.

    Attributes:
        rows: One a micro-batch.
        num_samples: Samples of each file.
        num_too_long: Examples that were left out, because they fit no row.
    """

    rows: Sequence[Row]
    num_samples: Sequence[int]
    num_too_long: int


def sample_maker(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, closing: Sequence[int], max_tokens: int
) -> SampleMaker:
    """Return the maker of samples that a recipe asks for; see ``SampleMaker``."""
    return SampleMaker(
        tokenizer,
        closing,
        passage_format=recipe.passage_format,
        preamble=recipe.preamble,
        min_passages=recipe.min_passages,
        max_tokens=max_tokens,
        row_tokens=recipe.row_tokens,
        blocks_see=recipe.blocks_see,
    )


def training_rows(
    recipe: Recipe,
    files: Sequence[DataFile],
    tokenizer: PreTrainedTokenizerBase,
    closing: Sequence[int],
    max_tokens: int,
) -> TrainingRows:
    """Make the rows of a whole run; the same recipe and files give the same rows.

    Raises:
        InvalidInputError: If next to no example fits.
    """
    num_too_long = 0

    def samples() -> Iterator[Sample]:
        nonlocal num_too_long
        fruitless = 0
        source = _Source(recipe, tuple(file.examples for file in files), tokenizer, closing, max_tokens)
        for draw, made in source.samples():
            fitting = [replace(sample, file=draw.file) for sample in made if sample is not None]
            num_too_long += not fitting
            fruitless = 0 if fitting else fruitless + 1
            if fruitless == _MAX_FRUITLESS:
                raise InvalidInputError(
                    f"none of {_MAX_FRUITLESS} examples in a row fits {max_tokens} tokens; raise row_tokens, "
                    "or cut their passages"
                )
            yield from fitting

    rows = list(itertools.islice(pack(samples(), recipe.row_tokens), recipe.steps * recipe.rows_per_step))
    used = Counter(int(file) for row in rows for file in row.files)
    return TrainingRows(rows, [used[file] for file in range(len(files))], num_too_long)


def held_out_rows(recipe: Recipe, files: Iterable[DataFile], maker: SampleMaker) -> list[Row]:
    """Make the rows that are measured on: some examples of each file, as they stand, in both modes."""
    samples = []
    for file in files:
        count = min(recipe.eval_samples, len(file.examples))
        for index in random.Random(f"held out {file.name}").sample(range(len(file.examples)), count):
            example = file.examples[index]
            modes: tuple[Mode, ...] = ("full",) if isinstance(example, TextExample) else ("block", "full")
            samples += [maker.make(example, mode, None) for mode in modes]
    return list(pack([sample for sample in samples if sample is not None], recipe.row_tokens))


@dataclass(frozen=True)
class _Source:
    """Makes samples in the order of the draws, here or in other processes."""

    recipe: Recipe
    examples: tuple[Sequence[Example], ...]
    tokenizer: PreTrainedTokenizerBase
    closing: Sequence[int]
    max_tokens: int

    def samples(self) -> Iterator[tuple[Draw, list[Sample | None]]]:
        """Yield each draw with its samples, one for each mode of the recipe; of text there is one."""
        order = draws(
            [len(examples) for examples in self.examples], balance=self.recipe.balance, seed=self.recipe.seed
        )
        if self.recipe.workers == 1:
            make = _Make(self)
            yield from ((draw, make(draw)) for draw in order)
            return
        chunks = iter(lambda: list(itertools.islice(order, _CHUNK)), [])
        packed = pickle.dumps(self)  # once, and not once for each process
        with ProcessPoolExecutor(self.recipe.workers, _process_context(), _start_worker, (packed,)) as pool:
            ahead: deque[tuple[list[Draw], Future[list[list[Sample | None]]]]] = deque()
            try:
                for chunk in chunks:
                    ahead.append((chunk, pool.submit(_make_chunk, chunk)))
                    if len(ahead) > 2 * self.recipe.workers:
                        done, future = ahead.popleft()
                        yield from zip(done, future.result(), strict=True)
            finally:  # whoever reads stops when there are rows enough
                pool.shutdown(cancel_futures=True)


class _Make:
    """Makes the samples of a draw."""

    def __init__(self, source: _Source) -> None:
        self._source = source
        self._maker = sample_maker(source.recipe, source.tokenizer, source.closing, source.max_tokens)
        self._most = source.recipe.max_questions - 1
        self._shared = [SharedPassages(examples) for examples in source.examples if self._most]

    def __call__(self, draw: Draw) -> list[Sample | None]:
        example = self._source.examples[draw.file][draw.example]
        if isinstance(example, TextExample):  # a mode would change nothing
            return [self._maker.make(example, "full", None)]
        made = []
        for turn, mode in enumerate(self._source.recipe.mode_pair):
            source = random.Random(f"{self._source.recipe.seed} {draw.number} {turn}")
            companions = Companions(self._shared[draw.file], self._most, source) if self._most else None
            made.append(self._maker.make(example, mode, source, companions))
        return made


def _process_context() -> BaseContext:
    """Return how processes are started: where that can be, from one that has imported all this once."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


_make: _Make | None = None  # of this process, if it is a worker


def _start_worker(packed: bytes) -> None:
    global _make
    _make = _Make(pickle.loads(packed))


def _make_chunk(chunk: Sequence[Draw]) -> list[list[Sample | None]]:
    assert _make is not None
    return [_make(draw) for draw in chunk]
