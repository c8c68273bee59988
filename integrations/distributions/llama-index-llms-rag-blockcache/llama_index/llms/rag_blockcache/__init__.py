"""The LlamaIndex classes of rag_blockcache, where LlamaIndex users look for them."""

from rag_blockcache.integrations.llama_index import BlockCacheLLM, BlockCacheVectorStore, BlockPromptHelper

__all__ = ["BlockCacheLLM", "BlockCacheVectorStore", "BlockPromptHelper"]
