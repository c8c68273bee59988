"""A conversation with memory: LlamaIndex's chat engine, streaming, over a ``BlockCacheLLM``.

Run it with ``python examples/llama_index_chat_engine.py``. Documents are prefilled when they are indexed, so
the first question of all is answered from reused passages; in later turns they stand in the system message,
before all that was said. It needs no network; see ``small_models``.
"""

import tempfile
from pydoc_data.topics import topics

from llama_index.core import Document, Settings, StorageContext, VectorStoreIndex
from llama_index_parts import MiniLM, print_reuse
from rag_blockcache.integrations.llama_index import BlockCacheLLM, BlockCacheVectorStore
from small_models import smollm2_path

NAMES = ["pass", "break", "continue", "global", "nonlocal", "assert", "del", "return", "while", "yield"]
TURNS = ["What does the break statement do?", "And what does continue do?", "Which of them ends a loop?"]

with tempfile.TemporaryDirectory() as directory:
    Settings.embed_model = MiniLM()
    Settings.llm = BlockCacheLLM(model_name=smollm2_path(), cache_dir=directory, max_new_tokens=48)

    store = BlockCacheVectorStore(model_name=smollm2_path(), cache_dir=directory)  # shares the LLM's engine
    documents = [Document(text=topics[name], metadata={"topic": name}) for name in NAMES]
    index = VectorStoreIndex.from_documents(
        documents, storage_context=StorageContext.from_defaults(vector_store=store)
    )

    print_reuse()
    engine = index.as_chat_engine(chat_mode="context", similarity_top_k=3)
    for question in TURNS:
        print(f"\n{question}")
        for piece in engine.stream_chat(question).response_gen:
            print(piece, end="", flush=True)
        print()
    store.close()
    Settings.llm.engine.close()
