"""Fixtures: tiny random models and a tiny tokenizer made here, and a real model where it is installed."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import architectures

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Make a tokenizer with a token a byte, and the control tokens of ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    control = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: index for index, token in enumerate([*control, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(autouse=True)
def _restore_log() -> Iterator[None]:
    """The command line turns the library's log down and gives it a handler: not for the tests after it."""
    logger = logging.getLogger("rag_blockcache")
    level, handlers = logger.level, logger.handlers[:]
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, ChatML."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_model() -> PreTrainedModel:
    """A Llama of three layers with random weights, float32, and a window of 2,048 tokens."""
    return architectures.build("Llama", {"max_position_embeddings": 2048})


@pytest.fixture
def tiny_cache(tiny_model, tiny_tokenizer, tmp_path) -> Iterator[object]:
    """A BlockCache of the paper's blocks over the tiny model, on disk in a folder of the test's own."""
    from rag_blockcache import BlockCache

    with BlockCache(
        tiny_model, tmp_path / "cache", tokenizer=tiny_tokenizer, blocks_see="themselves"
    ) as cache:
        yield cache


@pytest.fixture(scope="session")
def tiny_model_path(tiny_model, tiny_tokenizer, tmp_path_factory) -> Path:
    """The tiny model and its tokenizer, saved, to be loaded by path."""
    folder = tmp_path_factory.mktemp("tiny-model")
    tiny_model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct, from the package that carries it."""
    import small_models

    from rag_blockcache.errors import MissingDependencyError

    try:
        return small_models.smollm2_path()
    except MissingDependencyError as error:
        pytest.skip(f"real weights are not installed: {error}")


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(max(1, min(2, torch.get_num_threads())))
