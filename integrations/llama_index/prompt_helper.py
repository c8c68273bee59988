"""``BlockPromptHelper``: packs whole passages into a context window that is too small for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

from llama_index.core import Settings
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.constants import DEFAULT_CONTEXT_WINDOW, DEFAULT_NUM_OUTPUTS
from llama_index.core.indices.prompt_helper import (
    DEFAULT_CHUNK_OVERLAP_RATIO,
    DEFAULT_PADDING,
    PromptHelper,
)
from llama_index.core.llms.llm import LLM
from llama_index.core.node_parser import TokenTextSplitter
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.tools import BaseTool
from llama_index.core.utilities.token_counting import TokenCounter
from pydantic import PrivateAttr
from transformers import PreTrainedTokenizerBase

from rag_blockcache import SharedCache

_SEPARATOR = "\n\n"  # LlamaIndex puts it between passages
_MAX_CHARACTERS = 2**22  # of texts whose count is remembered
_MAX_PACKS = 256
_NUM_MESSAGE_TOKENS = 3  # what LlamaIndex counts for the frame of a message


class ModelTokenizer:
    """Counts tokens as the model does; the tokenizer is loaded when it is first needed.

    Args:
        engine: Whose tokenizer it is.
    """

    def __init__(self, engine: SharedCache) -> None:
        self._engine = engine

    def __call__(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens around it."""
        token_ids: list[int] = self._engine.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return token_ids

    def __reduce__(self) -> tuple[Any, ...]:
        """Send the tokenizer alone to another process, such as one that splits documents."""
        return _encoder, (self._engine.tokenizer,)

    @cached_property
    def num_template_tokens(self) -> int:
        """How many tokens the chat template puts around a single message."""
        if not self._engine.has_chat_template:
            return 0
        message = {"role": "user", "content": "?"}
        rendered = self._engine.tokenizer.apply_chat_template(
            [message], tokenize=False, add_generation_prompt=True
        )
        return len(self(str(rendered)))


def _encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[int]]:
    return partial(tokenizer.encode, add_special_tokens=False, verbose=False)


class _Counter(TokenCounter):
    """Counts each text once, and messages without the thread that LlamaIndex starts to count them."""

    def __init__(self, tokenizer: Callable[[str], list[Any]] | None = None) -> None:
        super().__init__(tokenizer)
        self._known: dict[str, int] = {}
        self._num_characters = 0

    def get_string_tokens(self, string: str) -> int:
        """Count the tokens of a text; passages come again and again."""
        num_tokens = self._known.get(string)
        if num_tokens is None:
            num_tokens = len(self.tokenizer(string))
            if self._num_characters > _MAX_CHARACTERS:
                self._known, self._num_characters = {}, 0
            self._known[string] = num_tokens
            self._num_characters += len(string)
        return num_tokens

    def estimate_tokens_in_messages(self, messages: list[ChatMessage]) -> int:
        """Count the tokens of messages; those with more than text in them are left to LlamaIndex."""
        if any(message.content is None or message.additional_kwargs for message in messages):
            return super().estimate_tokens_in_messages(messages)
        texts = [text for message in messages for text in (message.role.value, message.content or "")]
        return sum(map(self.get_string_tokens, texts)) + _NUM_MESSAGE_TOKENS * len(messages)


class BlockPromptHelper(PromptHelper):
    r"""A prompt helper that never cuts a passage which fits, so that its block can be reused.

    What LlamaIndex's own helper puts into one prompt stands in one prompt here, to the letter. Where there is
    more than fits, LlamaIndex joins the passages and cuts them by tokens; here every prompt has whole ones,
    which may take a prompt more. A passage that is too long by itself is cut as ever.

    Args:
        context_window: None takes that of the LLM in use, as does ``num_output``.
        num_output: Tokens that are left for the answer.
        chunk_overlap_ratio: For a passage that must be cut.
        chunk_size_limit: As in ``PromptHelper``.
        tokenizer: None takes that of LlamaIndex's ``Settings``.
        separator: As in ``PromptHelper``.

    Example:
        >>> from llama_index.core import PromptTemplate
        >>> helper = BlockPromptHelper(context_window=20, num_output=10, tokenizer=str.split)
        >>> helper.repack(PromptTemplate("{context_str}"), ["Ada wrote it.", "Charles built it", "and paid."])
        ['Ada wrote it.', 'Charles built it\n\nand paid.']
    """

    _packs: dict[str, Sequence[str]] = PrivateAttr(default_factory=dict)

    def __init__(
        self,
        context_window: int | None = None,
        num_output: int | None = None,
        chunk_overlap_ratio: float = DEFAULT_CHUNK_OVERLAP_RATIO,
        chunk_size_limit: int | None = None,
        tokenizer: Callable[[str], list[Any]] | None = None,
        separator: str = " ",
    ) -> None:
        super().__init__(
            context_window or DEFAULT_CONTEXT_WINDOW,
            num_output or DEFAULT_NUM_OUTPUTS,
            chunk_overlap_ratio,
            chunk_size_limit,
            tokenizer,
            separator,
        )
        self._token_counter = _Counter(tokenizer)
        chosen = {"context_window": context_window, "num_output": num_output}
        self.model_fields_set.difference_update(name for name, value in chosen.items() if value is None)

    @classmethod
    def class_name(cls) -> str:
        """Return the name that LlamaIndex serializes it under."""
        return "BlockPromptHelper"

    def get_text_splitter_given_prompt(
        self,
        prompt: BasePromptTemplate,
        num_chunks: int = 1,
        padding: int = DEFAULT_PADDING,
        llm: LLM | None = None,
        tools: list[BaseTool] | None = None,
    ) -> TokenTextSplitter:
        """Return a splitter for the room that a prompt leaves, and the chat template around it."""
        padding += getattr(self._token_counter.tokenizer, "num_template_tokens", 0)
        helper = self if llm is None else self._following(llm)
        return super(BlockPromptHelper, helper).get_text_splitter_given_prompt(
            prompt, num_chunks, padding, llm, tools
        )

    def repack(
        self,
        prompt: BasePromptTemplate,
        text_chunks: Sequence[str],
        padding: int = DEFAULT_PADDING,
        llm: LLM | None = None,
        tools: list[BaseTool] | None = None,
    ) -> list[str]:
        """Join as many passages as fit into one prompt, in their order, each of them whole."""
        splitter = self.get_text_splitter_given_prompt(prompt, padding=padding, llm=llm, tools=tools)
        texts = [text for chunk in text_chunks for text in self._packs.get(chunk, (chunk.strip(),)) if text]
        count = self._token_counter.get_string_tokens
        between = count(_SEPARATOR)
        packs: list[list[str]] = []
        room = 0
        for text in texts:
            num_tokens = count(text)
            if num_tokens > splitter.chunk_size:
                packs += [[piece] for piece in splitter.split_text(text)]
                room = 0
            elif num_tokens + between <= room:
                packs[-1].append(text)
                room -= num_tokens + between
            else:
                packs.append([text])
                room = splitter.chunk_size - num_tokens
        return [self._joined(pack) for pack in packs] or [""]

    def _joined(self, pack: Sequence[str]) -> str:
        """Join the passages of a pack, and remember them: it comes again with less room, to be refined."""
        joined = _SEPARATOR.join(pack)
        if len(pack) > 1:
            if len(self._packs) >= _MAX_PACKS:
                self._packs.clear()
            self._packs[joined] = pack
        return joined

    def _following(self, llm: LLM) -> BlockPromptHelper:
        """Return this helper with the window of an LLM, unless one was chosen."""
        known = llm.metadata
        sizes = {"context_window": known.context_window, "num_output": known.num_output}
        followed = {name: size for name, size in sizes.items() if name not in self.model_fields_set}
        return self.model_copy(update=followed)


def use_in_settings(tokenizer: ModelTokenizer) -> None:
    """Have LlamaIndex count tokens as the model does, and pack whole passages if no helper was chosen."""
    Settings.tokenizer = tokenizer
    helper = getattr(Settings, "_prompt_helper", None)
    if helper is None or isinstance(helper._token_counter.tokenizer, ModelTokenizer):
        Settings.prompt_helper = BlockPromptHelper(tokenizer=tokenizer)
