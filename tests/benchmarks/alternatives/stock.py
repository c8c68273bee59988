"""transformers as it comes: a full prefill, and one that goes on from the cache of the last prompt."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from alternatives.prompts import Request
from alternatives.way import FirstToken, TransformersWay


class FullPrefill(TransformersWay):
    """Computes the whole prompt."""

    def cached(self, request: Request) -> DynamicCache:
        return DynamicCache()


class PrefixCache(TransformersWay):
    """Keeps the cache of the last prompt, and computes the next one from the first token that differs.

    It is what prefix caching of vLLM and SGLang can reuse for one user, to the token instead of to the page.
    """

    def __init__(self, network: PreTrainedModel) -> None:
        super().__init__(network)
        self._token_ids: list[int] = []
        self._cache = DynamicCache()

    def cached(self, request: Request) -> DynamicCache:
        token_ids = request.token_ids
        num_shared = common_prefix(self._token_ids, token_ids[:-1])  # the last one gives the logits
        if num_shared < len(self._token_ids):
            self._cache.crop(num_shared - len(self._token_ids))
        self._token_ids = token_ids
        return self._cache

    def first_token(self, request: Request) -> FirstToken:
        """Compute the first token; a pass that fails leaves no cache that would be taken for a whole one."""
        try:
            return super().first_token(request)
        except BaseException:
            self._token_ids, self._cache = [], DynamicCache()
            raise


def common_prefix(one: list[int], other: list[int]) -> int:
    """Return how many tokens two prompts begin with alike."""
    for index, (first, second) in enumerate(zip(one, other, strict=False)):
        if first != second:
            return index
    return min(len(one), len(other))
