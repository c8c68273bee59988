"""all-MiniLM-L6-v2 as LangChain takes embeddings; it comes as a package, see ``small_models``."""

from langchain_core.embeddings import Embeddings
from sentence_transformers import SentenceTransformer
from small_models import minilm_path


class MiniLM(Embeddings):
    """Embeds texts with all-MiniLM-L6-v2."""

    def __init__(self) -> None:
        self._model = SentenceTransformer(str(minilm_path()))

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return a vector for each text."""
        return self._model.encode(texts).tolist()

    def embed_query(self, text: str) -> list[float]:
        """Return the vector of a question."""
        return self.embed_documents([text])[0]
