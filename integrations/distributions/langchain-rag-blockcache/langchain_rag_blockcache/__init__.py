"""The LangChain classes of rag_blockcache, where LangChain users look for them."""

from rag_blockcache.integrations.langchain import BlockCacheLLM, BlockCacheVectorStore, ChatBlockCache

__all__ = ["BlockCacheLLM", "BlockCacheVectorStore", "ChatBlockCache"]
