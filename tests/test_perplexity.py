"""Perplexity of a text is that of its own tokens, each foreseen once, whatever the window."""

import math

import pytest
import torch

from rag_blockcache.errors import InvalidInputError
from rag_blockcache.evaluation.perplexity import text_perplexity
from rag_blockcache.model import Model

TEXT = "The mill has a thousand columns of figure wheels, and a store."


@pytest.fixture(scope="module")
def model(tiny_model, tiny_tokenizer):
    return Model(tiny_model, tiny_tokenizer)


@torch.inference_mode()
def test_a_short_text_has_the_perplexity_of_the_loss_of_transformers(model):
    token_ids = torch.tensor([model.tokenizer(TEXT)["input_ids"]])
    loss = model.network(input_ids=token_ids, labels=token_ids).loss
    found = text_perplexity(model, TEXT)
    assert found.perplexity == pytest.approx(math.exp(float(loss)), rel=1e-5)
    assert found.num_tokens == token_ids.shape[1] - 1


@torch.inference_mode()
def test_a_sliding_window_foresees_each_token_once_from_half_a_window_or_more(model):
    token_ids = model.tokenizer(TEXT * 2)["input_ids"]
    total, window = 0.0, 16
    for place in range(1, len(token_ids)):
        # The window that a token falls into: the first one, or a later one that half of is new.
        stop = window if place < window else window + 8 * ((place - window) // 8 + 1)
        start = max(0, min(stop, len(token_ids)) - window)
        logits = model.network(input_ids=torch.tensor([token_ids[start:place]])).logits[0, -1]
        total += float(logits.double().log_softmax(-1)[token_ids[place]])
        assert place < window or place - start >= 8
    found = text_perplexity(model, TEXT * 2, window=window)
    assert found.perplexity == pytest.approx(math.exp(-total / (len(token_ids) - 1)), rel=1e-5)


def test_the_window_is_no_longer_than_that_of_the_model(model):
    assert text_perplexity(model, TEXT, window=10**6).window == 2048


@pytest.mark.parametrize(("text", "window"), [("a", 16), ("", 16), (TEXT, 1)])
def test_a_text_or_window_that_is_too_short_is_an_error(model, text, window):
    with pytest.raises(InvalidInputError, match="2 at least"):
        text_perplexity(model, text, window=window)
