"""The memory benchmark counts what is resident, mapped files too, in a process of its own."""

import json
import mmap
import sys

import pytest
import torch

from rag_blockcache.errors import ContextTooLongError, ModelNotFoundError
from rag_blockcache.evaluation.memory import MemoryMeasure, measure_memory
from rag_blockcache.evaluation.memory_process import STAGES, Watch, main, resident_bytes
from rag_blockcache.evaluation.token_prompts import cut_prompt, token_run
from rag_blockcache.model import Model

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
MIB = 2**20


def test_private_memory_is_seen_at_its_peak():
    with Watch() as watch, mmap.mmap(-1, 64 * MIB) as held:  # an allocator might hand out used pages again
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
    assert watch.peak_bytes - watch.start_bytes == pytest.approx(64 * MIB, rel=0.1)


def test_mapped_files_count(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(64 * MIB))
    before = resident_bytes("status", "RssFile")
    with Watch() as watch:
        mapped = torch.from_file(str(path), size=64 * MIB, dtype=torch.uint8)
        assert int(mapped.max()) == 0
    assert watch.peak_file_bytes - before == pytest.approx(64 * MIB, rel=0.1)
    assert watch.peak_bytes - watch.start_bytes == pytest.approx(64 * MIB, rel=0.1)


def test_the_stages_encode_and_then_answer(tiny_model, tiny_tokenizer, tmp_path):
    """Both in this process, so that what they do is seen by coverage and debuggers."""
    model = Model(tiny_model, tiny_tokenizer)
    prompt = cut_prompt(token_run(model, 400), 400, final_tokens=50, passage_tokens=50)
    request = {"max_new_tokens": 3, "model": "tiny", "shape": None}
    STAGES["encode"](model, prompt, request, tmp_path)
    measure = MemoryMeasure(**STAGES["answer"](model, prompt, request, tmp_path))
    assert (measure.num_tokens, measure.num_new_tokens) == (400, 3)
    assert measure.kv_bytes == 400 * model.kv_bytes_per_token
    assert measure.weight_bytes == sum(weight.nbytes for weight in tiny_model.parameters())
    assert measure.peak_bytes >= measure.loaded_bytes
    found = json.loads(json.dumps(measure.to_json(), allow_nan=False))
    assert set(found["columns"]) == set(found["rows"][0])
    assert {"date", "hardware", "versions", "model", "dtype", "threads"} <= set(found)


def test_an_answer_is_measured_in_a_process_of_its_own(tiny_model_path, tmp_path):
    measure = measure_memory(
        str(tiny_model_path),
        num_tokens=600,
        passage_tokens=100,
        max_new_tokens=2,
        device="cpu",
        directory=tmp_path,
    )
    assert measure.num_tokens == 600
    assert measure.num_new_tokens == 2
    assert measure.loaded_bytes > 50 * MIB  # a whole Python with torch
    assert measure.environment["model"] == tiny_model_path.name
    assert list(tmp_path.iterdir()) == []


def test_what_goes_wrong_there_is_raised_here(tmp_path):
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        measure_memory(str(tmp_path / "nowhere"), device="cpu")


def test_a_prompt_longer_than_the_window_is_refused(tiny_model_path, tmp_path):
    request = {"model": str(tiny_model_path), "shape": None, "device": "cpu", "dtype": None}
    request |= {"num_tokens": 5000, "max_new_tokens": 1, "passage_tokens": 100}
    (tmp_path / "request.json").write_text(json.dumps(request))
    with pytest.raises(ContextTooLongError, match="2048"):
        main("encode", tmp_path)
