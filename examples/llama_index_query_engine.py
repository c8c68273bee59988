"""An existing LlamaIndex application, made faster by one line: the one with ``BlockCacheLLM``.

Run it with ``python examples/llama_index_query_engine.py``. Index, retriever and query engine are those of
LlamaIndex. The first question encodes the passages that were retrieved; the next ones reuse those that they
share. It needs no network; see ``small_models``.
"""

import tempfile
from pydoc_data.topics import topics

from llama_index.core import Document, Settings, VectorStoreIndex
from llama_index_parts import MiniLM, print_reuse
from rag_blockcache.integrations.llama_index import BlockCacheLLM
from small_models import smollm2_path

NAMES = ["pass", "break", "continue", "global", "nonlocal", "assert", "del", "return", "while", "yield"]
QUESTIONS = [
    "What does the break statement do?",
    "What does the continue statement do in a loop?",
    "What does break do to the else clause of a loop?",
]

with tempfile.TemporaryDirectory() as directory:
    Settings.embed_model = MiniLM()
    Settings.llm = BlockCacheLLM(model_name=smollm2_path(), cache_dir=directory, max_new_tokens=48)

    documents = [Document(text=topics[name], metadata={"topic": name}) for name in NAMES]
    engine = VectorStoreIndex.from_documents(documents).as_query_engine(similarity_top_k=4)

    Settings.llm.engine.get()  # loads it now, so that the first question shows what reading passages takes
    print_reuse()
    for question in QUESTIONS:
        print(f"\n{question}")
        print(engine.query(question))
    Settings.llm.engine.close()
