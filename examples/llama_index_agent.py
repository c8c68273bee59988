"""An agent that looks things up with a retriever tool, on a ``BlockCacheLLM``.

Run it with ``python examples/llama_index_agent.py``. What the tool returns stands in a tool message, in the
middle of the prompt, and is reused there. The model is too small to see for itself that it must look
something up, so the agent is told to begin with that; what it looks up is the model's choice. It needs no
network; see ``small_models``.
"""

import asyncio
import tempfile
from enum import StrEnum
from pydoc_data.topics import topics

from llama_index.core import Document, Settings, VectorStoreIndex
from llama_index.core.agent.workflow import FunctionAgent, ToolCallResult
from llama_index.core.tools import RetrieverTool, ToolMetadata
from llama_index_parts import MiniLM, print_reuse
from pydantic import BaseModel
from rag_blockcache.integrations.llama_index import BlockCacheLLM
from small_models import smollm2_path

NAMES = ["pass", "break", "continue", "global", "nonlocal", "assert", "del", "return", "while", "yield"]
QUESTIONS = ["What does the break statement do?", "What does continue do?", "When does a while loop end?"]


class LookUp(BaseModel):
    """Look a statement of Python up in its reference."""

    statement: StrEnum("Statement", NAMES)


async def main(directory: str) -> None:
    Settings.embed_model = MiniLM()
    llm = BlockCacheLLM(model_name=smollm2_path(), cache_dir=directory, max_new_tokens=48)
    index = VectorStoreIndex.from_documents([Document(text=topics[name]) for name in NAMES])
    about = ToolMetadata(name="look_up", description=LookUp.__doc__, fn_schema=LookUp)
    tool = RetrieverTool(index.as_retriever(similarity_top_k=3), about)
    agent = FunctionAgent(llm=llm, tools=[tool], initial_tool_choice="look_up")

    print_reuse()
    for question in QUESTIONS:
        print(f"\n{question}")
        running = agent.run(question)
        async for event in running.stream_events():
            if isinstance(event, ToolCallResult):
                print(f"  looks up {event.tool_kwargs}")
        print(await running)
    llm.engine.close()


with tempfile.TemporaryDirectory() as directory:
    asyncio.run(main(directory))
