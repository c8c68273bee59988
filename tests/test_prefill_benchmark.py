"""The prefill benchmark counts the tokens that were really encoded, and compares in pairs."""

import json

import pytest

from rag_blockcache.errors import InvalidInputError
from rag_blockcache.evaluation import prefill
from rag_blockcache.evaluation.prefill import measure_prefill
from rag_blockcache.model import Model


@pytest.fixture(scope="module")
def model(tiny_model, tiny_tokenizer):
    return Model(tiny_model, tiny_tokenizer)


def test_a_measure_holds_rates_bytes_and_shares(model, tmp_path):
    measure = measure_prefill(
        model, num_tokens=900, passage_tokens=(20, 60), repeats=2, name="tiny", directory=tmp_path
    )
    assert measure.num_tokens == 900
    assert measure.num_bytes == 900 * model.kv_bytes_per_token
    assert measure.encode.min > 0
    assert measure.bare_batch_size in measure.bare_by_batch
    assert measure.bare_by_batch[measure.bare_batch_size] == max(measure.bare_by_batch.values())
    assert measure.durable_bytes_per_second.median < measure.write_bytes_per_second.median
    assert list(tmp_path.iterdir()) == []
    found = json.loads(json.dumps(measure.to_json(), allow_nan=False))
    assert {"date", "hardware", "versions", "model", "dtype", "threads"} <= set(found)
    assert set(found["columns"]) == set(found["rows"][0])


def test_all_passages_are_encoded_and_stored(model, monkeypatch, tmp_path):
    stored = {}

    class Store(prefill.DiskStore):
        def put_many(self, blocks, cost_seconds=0.0):
            stored.update(blocks)
            return super().put_many(blocks, cost_seconds)

    monkeypatch.setattr(prefill, "DiskStore", Store)
    passages = [[1, 2, 3], [1, 2, 3], [4, 5]]  # two of them alike
    done = prefill._encode_and_store(model, passages, tmp_path)
    assert done.num_tokens == sum(states.num_tokens for states in stored.values()) == 8
    assert done.seconds >= done.write_seconds > 0


def test_stand_ins_are_seen_and_are_not_counted(model, monkeypatch):
    seen = []
    inner = prefill.encode_blocks

    def observed(model, blocks, *, conditioned_on=None):
        seen.append(0 if conditioned_on is None else conditioned_on.num_tokens)
        return inner(model, blocks, conditioned_on=conditioned_on)

    monkeypatch.setattr(prefill, "encode_blocks", observed)
    assert prefill._encode(model, [[1, 2, 3], [4, 5]], behind=[7, 8, 9, 10]).num_tokens == 5
    assert seen == [0, 4]


def test_the_bare_pass_goes_over_every_token_once_and_pads_little(model, monkeypatch):
    shapes, inner = [], model.backbone.forward

    def observed(input_ids, **options):
        shapes.append(tuple(input_ids.shape))
        return inner(input_ids=input_ids, **options)

    monkeypatch.setattr(model.backbone, "forward", observed)
    assert prefill._bare(model, [[1, 2, 3], [4, 5, 6, 7], [8], [9, 10]], 2).num_tokens == 10
    assert shapes == [(2, 2), (2, 4)]


def test_rows_of_equal_length_take_whole_rows_only(model, monkeypatch, tmp_path):
    asked, inner = [], prefill._bare

    def observed(model, rows, batch_size):
        asked.append([len(row) for row in rows])
        return inner(model, rows, batch_size)

    monkeypatch.setattr(prefill, "_bare", observed)
    measure_prefill(model, num_tokens=250, passage_tokens=(20, 60), repeats=1, directory=tmp_path)
    assert {length for lengths in asked[:-2] for length in lengths} <= set(range(20, 61)) | {100}
    assert [100, 100] in asked
    assert sum(asked[-1]) == 250


@pytest.mark.parametrize(
    "options", [{"repeats": 0}, {"num_tokens": 50}, {"passage_tokens": (9, 3)}, {"passage_tokens": (0, 3)}]
)
def test_numbers_that_do_not_go_together_are_refused(model, options):
    with pytest.raises(InvalidInputError, match="repeat"):
        measure_prefill(model, **{"num_tokens": 900, "repeats": 1, **options})
