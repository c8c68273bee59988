"""Index the Python language reference, ask about it, and see how soon the first token comes: ``make demo``.

The corpus is what ``help()`` shows in every Python (``pydoc_data.topics``), as text files. The job behind
``rag-blockcache index-and-prefill`` splits, embeds and prefills it, once: a second run finds it done.
Then questions are answered from the stored blocks, and the same token ids are prefilled in full for
comparison. The model is one that was fine-tuned on blocks, with the adapter beside this file; ``--stock``
takes it as it was published, of which part of each block is computed again. It needs no network; see
``small_models``.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from small_models import cache_folder, minilm_path, smollm2_path
from transformers.utils.logging import disable_progress_bar

from rag_blockcache import BlockCache
from rag_blockcache.answers import Answer
from rag_blockcache.cli.progress import ProgressBar
from rag_blockcache.cli.units import format_bytes, format_count, format_seconds
from rag_blockcache.errors import IndexMismatchError
from rag_blockcache.jobs.index_and_prefill import index_and_prefill, settings_of
from rag_blockcache.jobs.splitting import PassageSplitter
from rag_blockcache.manifest import Manifest
from rag_blockcache.retriever import Retriever

NUM_WORDS = 16_500  # of the reference; prefilled in a minute or two on two cores
QUESTIONS = {  # and how many passages each is answered from, so that the plot shows short and long prompts
    "What does the break statement do?": 2,
    "What does the del statement do?": 3,
    "How do I write an anonymous function?": 6,
    "What is the purpose of the with statement?": 9,
    "What does the return statement do?": 13,
}

ADAPTER = Path(__file__).parent / "adapters" / "smollm2-135m-instruct-block"

console = Console(highlight=False)


@dataclass(frozen=True)
class Measurement:
    """One prompt: answered from reused blocks, and the time to its first token without them.

    Attributes:
        reused: What the user sees, under the default policy.
        full_ttft_seconds: With everything computed, as without this library.
    """

    reused: Answer
    full_ttft_seconds: float

    @property
    def num_tokens(self) -> int:
        """Length of the prompt."""
        return self.reused.num_reused_tokens + self.reused.num_computed_tokens


def write_corpus(folder: Path, num_words: int | None) -> None:
    """Write topics as text files, the shortest first, up to so many words; None writes all."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen: dict[str, str] = {}
    total = 0
    for text, name in sorted(
        {text: name for name, text in topics.items()}.items(), key=lambda topic: len(topic[0])
    ):
        total += len(text.split())
        if num_words is not None and total > num_words:
            break
        chosen[f"{name}.txt"] = text
    for path in folder.iterdir():
        if path.name not in chosen:
            path.unlink()
    for name, text in chosen.items():
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    words = sum(len(text.split()) for text in chosen.values())
    console.print(
        f"Corpus: {len(chosen)} of {len(topics)} topics of the Python language reference, {words:,} words"
        f"{'' if num_words is None else ' (--all takes everything)'}, in {folder}"
    )


def ask(cache: BlockCache, retriever: Retriever, question: str, num_passages: int) -> Measurement:
    """Stream an answer and show its sources, then take the time of full prefill on the same prompt."""
    found = retriever.search(question, k=num_passages)
    passages = [result.passage for result in reversed(found)]  # the best one next to the question
    console.print(f"\n[bold]{question}[/bold]")
    stream = cache.stream(question, passages, max_new_tokens=40, do_sample=False)
    for piece in stream:
        console.print(piece, end="", markup=False, soft_wrap=True)
    answer = stream.answer
    assert answer is not None  # it is there once the stream was read to its end
    alone = cache.generate(question, passages, max_new_tokens=1, policy="full", do_sample=False)
    full = alone.ttft_seconds
    sources = dict.fromkeys(Path(str(result.passage.metadata["source"])).stem for result in found)
    console.print(
        f"\n[dim]from {len(found)} passages of {', '.join(sources)}\nfirst token after "
        f"{format_seconds(answer.ttft_seconds)}, with full prefill after {format_seconds(full)}[/dim]"
    )
    return Measurement(answer, full)


def show(measurements: list[Measurement], num_bytes_on_disk: int) -> None:
    """Draw the table."""
    table = Table(title="Time to the first token, over the same token ids", title_justify="left", box=SIMPLE)
    for column in ("#", "tokens", "hits", "reused", "default", "full", "sooner"):
        table.add_column(column, justify="right", no_wrap=True)
    for number, each in enumerate(measurements, start=1):
        answer = each.reused
        table.add_row(
            str(number),
            f"{each.num_tokens:,}",
            f"{answer.num_hits}/{answer.num_hits + answer.num_misses}",
            f"{answer.num_reused_tokens:,}",
            format_seconds(answer.ttft_seconds),
            format_seconds(each.full_ttft_seconds),
            f"{each.full_ttft_seconds / answer.ttft_seconds:.1f}x",
        )
    console.print()
    console.print(table)
    policies = {each.reused.policy: each.reused.policy_reason for each in measurements}
    for policy, reason in policies.items():
        console.print(f"default: policy {policy}, because {reason}")
    console.print("full: full prefill, as without reuse")
    console.print(
        f"On disk: {format_bytes(num_bytes_on_disk)}. Each time was taken once; `make bench` takes more care."
    )


def plot(measurements: list[Measurement], path: Path) -> None:
    """Draw time to first token over the length of the prompt."""
    import matplotlib

    matplotlib.use("Agg")  # a file, no window
    from matplotlib import pyplot

    shown = sorted(measurements, key=lambda each: each.num_tokens)
    lengths = [each.num_tokens for each in shown]
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for label, color, seconds in (
        ("full prefill", "#b0413e", [each.full_ttft_seconds for each in shown]),
        ("reused blocks, default policy", "#2e7d32", [each.reused.ttft_seconds for each in shown]),
    ):
        axes.plot(lengths, seconds, "o-", color=color, label=label)
    for each in shown:
        times = f"{each.full_ttft_seconds / each.reused.ttft_seconds:.1f}x"
        middle = (each.full_ttft_seconds * each.reused.ttft_seconds) ** 0.5
        axes.annotate(times, (each.num_tokens, middle), ha="center", color="#546e7a", fontsize=9)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("prompt, tokens")
    axes.set_ylabel("time to first token, seconds")
    axes.set_title("SmolLM2-135M: the same prompts, prefilled in full and from reused blocks", fontsize=11)
    axes.grid(which="both", alpha=0.25)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    console.print(f"Plot: {path}")


def index(
    corpus: Path, cache: BlockCache, retriever: Retriever, directory: Path, adapter: Path | None
) -> None:
    """Run the job, with a progress bar; what is there already is not done again."""
    splitter = PassageSplitter(cache.tokenizer, max_tokens=256)
    settings = replace(settings_of(cache, retriever, splitter), adapter=str(adapter or ""))
    with closing(Manifest(directory)) as manifest, ProgressBar(Console(stderr=True)) as progress:
        report = index_and_prefill(
            [corpus],
            cache=cache,
            retriever=retriever,
            manifest=manifest,
            splitter=splitter,
            settings=settings,
            progress=progress,
        )
    console.print(
        f"Prefilled {format_count(report.num_encoded_blocks, 'passage')} ({report.num_tokens:,} tokens, "
        f"{format_bytes(report.num_bytes)}) in {format_seconds(report.seconds.get('prefill', 0.0))}; "
        f"{format_count(report.num_unchanged_documents, 'document')} had been done before"
    )


def run(corpus: Path, directory: Path, adapter: Path | None) -> tuple[list[Measurement], int]:
    """Index and ask; return the measurements, and how many bytes the blocks take on disk."""
    with (
        BlockCache(smollm2_path(), directory, adapter=adapter, context_budget_bytes=0) as cache,
        closing(Retriever(directory / "index", embedder=str(minilm_path()))) as retriever,
    ):
        index(corpus, cache, retriever, directory, adapter)
        # The first request of a process also measures from where on reuse pays, which is not shown here.
        cache.generate("Are you ready?", retriever.get(list(islice(retriever, 2))), max_new_tokens=1)
        console.print("\nSmolLM2-135M is very small: it shows how soon answers come, not how wise they are.")
        measurements = [ask(cache, retriever, *question) for question in QUESTIONS.items()]
        return measurements, cache.store.size_bytes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="index the whole reference")
    parser.add_argument(
        "--stock", action="store_true", help="take the model as published, without the adapter"
    )
    parser.add_argument(
        "--folder", type=Path, help="where corpus and index are kept; default: the user's cache"
    )
    parser.add_argument("--plot", type=Path, default=Path("demo-output/ttft.png"), help="where the plot goes")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    disable_progress_bar()  # transformers draws one for every file it reads

    folder = (options.folder or cache_folder() / "demo").resolve()
    corpus, directory = folder / "corpus", folder / ("stock-index" if options.stock else "index")
    adapter = None if options.stock else ADAPTER
    write_corpus(corpus, None if options.all else NUM_WORDS)
    console.print("Loading the models (SmolLM2 is unpacked once, which takes half a minute)")
    try:
        measurements, num_bytes = run(corpus, directory, adapter)
    except IndexMismatchError as error:  # from a demo of another checkout or version
        console.print(f"Starting over: {error}", markup=False)
        shutil.rmtree(directory)
        measurements, num_bytes = run(corpus, directory, adapter)
    show(measurements, num_bytes)
    plot(measurements, options.plot)
    console.print(f'Ask more: {sys.executable} -m rag_blockcache.cli ask {directory} "..."', soft_wrap=True)
    if not all(each.reused.num_hits for each in measurements):
        raise SystemExit("a question found none of its passages prefilled; that is a bug")


if __name__ == "__main__":
    main()
