"""Attention as products of bfloat16 matrices is as near to exact attention as rounding lets it be."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from rag_blockcache import attention, bfloat16_attention

NUM_SLOTS = 300


@pytest.fixture(autouse=True)
def _on_such_a_cpu(monkeypatch):
    monkeypatch.setattr(bfloat16_attention, "is_fast_here", lambda: True)
    monkeypatch.setattr(bfloat16_attention, "_LEAST_PRODUCTS", 1)
    monkeypatch.setattr(bfloat16_attention, "_LEAST_SLOTS", 1)


class Layer(torch.nn.Module):
    """What an attention function looks at in a layer."""

    is_causal = True
    num_key_value_groups = 3


def states(num_heads, num_tokens, *, batch=2, scale=1.0):
    """Keys as a context holds them: with room behind."""
    wide = scale * torch.randn(batch, num_heads, num_tokens + 7, 16)
    return wide.to(torch.bfloat16)[:, :, :num_tokens]


def exact(query, key, value, mask, scaling=None):
    wide = [each.double().repeat_interleave(query.shape[1] // each.shape[1], dim=1) for each in (key, value)]
    found = scaled_dot_product_attention(query.double(), *wide, attn_mask=mask, scale=scaling)
    return found.transpose(1, 2)


def error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


def attended(query, key, value, mask, **options):
    with torch.inference_mode():
        return attention.grouped_attention(Layer(), query, key, value, mask, **options)[0]


def slots_of(kind, num_queries):
    if kind == "at the end":
        return torch.arange(NUM_SLOTS - num_queries, NUM_SLOTS).expand(2, -1)
    return torch.stack([torch.randperm(NUM_SLOTS)[:num_queries].sort().values for _ in range(2)])


@pytest.mark.parametrize("num_kv_heads", [1, 2])
@pytest.mark.parametrize("kind", ["at the end", "anywhere"])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("most", [2**21, 5000])
def test_it_gives_what_exact_attention_gives(num_kv_heads, kind, window, most, monkeypatch):
    monkeypatch.setattr(bfloat16_attention, "_MOST_PRODUCTS", most)  # 5000 cuts the queries
    behind = slots_of(kind, 50)[:, :, None] - torch.arange(NUM_SLOTS)
    mask = ((behind >= 0) & (behind < (window or NUM_SLOTS)))[:, None]
    query, key, value = states(6, 50), states(num_kv_heads, NUM_SLOTS), states(num_kv_heads, NUM_SLOTS)
    for scaling in (None, 0.3):
        found = attended(query, key, value, mask, scaling=scaling)
        assert found.shape == (2, 50, 6, 16)
        assert found.dtype == torch.bfloat16
        assert error(found, exact(query, key, value, mask, scaling)) < 0.005


def test_large_products_are_rounded_where_they_count_least():
    behind = slots_of("at the end", 50)[:, :, None] - torch.arange(NUM_SLOTS)
    query, key = states(6, 50, scale=6), states(2, NUM_SLOTS, scale=6)
    value, mask = states(2, NUM_SLOTS), (behind >= 0)[:, None]
    expected = exact(query, key, value, mask)
    assert error(attended(query, key, value, mask), expected) < 0.01
    rounded = (query.float() @ key.float().repeat_interleave(3, 1).transpose(2, 3) / 4).to(torch.bfloat16)
    rounded = rounded.double().masked_fill(~mask, float("-inf")).softmax(-1)
    once = (rounded @ value.double().repeat_interleave(3, 1)).transpose(1, 2)
    assert error(once, expected) > 0.02, "rounded once, they would count"


def test_one_mask_serves_all_rows():
    mask = (torch.arange(NUM_SLOTS) <= torch.arange(NUM_SLOTS - 9, NUM_SLOTS)[:, None])[None, None]
    query, key, value = states(6, 9), states(2, NUM_SLOTS), states(2, NUM_SLOTS)
    assert error(attended(query, key, value, mask), exact(query, key, value, mask)) < 0.005


def test_slots_that_nobody_sees_may_hold_anything():
    mask = torch.zeros(1, 1, 9, NUM_SLOTS, dtype=torch.bool)
    mask[..., 100:200] = True
    query, key, value = states(6, 9), states(2, NUM_SLOTS), states(2, NUM_SLOTS)
    expected = exact(query, key, value, mask)
    for outside in (slice(0, 100), slice(200, None)):
        key[:, :, outside] = value[:, :, outside] = float("nan")
    assert error(attended(query, key, value, mask), expected) < 0.005


def test_threads_do_not_share_room():
    mask = torch.ones(1, 1, 40, NUM_SLOTS, dtype=torch.bool)
    asked = [(states(6, 40), states(2, NUM_SLOTS), states(2, NUM_SLOTS)) for _ in range(2)]
    alone = [attended(*each, mask) for each in asked]
    together = threading.Barrier(2)

    def many(each):
        together.wait(10)
        return [attended(*each, mask) for _ in range(30)]

    with ThreadPoolExecutor(2) as threads:
        for found, expected in zip(threads.map(many, asked), alone, strict=True):
            assert all(torch.equal(each, expected) for each in found)


def test_what_it_does_not_take_is_left_to_the_fused_kernel(monkeypatch):
    query, key, mask = states(6, 9), states(2, NUM_SLOTS), torch.ones(1, 1, 9, NUM_SLOTS, dtype=torch.bool)
    with torch.inference_mode():
        assert bfloat16_attention.takes(query, key, mask)
        assert not bfloat16_attention.takes(query.float(), key.float(), mask)
        assert not bfloat16_attention.takes(query, key, mask.to(torch.bfloat16))
        for name, least in (("_LEAST_PRODUCTS", 3 * 9 * NUM_SLOTS), ("_LEAST_SLOTS", NUM_SLOTS)):
            with monkeypatch.context() as patch:
                patch.setattr(bfloat16_attention, name, least)
                assert bfloat16_attention.takes(query, key, mask)
                patch.setattr(bfloat16_attention, name, least + 1)
                assert not bfloat16_attention.takes(query, key, mask)
        monkeypatch.setattr(bfloat16_attention, "is_fast_here", lambda: False)
        assert not bfloat16_attention.takes(query, key, mask)
    assert not bfloat16_attention.takes(query, key, mask), "what is trained needs gradients"


@pytest.mark.parametrize(
    ("found", "is_fast"),
    [({"avx512_bf16": True}, True), ({"avx512_bf16": True, "amx_bf16": True}, False), ({}, False)],
)
def test_a_cpu_that_multiplies_bfloat16_is_known_by_what_torch_says(found, is_fast, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert bfloat16_attention.is_fast_here.__wrapped__() is is_fast
