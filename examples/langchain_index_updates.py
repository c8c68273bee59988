"""LangChain's ``index()`` keeps a store up to date, and the KV states of its documents with it.

Run it with ``python examples/langchain_index_updates.py``. Of documents that changed only the new text is
encoded, of those that went the KV states are dropped; answers reuse the rest. It needs no network; see
``small_models``.
"""

import tempfile
from pydoc_data.topics import topics

from langchain_core.documents import Document
from langchain_core.indexing import InMemoryRecordManager, index
from langchain_embeddings import MiniLM
from rag_blockcache.integrations.langchain import BlockCacheVectorStore, ChatBlockCache
from small_models import smollm2_path

QUESTION = "What does the break statement do?"
first = {name: topics[name] for name in ["pass", "break", "continue", "global", "assert", "return", "while"]}
changed = first | {"break": f"{first['break']}\nIt has been in the language from the beginning."}
smaller = {name: text for name, text in changed.items() if name not in ("global", "assert")}

with tempfile.TemporaryDirectory() as directory:
    model = ChatBlockCache(model=smollm2_path(), cache_dir=directory, max_tokens=32)
    store = BlockCacheVectorStore(MiniLM(), directory, model=smollm2_path())  # shares the model's engine
    records = InMemoryRecordManager("python reference")
    records.create_schema()
    retriever = store.as_retriever(k=3)

    for title, texts in {
        "seven": first,
        "the same": first,
        "one changed": changed,
        "two gone": smaller,
    }.items():
        before = store.index.totals
        documents = [Document(text, metadata={"source": name}) for name, text in texts.items()]
        done = index(documents, records, store, cleanup="full", source_id_key="source", key_encoder="blake2b")
        now = store.index.totals
        num_encoded = now.num_encoded_blocks - before.num_encoded_blocks
        num_dropped = now.num_dropped_blocks - before.num_dropped_blocks
        print(
            f"\n{title}: {done['num_added']} documents added, {done['num_skipped']} skipped, "
            f"{done['num_deleted']} deleted; {num_encoded} blocks encoded, {num_dropped} dropped"
        )
        context = "\n\n".join(document.page_content for document in retriever.invoke(QUESTION))
        answer = model.invoke(f"Answer from this context:\n\n{context}\n\nQuestion: {QUESTION}")
        told, tokens = answer.response_metadata, answer.usage_metadata
        print(
            f"  first token after {told['ttft_seconds']:.3f} s: {told['num_hits']} passages reused, "
            f"{told['num_misses']} encoded, {tokens['input_token_details']['cache_read']} of "
            f"{tokens['input_tokens']} tokens not computed ({told['policy']})"
        )
    store.close()
    model.engine.close()
