"""Nodes of LlamaIndex to passages and back, without loss and without pickle."""

from __future__ import annotations

from collections.abc import Iterator

from llama_index.core.node_parser.text.sentence_window import DEFAULT_WINDOW_METADATA_KEY
from llama_index.core.schema import (
    BaseNode,
    ImageNode,
    IndexNode,
    MetadataMode,
    NodeRelationship,
    RelatedNodeInfo,
    TextNode,
)
from llama_index.core.vector_stores.utils import metadata_dict_to_node, node_to_metadata_dict

from rag_blockcache import Passage
from rag_blockcache.errors import InvalidInputError

NODE_KEY = "_node_content"  # where LlamaIndex puts the whole node among the metadata


def as_passage(node: BaseNode) -> Passage:
    """Return the passage of a node: what a model is shown of it, and in the metadata all of the node.

    Raises:
        InvalidInputError: If a model is shown nothing of it.
    """
    text = node.get_content(metadata_mode=MetadataMode.LLM).strip()
    if not text:
        raise InvalidInputError(f"node {node.node_id} has no text for a model to read; leave it out")
    return Passage(text, passage_id=node.node_id, metadata=node_to_metadata_dict(node))


def as_node(passage: Passage) -> BaseNode:
    """Return the node that a passage was made of; of a passage from elsewhere, a node that is shown alike."""
    if NODE_KEY in passage.metadata:
        return metadata_dict_to_node(dict(passage.metadata))
    source = passage.metadata.get("source")
    return TextNode(
        id_=passage.passage_id,
        text=passage.text,
        metadata=dict(passage.metadata),
        excluded_llm_metadata_keys=list(passage.metadata),  # the block is of the text alone
        excluded_embed_metadata_keys=list(passage.metadata),
        relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=source)} if source else {},
    )


def source_of(node: BaseNode) -> str:
    """Return the document that a node goes with: the one it came from, or itself."""
    return node.ref_doc_id or node.node_id


def is_kept_by_index(passage: Passage) -> bool:
    """Return whether a ``VectorStoreIndex`` keeps the node of a passage itself, whatever the store keeps."""
    return passage.metadata.get("_node_type") in (ImageNode.class_name(), IndexNode.class_name())


def other_forms(passage: Passage) -> list[str]:
    """Return in which texts LlamaIndex may show a node beside that with its metadata.

    Tools show the text alone; ``MetadataReplacementPostProcessor`` puts the sentence window in its place.
    """
    if NODE_KEY not in passage.metadata:
        return []
    forms = [text.strip() for text in _forms(as_node(passage))]
    return [text for text in dict.fromkeys(forms) if text and text != passage.text]


def _forms(node: BaseNode) -> Iterator[str]:
    yield node.get_content(metadata_mode=MetadataMode.NONE)
    window = node.metadata.get(DEFAULT_WINDOW_METADATA_KEY)
    if isinstance(window, str):
        yield window
        node.set_content(window)
        yield node.get_content(metadata_mode=MetadataMode.LLM)
