"""An agent that looks things up with a retriever tool, on a ``ChatBlockCache``.

Run it with ``python examples/langchain_agent.py``. What the tool returns stands in a tool message, in the
middle of the prompt, and is reused there. The model is too small to see for itself that it must look
something up, so the middleware has it call the tool first; what it looks up is its own choice. It needs no
network; see ``small_models``.
"""

import tempfile
from pydoc_data.topics import topics
from typing import Literal

from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langchain_core.documents import Document
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_embeddings import MiniLM
from rag_blockcache.integrations.langchain import ChatBlockCache
from small_models import smollm2_path

NAMES = ["pass", "break", "continue", "global", "nonlocal", "assert", "del", "return", "while", "yield"]
QUESTIONS = ["What does the break statement do?", "What does continue do?", "When does a while loop end?"]

documents = [Document(topics[name], metadata={"source": name}) for name in NAMES]
retriever = InMemoryVectorStore.from_documents(documents, MiniLM()).as_retriever(search_kwargs={"k": 3})


@tool(response_format="content_and_artifact")
def look_up(statement: Literal[tuple(NAMES)]) -> tuple[str, list[Document]]:
    """Look a statement up in the Python reference."""
    found = retriever.invoke(f"The {statement} statement")
    return "\n\n".join(document.page_content for document in found), found


@wrap_model_call
def look_up_first(request, handler):
    """Have the model call a tool when it is asked, and answer when it was called."""
    is_asked = isinstance(request.messages[-1], HumanMessage)
    return handler(request.override(tool_choice="any" if is_asked else "none"))


with tempfile.TemporaryDirectory() as directory:
    model = ChatBlockCache(model=smollm2_path(), cache_dir=directory, max_tokens=48)
    agent = create_agent(model, [look_up], middleware=[look_up_first])
    model.engine.get()  # loads it now, so that the first question shows what reading passages takes
    for question in QUESTIONS:
        called, _, answered = agent.invoke({"messages": [("human", question)]})["messages"][1:]
        told, tokens = answered.response_metadata, answered.usage_metadata
        print(f"\n{question}  -> {called.tool_calls[0]['args']}\n{answered.text}")
        print(
            f"  first token after {told['ttft_seconds']:.3f} s: {told['num_hits']} passages reused, "
            f"{told['num_misses']} encoded, {tokens['input_token_details']['cache_read']} of "
            f"{tokens['input_tokens']} tokens not computed ({told['policy']})"
        )
    model.engine.close()
