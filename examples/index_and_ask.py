"""Retrieve, then answer from what was prefilled: ``Retriever`` finds passages, ``BlockCache`` reuses them.

Run it with ``python examples/index_and_ask.py``. The passages are topics of the Python language
reference that every Python carries. It needs no network; see ``small_models``.
"""

import tempfile
from contextlib import closing
from pathlib import Path
from pydoc_data.topics import topics

from small_models import minilm_path, smollm2_path

from rag_blockcache import BlockCache, Passage
from rag_blockcache.retriever import Retriever

NAMES = [
    "pass",
    "break",
    "continue",
    "global",
    "nonlocal",
    "assert",
    "del",
    "return",
    "lambda",
    "while",
    "yield",
]
QUESTIONS = ["What does the break statement do?", "What is a lambda expression?"]

passages = [Passage(topics[name], title=name) for name in NAMES]

with (
    tempfile.TemporaryDirectory() as directory,
    BlockCache(smollm2_path(), directory) as cache,
    closing(Retriever(Path(directory) / "index", embedder=str(minilm_path()))) as retriever,
):
    retriever.add(passages)
    report = cache.prefill(passages)
    print(f"{report.num_encoded} passages, {report.num_tokens} tokens, {report.num_bytes / 1e6:.1f} MB")

    for question in QUESTIONS:
        found = retriever.search(question, k=4)
        print(f"\n{question}  ({', '.join(result.passage.title for result in found)})")
        stream = cache.stream(question, [result.passage for result in reversed(found)], max_new_tokens=48)
        for piece in stream:
            print(piece, end="", flush=True)
        hits, seconds = stream.answer.num_hits, stream.answer.ttft_seconds
        print(f"\n  first token after {seconds:.3f} s, {hits} of {len(found)} passages reused")
