"""What the examples for LlamaIndex share: an embedding that comes as a package, and a look at each answer."""

from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent
from llama_index_instrumentation import get_dispatcher
from pydantic import PrivateAttr
from sentence_transformers import SentenceTransformer
from small_models import minilm_path


class MiniLM(BaseEmbedding):
    """Embeds texts with all-MiniLM-L6-v2."""

    _model: Any = PrivateAttr(default_factory=lambda: SentenceTransformer(str(minilm_path())))

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._model.encode(texts).tolist()

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    _get_query_embedding = _get_text_embedding

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_query_embedding(query)


class _Reuse(BaseEventHandler):
    def handle(self, event: Any, **_: Any) -> None:
        """Print what LlamaIndex does not hand on to whoever asked."""
        if isinstance(event, LLMChatEndEvent):
            told = event.response.additional_kwargs
            print(
                f"\n  first token after {told['ttft_seconds']:.3f} s: {told['num_hits']} passages reused, "
                f"{told['num_misses']} encoded, {told['num_reused_tokens']} of {told['prompt_tokens']} "
                f"tokens not computed ({event.response.raw['policy']})"
            )


def print_reuse() -> None:
    """Print time to first token and reuse of every answer from here on."""
    get_dispatcher().add_event_handler(_Reuse())
