"""What no document holds any more leaves an index: text and block first, then the vector, then the record.

Until the record goes, wherever a process dies, the passage is found there again, and removed once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from rag_blockcache.manifest import Manifest
from rag_blockcache.passages import Passage

if TYPE_CHECKING:
    from rag_blockcache.block_cache import BlockCache
    from rag_blockcache.retriever import Retriever

_MAX_ALIKE = 100  # passages looked at; the text of a footer may be that of thousands

OtherForms: TypeAlias = Callable[[Passage], Iterable[str]]


def no_other_forms(_: Passage) -> Iterable[str]:
    """Say that passages are shown as they are, and in no other form."""
    return ()


class Removal:
    """Removes passages and blocks that nobody needs.

    Args:
        cache: Has the blocks, and knows the texts.
        retriever: Has the passages.
        manifest: Says what is needed.
        other_forms: In which texts a passage may be shown beside its own; they are forgotten with it.
    """

    def __init__(
        self,
        *,
        cache: BlockCache,
        retriever: Retriever,
        manifest: Manifest,
        other_forms: OtherForms = no_other_forms,
    ) -> None:
        self._cache, self._retriever, self._manifest = cache, retriever, manifest
        self._other_forms = other_forms

    def drop_unused(self) -> tuple[int, int]:
        """Drop what is released from the manifest; return how many passages and how many blocks that was."""
        num_passages = self._manifest.drop_passages(self.delete)
        return num_passages, self._manifest.drop_blocks(self._delete_blocks)

    def delete(self, passage_ids: Sequence[str]) -> None:
        """Delete passages from the retriever, with their texts and blocks as far as no other needs them."""
        self.forget(self._retriever.get(passage_ids))
        self._retriever.delete(passage_ids)

    def forget(self, passages: Sequence[Passage]) -> None:
        """Forget texts of passages that were released, and delete their blocks, unless others need them.

        What has the same block as a passage that stays, stays known; in a format that shows no titles that
        is every passage with the same text. A form that another passage has too is forgotten, unless the two
        passages are alike, and so is the text of one that another has under another title, in a format that
        shows titles: the texts are a set, of which nobody counts who added what. It costs no more than that
        the text is not found by itself in a prompt, until it is retrieved or prefilled again.
        """
        names = {passage: self._cache.block(passage).block_id for passage in passages}
        forms = {Passage(text) for passage in passages for text in self._other_forms(passage)}
        if forms:
            forms -= self._forms_with_blocks(names.values())
            names |= {form: self._cache.block(form).block_id for form in forms}
        needed = self._manifest.needed_blocks(names.values())
        self._cache.forget([passage for passage, name in names.items() if name not in needed])

    def _forms_with_blocks(self, block_ids: Iterable[str]) -> set[Passage]:
        alike = self._manifest.passages_with_blocks(block_ids, limit=_MAX_ALIKE)
        return {Passage(text) for other in self._retriever.get(alike) for text in self._other_forms(other)}

    def _delete_blocks(self, block_ids: Iterable[str]) -> None:
        for block_id in block_ids:
            self._cache.store.pop(block_id, None)


def only_counted(manifest: Manifest) -> tuple[int, int]:
    """Drop what is released from a manifest that is a copy; return how many passages and blocks that was."""
    return manifest.drop_passages(lambda _: None), manifest.drop_blocks(lambda _: None)
