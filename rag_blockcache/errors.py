"""Every error that the library raises on purpose, as one small tree.

Each message says what came, what is needed, and what to do next. Whatever is not below
``RagBlockCacheError`` is a bug of ours or of a library underneath.
"""


class RagBlockCacheError(Exception):
    """Root of all errors raised on purpose."""


class InvalidInputError(RagBlockCacheError, ValueError):
    """An argument cannot be used: an empty question, an unknown policy, a passage without text."""


class ContextTooLongError(InvalidInputError):
    """The prompt, with room for the answer, exceeds the context window of the model."""


class UnsupportedModelError(RagBlockCacheError):
    """The model cannot be served exactly: it keeps other states than plain keys and values, say."""


class ModelNotFoundError(RagBlockCacheError):
    """The model, tokenizer, adapter or embedder cannot be found or loaded."""


class StoreError(RagBlockCacheError):
    """A store or index directory cannot be used: foreign, of another format version, not writable."""


class CorruptBlockError(StoreError):
    """A stored block is damaged. It never reaches an answer; delete it and encode it again."""


class OutOfSpaceError(StoreError):
    """The disk is full. What was committed before stays usable."""


class IndexMismatchError(StoreError):
    """An index was made with another model, embedder or prompt format than the one in use."""


class MissingDependencyError(RagBlockCacheError, ImportError):
    """An optional library is not installed; the message names the extra that brings it."""
