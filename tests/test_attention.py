"""Attention that does not copy keys and values gives what SDPA of transformers gives."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rag_blockcache import attention


class Layer(torch.nn.Module):
    """What an attention function looks at in a layer."""

    is_causal = True

    def __init__(self, num_key_value_groups):
        super().__init__()
        self.num_key_value_groups = num_key_value_groups


def states(num_heads, num_tokens):
    return torch.randn(2, num_heads, num_tokens, 16)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
@pytest.mark.parametrize("num_queries", [1, 5])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_groups_attend_as_they_do_in_transformers(num_kv_heads, num_queries, scaling):
    query, key, value = states(6, num_queries), states(num_kv_heads, 9), states(num_kv_heads, 9)
    mask = torch.arange(9) <= torch.arange(9 - num_queries, 9)[:, None]
    layer = Layer(6 // num_kv_heads)
    for seen in (mask[None, None], None):
        ours, _ = attention.grouped_attention(layer, query, key, value, seen, scaling=scaling, dropout=0.0)
        theirs, _ = sdpa_attention_forward(layer, query, key, value, seen, scaling=scaling, dropout=0.0)
        torch.testing.assert_close(ours, theirs)


def test_what_is_unusual_is_left_to_transformers():
    query, key, value = states(4, 3), states(2, 9), states(2, 9)
    mask = torch.ones(1, 1, 3, 9, dtype=torch.bool)
    with pytest.raises(ValueError, match="softcap"):  # its own words
        attention.grouped_attention(Layer(2), query, key, value, mask, softcap=30.0)


def test_a_model_uses_it_inside_our_passes_only(tiny_cache, monkeypatch):
    used = []
    original = torch.nn.functional.scaled_dot_product_attention

    def noting(*args, **options):
        used.append(options.get("enable_gqa", False))
        return original(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noting)
    tiny_cache.first_logits("Who?", ["Ada wrote the note."], policy="block")
    assert any(used)
    used.clear()
    token_ids = torch.arange(9)[None]
    tiny_cache.model.network(token_ids, attention_mask=torch.ones(1, 1, 9, 9, dtype=torch.bool).tril())
    assert used
    assert not any(used)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("hidden", [0, 30])
def test_many_queries_attend_to_what_each_sees(window, hidden, monkeypatch):
    monkeypatch.setattr(attention, "_CHUNK", 16)
    num_slots, num_kv_heads = 200, 2
    slots = torch.stack([torch.randperm(num_slots)[:70].sort().values for _ in range(2)])
    behind = slots[:, :, None] - torch.arange(num_slots)
    mask = (behind >= 0) & (torch.arange(num_slots) >= hidden) if window is None else abs(behind) < window
    mask = (mask | (behind == 0))[:, None]
    query, key, value = states(6, 70), states(num_kv_heads, num_slots), states(num_kv_heads, num_slots)
    seen = []
    original = torch.nn.functional.scaled_dot_product_attention
    with monkeypatch.context() as patch:
        patch.setattr(
            torch.nn.functional,
            "scaled_dot_product_attention",
            lambda query, key, *rest, **options: (
                seen.append(key.shape[2]) or original(query, key, *rest, **options)
            ),
        )
        ours, _ = attention.grouped_attention(Layer(3), query, key, value, mask)
    theirs, _ = sdpa_attention_forward(Layer(3), query, key, value, mask)
    torch.testing.assert_close(ours, theirs)
    assert len(seen) == 5
    assert sum(seen) < 5 * num_slots, "what no query of a part sees is not computed"


@pytest.mark.parametrize("is_masked", [True, False])
def test_one_token_reads_the_keys_of_a_group_once(is_masked, monkeypatch):
    shapes = []
    original = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda query, key, *rest, **options: (
            shapes.append((query.shape[1], key.shape[1])) or original(query, key, *rest, **options)
        ),
    )
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool) if is_masked else None
    attention.grouped_attention(Layer(3), states(6, 1), states(2, 9), states(2, 9), mask)
    assert shapes == [(2, 2)]


def test_a_mask_that_is_added_is_never_cut(monkeypatch):
    monkeypatch.setattr(attention, "_CHUNK", 2)
    query, key, value = states(4, 8), states(2, 9), states(2, 9)
    mask = torch.zeros(1, 1, 8, 9).masked_fill_(torch.ones(8, 9, dtype=torch.bool).triu(2), float("-inf"))
    ours, _ = attention.grouped_attention(Layer(2), query, key, value, mask)
    theirs, _ = sdpa_attention_forward(Layer(2), query, key, value, mask)
    torch.testing.assert_close(ours, theirs)
