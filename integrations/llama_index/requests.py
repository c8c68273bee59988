"""What an LLM is asked, as requests to the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.generic_utils import messages_to_prompt as generic_messages_to_prompt
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, MessageRole
from llama_index.core.llms.llm import default_completion_to_prompt

from rag_blockcache import Answer, Chat, Text
from rag_blockcache.errors import InvalidInputError

from .hints import current_hints
from .messages import cited_texts, template_messages
from .options import call_options
from .responses import chat_response

if TYPE_CHECKING:
    from .llm import BlockCacheLLM

Request = Chat | Text
Options = dict[str, Any]


def chat_call(
    llm: BlockCacheLLM, messages: Sequence[ChatMessage], kwargs: Mapping[str, Any]
) -> tuple[Request, Options, Callable[[Answer], ChatResponse]]:
    """Return what to ask for messages, options of ``answer()``, and what makes a response of the answer.

    Raises:
        InvalidInputError: If there are tools, and no chat template to show them.
    """
    given = dict(kwargs)
    to_response = partial(chat_response, num_calls=None if given.pop("parallel_tool_calls", True) else 1)
    fields, options = _parted(llm, given, cited_texts(messages))
    if llm.messages_to_prompt in (None, generic_messages_to_prompt):
        return Chat(template_messages(messages), **fields), options, to_response
    tools, tool_choice = fields.pop("tools", ()), fields.pop("tool_choice", "auto")
    if tools and tool_choice != "none":
        raise InvalidInputError(
            "messages_to_prompt has no place for tools; leave it out, and the chat template shows them"
        )
    return Text(llm.messages_to_prompt(messages), **fields), options, to_response


def completion_call(
    llm: BlockCacheLLM, prompt: str, formatted: bool, kwargs: Mapping[str, Any]
) -> tuple[Request, Options]:
    """Return what to ask for a prompt, and options of ``answer()``."""
    fields, options = _parted(llm, kwargs)
    if formatted:
        return Text(prompt, **fields), options
    if llm.query_wrapper_prompt is not None:
        prompt = llm.query_wrapper_prompt.format(query_str=prompt)
    if llm.completion_to_prompt not in (None, default_completion_to_prompt):
        return Text(llm.completion_to_prompt(prompt), **fields), options
    if llm.metadata.is_chat_model:
        system = [ChatMessage(llm.system_prompt, role=MessageRole.SYSTEM)] if llm.system_prompt else []
        return Chat(template_messages([*system, ChatMessage(prompt)]), **fields), options
    return Text(f"{llm.system_prompt}\n\n{prompt}" if llm.system_prompt else prompt, **fields), options


def as_text(prompt_args: Mapping[str, Any]) -> dict[str, Any]:
    """Undo what SimpleSummarize does: it passes its context in a list, whose quotes the model would read."""
    texts = prompt_args.get("context_str")
    return {**prompt_args, "context_str": "\n".join(texts)} if isinstance(texts, list) else {**prompt_args}


def _parted(
    llm: BlockCacheLLM, kwargs: Mapping[str, Any], texts: Sequence[str] = ()
) -> tuple[dict[str, Any], Options]:
    """Return fields of a request, with all hints there are, and options of ``answer()``."""
    defaults = {"max_new_tokens": llm.max_new_tokens, "policy": llm.policy}
    fields, options = call_options(defaults, llm.generate_kwargs, kwargs, stopping_ids=llm.stopping_ids)
    noted = current_hints() if llm.uses_hints else ()
    return {**fields, "hints": [*fields.get("hints", ()), *texts, *noted]}, options
