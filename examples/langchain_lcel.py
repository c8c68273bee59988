"""An LCEL chain as in every tutorial; its model is a ``ChatBlockCache``, and nothing else is new.

Run it with ``python examples/langchain_lcel.py``. The first question encodes the passages that it retrieves,
later ones reuse those that come up again, in any order. It needs no network; see ``small_models``.
"""

import tempfile
from pydoc_data.topics import topics

from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_embeddings import MiniLM
from rag_blockcache.integrations.langchain import ChatBlockCache
from small_models import smollm2_path

NAMES = ["pass", "break", "continue", "global", "nonlocal", "assert", "del", "return", "while", "yield"]
QUESTIONS = [
    "What does the break statement do?",
    "What does the continue statement do?",
    "How do I leave a while loop with break?",
]
PROMPT = "Answer from this context:\n\n{context}\n\nQuestion: {question}"


def format_docs(documents: list[Document]) -> str:
    return "\n\n".join(document.page_content for document in documents)


documents = [Document(topics[name], metadata={"source": name}) for name in NAMES]
retriever = InMemoryVectorStore.from_documents(documents, MiniLM()).as_retriever(search_kwargs={"k": 4})

with tempfile.TemporaryDirectory() as directory:
    model = ChatBlockCache(model=smollm2_path(), cache_dir=directory, max_tokens=48)
    chain = (
        {"context": retriever | format_docs, "question": RunnablePassthrough()}
        | ChatPromptTemplate.from_template(PROMPT)
        | model
    )
    model.engine.get()  # loads it now, so that the first question shows what reading passages takes
    for question in QUESTIONS:
        print(f"\n{question}")
        for piece in chain.stream(question):
            print(piece.content, end="", flush=True)
        told, tokens = piece.response_metadata, piece.usage_metadata
        print(
            f"\n  first token after {told['ttft_seconds']:.3f} s: {told['num_hits']} passages reused, "
            f"{told['num_misses']} encoded, {tokens['input_token_details']['cache_read']} of "
            f"{tokens['input_tokens']} tokens not computed ({told['policy']})"
        )
    model.engine.close()
