"""The commands from end to end: a tiny model and embedder, real files, a real index."""

import json
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer
from typer.testing import CliRunner

from rag_blockcache import BlockCache
from rag_blockcache.cli import app, ask
from rag_blockcache.prefilled_index import PrefilledIndex
from rag_blockcache.store import DiskStore

COMMANDS = ["index-and-prefill", "ask", "status", "verify", "gc", "estimate", "export", "import"]
PROGRAM = [sys.executable, "-m", "rag_blockcache.cli"]
CORPUS = {
    "note.txt": "Ada wrote the note about the engine. It was the first program.",
    "engine.md": "# Engine\n\nThe engine was never built in her time.",
    "ready.jsonl": '{"text": "Babbage designed the engine.", "title": "Babbage"}\n',
}


@pytest.fixture(scope="session")
def embedder_path(tmp_path_factory):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    folder = tmp_path_factory.mktemp("tiny-embedder")
    embedding = StaticEmbedding(byte_tokenizer().backend_tokenizer, embedding_dim=16)
    SentenceTransformer(modules=[embedding], device="cpu").save(str(folder))
    return folder


@pytest.fixture(scope="session")
def other_model_path(tiny_model, tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("other-model")
    torch.manual_seed(99)
    type(tiny_model)(tiny_model.config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, text in CORPUS.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def models(tiny_model_path, embedder_path):
    return ("--model", tiny_model_path, "--embedder", embedder_path)


@pytest.fixture
def filled_by_a_store(tiny_model_path, tmp_path):
    """An index with a passage that a vector store added, by vectors of its own."""
    directory = tmp_path / "store"
    with (
        BlockCache(tiny_model_path, directory, passage_format="verbatim") as cache,
        PrefilledIndex(directory, cache=cache) as index,
    ):
        index.add(["Ada wrote the note about the engine."], embeddings=[[1, 0]])
    return directory


@pytest.fixture
def made(corpus, tmp_path, models):
    """An index of the corpus."""
    index(corpus, tmp_path / "kv", *models)
    return tmp_path / "kv"


def run(*arguments, exit_code=0, **options):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], **options)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == exit_code, result.output
    return result


def run_json(*arguments, exit_code=0, **options):
    """Run a command with --json: one object on stdout, and nothing else there."""
    return json.loads(run(*arguments, "--json", exit_code=exit_code, **options).stdout)


def index(folder, out, *options, exit_code=0):
    return run_json("index-and-prefill", folder, "--out", out, *options, exit_code=exit_code)


def error_of(*arguments, **options):
    """Run a command that must fail with one sentence on stderr, and return that."""
    result = run(*arguments, exit_code=2, **options)
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


# index-and-prefill


def test_a_disk_budget_that_is_too_small_is_a_problem_until_it_is_larger(corpus, tmp_path, models):
    out = tmp_path / "kv"
    small = ("--disk-budget", "5KB", "--index-factory", "IVF64,Flat")
    report = index(corpus, out, *models, *small, exit_code=1)
    assert (report["num_encoded_blocks"], report["num_not_stored_blocks"]) == (0, 3)
    assert "3 blocks were not stored: the disk budget of 5,000 bytes" in report["failures"][0]["reason"]
    assert run_json("ask", out, "Who?", "--policy", "block", "--max-new-tokens", 4)["num_misses"] == 3
    assert index(corpus, out, "--disk-budget", "1GB")["num_pending_blocks"] == 0


def test_documents_become_an_index_that_answers(corpus, tmp_path, models):
    report = index(corpus, tmp_path / "kv", *models)
    assert (report["num_new_documents"], report["num_encoded_blocks"]) == (3, 3)
    answer = run_json("ask", tmp_path / "kv", "Who?", "--policy", "block", "--max-new-tokens", 4, "-k", 3)
    assert (answer["num_hits"], answer["num_misses"]) == (3, 0)
    assert {passage["title"] for passage in answer["passages"]} == {"", "Engine", "Babbage"}
    scores = [passage["score"] for passage in answer["passages"]]
    assert scores == sorted(scores, reverse=True)


def test_the_job_keeps_in_memory_nothing_of_what_it_writes(corpus, tmp_path, models, monkeypatch):
    held, close = [], BlockCache.close

    def look(cache):
        held.append((len(cache.store.memory), len(cache.store.disk)))
        close(cache)

    monkeypatch.setattr(BlockCache, "close", look)
    index(corpus, tmp_path / "kv", *models)
    assert held == [(0, 3)]


def test_an_index_of_a_vector_store_is_left_to_the_store(corpus, filled_by_a_store, embedder_path):
    for options in ((), ("--embedder", embedder_path)):
        error = error_of("index-and-prefill", corpus, "--out", filled_by_a_store, *options)
        assert "passages that a vector store split, embedded and added" in error
        assert "add documents through that store, or index into another directory" in error


def test_the_report_for_people_has_its_numbers(corpus, tmp_path, models):
    shown = run("index-and-prefill", corpus, "--out", tmp_path / "kv", *models)
    for part in ("3 new, 0 changed", "3 encoded", "tokens/s"):
        assert part in shown.stdout
    assert "prefill: 3/3" in shown.stderr


def test_the_same_command_again_finds_nothing_to_do(corpus, made, models):
    report = index(corpus, made, *models)
    assert (report["num_unchanged_documents"], report["num_encoded_blocks"]) == (3, 0)


def test_options_left_out_are_those_that_the_index_was_made_with(corpus, tmp_path, models):
    options = ("--dtype", "bfloat16", "--passage-format", "plain", "--max-passage-tokens", 40, "--overlap", 9)
    index(corpus, tmp_path / "kv", *models, *options, "--preamble", "Read this.", "--codec", "int4")
    before = run_json("status", tmp_path / "kv")["settings"]
    assert (before["dtype"], before["passage_format"], before["preamble"], before["codec"]) == (
        "bfloat16",
        "plain",
        "Read this.",
        "int4",
    )
    (corpus / "more.txt").write_text("The numbers were printed on paper.")
    assert index(corpus, tmp_path / "kv")["num_encoded_blocks"] == 1
    assert run_json("status", tmp_path / "kv")["settings"] == before
    answer = run_json("ask", tmp_path / "kv", "Who?", "--policy", "block", "--max-new-tokens", 2, "-k", 9)
    assert answer["num_misses"] == 0


def test_models_on_record_are_found_from_any_folder(corpus, tmp_path, models, monkeypatch):
    folder = Path(models[1])
    monkeypatch.chdir(folder.parent)
    index(corpus, tmp_path / "kv", "--model", folder.name, "--embedder", models[3])
    monkeypatch.chdir(tmp_path)
    assert run_json("status", "kv")["settings"]["model"] == str(folder)
    assert run_json("verify", "kv")["is_sound"]


def test_a_new_index_needs_a_model_and_an_embedder(corpus, tmp_path, models):
    assert "needs --model and --embedder" in error_of("index-and-prefill", corpus, "--out", tmp_path / "kv")
    assert "needs --embedder" in error_of("index-and-prefill", corpus, "--out", tmp_path / "kv", *models[:2])
    assert not (tmp_path / "kv").exists()


def test_what_an_index_was_made_with_is_not_changed(corpus, made, other_model_path):
    again = ("index-and-prefill", corpus, "--out", made)
    assert "was made with the model" in error_of(*again, "--model", other_model_path)
    assert "was made with" in error_of(*again, "--dtype", "bfloat16")
    assert "was made with the codec none, not the codec int8" in error_of(*again, "--codec", "int8")
    assert "codec 'int3' is unknown" in error_of(*again, "--codec", "int3")
    assert "passage format paper" in error_of(*again, "--passage-format", "plain")
    assert "was made with the preamble" in error_of(*again, "--preamble", "Read this.")
    assert "20 tokens" in error_of(*again, "--max-passage-tokens", "20")
    assert "index_factory 'Flat'" in error_of(*again, "--index-factory", "HNSW32")
    assert index(corpus, made)["num_unchanged_documents"] == 3


def test_a_document_that_cannot_be_read_is_listed_and_stops_nothing(corpus, tmp_path, models):
    (corpus / "bad.jsonl").write_text("no json\n")
    report = index(corpus, tmp_path / "kv", *models, exit_code=1)
    assert report["num_encoded_blocks"] == 3
    assert [Path(failure["source"]).name for failure in report["failures"]] == ["bad.jsonl"]
    shown = run("index-and-prefill", corpus, "--out", tmp_path / "kv", exit_code=1).stdout
    assert "1 could not be done" in shown


def test_a_dry_run_changes_nothing(corpus, tmp_path, models):
    report = index(corpus, tmp_path / "kv", *models, "--dry-run")
    assert (report["is_dry_run"], report["num_new_documents"], report["num_encoded_blocks"]) == (True, 3, 3)
    assert not (tmp_path / "kv").exists()
    shown = run("index-and-prefill", corpus, "--out", tmp_path / "kv", *models, "--dry-run").stdout
    assert "would be done" in shown


def test_shards_do_the_work_together(corpus, tmp_path, models):
    parts = [index(corpus, tmp_path / "kv", *models, "--shard", f"{part}/2") for part in (1, 2)]
    assert sum(part["num_new_documents"] for part in parts) == 3
    assert index(corpus, tmp_path / "kv")["num_unchanged_documents"] == 3
    assert "i/n" in run("index-and-prefill", corpus, "--out", "kv", "--shard", "two", exit_code=2).stderr


def test_passages_may_be_prefilled_later(corpus, tmp_path, models):
    assert index(corpus, tmp_path / "kv", *models, "--prefill", "none")["num_pending_blocks"] == 3
    assert index(corpus, tmp_path / "kv", "--prefill", "1")["num_encoded_blocks"] == 1
    assert "2 blocks" in run("status", tmp_path / "kv").stdout
    assert index(corpus, tmp_path / "kv")["num_encoded_blocks"] == 2
    assert "nothing" in run("status", tmp_path / "kv").stdout


def test_an_interrupted_job_goes_on(corpus, tmp_path, models, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BlockCache, "prefill", interrupted)
        arguments = ["index-and-prefill", str(corpus), "--out", str(tmp_path / "kv"), *map(str, models)]
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 130
    assert "the same command goes on" in result.stderr
    report = index(corpus, tmp_path / "kv", *models)
    assert (report["num_unchanged_documents"], report["num_encoded_blocks"]) == (3, 3)


def test_bad_input_is_one_sentence(corpus, tmp_path, models):
    out = ("--out", tmp_path / "kv")
    (tmp_path / "empty").mkdir()
    assert "no document" in error_of("index-and-prefill", tmp_path / "empty", *out, *models)
    assert "does not exist" in error_of("index-and-prefill", tmp_path / "nowhere", *out, *models)
    nowhere = ("--model", tmp_path / "nowhere", *models[2:])
    assert "cannot load model" in error_of("index-and-prefill", corpus, "--out", tmp_path / "a", *nowhere)
    nowhere = (*models[:2], "--embedder", tmp_path / "nowhere")
    assert "embedder" in error_of("index-and-prefill", corpus, "--out", tmp_path / "b", *nowhere)
    (tmp_path / "file").write_text("in the way")
    assert "file" in error_of("index-and-prefill", corpus, "--out", tmp_path / "file", *models)


# ask


def test_an_answer_comes_with_its_sources_and_what_it_took(made):
    shown = run("ask", made, "Who wrote it?", "--policy", "block", "--max-new-tokens", 5, "-k", 2).stdout
    assert "sources" in shown
    assert "first token after" in shown
    assert "2 of 2 passages found prefilled" in shown
    assert "policy block" in shown


def test_without_reuse_no_passage_is_looked_up(made):
    shown = run("ask", made, "Who?", "--policy", "full", "--max-new-tokens", 2).stdout
    assert "0 tokens reused" in shown
    assert "found prefilled" not in shown


def test_an_answer_ends_before_a_stop_string(made):
    ask_it = ("ask", made, "Who?", "--max-new-tokens", 12, "--policy", "block")
    whole = run_json(*ask_it)["text"]
    stop = whole[3:6]
    cut = run_json(*ask_it, "--stop", stop)
    assert (cut["text"], cut["finish_reason"]) == (whole[: whole.index(stop)], "stop")


def test_a_question_may_come_from_a_pipe(made):
    answer = run_json("ask", made, "--max-new-tokens", 2, input="Who wrote it?\n")
    assert answer["question"] == "Who wrote it?"


def test_drawn_tokens_repeat_with_a_seed(made):
    ask_it = ("ask", made, "Who?", "--max-new-tokens", 12, "--policy", "block")
    draw = (*ask_it, "--temperature", 1.5, "--top-k", 50, "--top-p", 0.9)
    texts = [run_json(*draw, "--seed", seed)["token_ids"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_prompt_asks_on_after_a_question_that_failed(made, monkeypatch):
    questions = iter(["x" * 3000, "Who wrote it?", ""])
    monkeypatch.setattr(ask, "_is_prompting", lambda as_json: True)
    monkeypatch.setattr("builtins.input", lambda _: next(questions))
    result = run("ask", made, "--max-new-tokens", 3)
    assert result.stdout.count("first token after") == 1
    assert "error: the prompt has" in result.stderr


def test_questions_that_cannot_be_answered_are_one_sentence(made, other_model_path, tmp_path):
    assert "the question is empty" in error_of("ask", made, " ")
    assert "the question is empty" in error_of("ask", made, input="")
    assert "policy 'fast' is unknown" in error_of("ask", made, "Who?", "--policy", "fast")
    assert "--temperature" in error_of("ask", made, "Who?", "--seed", 1)
    assert "context window" in error_of("ask", made, "Who?", "--json", "--max-new-tokens", 5000)
    assert "is not the model" in error_of("ask", made, "Who?", "--model", other_model_path)


def test_control_characters_do_not_reach_the_terminal(corpus, tmp_path, models):
    (corpus / "evil.txt").write_text("\x1b]0;owned\x07 Ada wrote \x1b[31mred\x1b[0m.")
    index(corpus, tmp_path / "kv", *models)
    shown = run("ask", tmp_path / "kv", "Ada wrote red", "-k", 9, "--max-new-tokens", 3).stdout
    assert "owned" in shown
    assert "\x1b" not in shown
    assert "\x07" not in shown


# status, verify, gc


def test_status_loads_no_model(made):
    script = (
        "import sys; from rag_blockcache.cli import app; app(sys.argv[1:], standalone_mode=False); "
        "sys.exit('transformers' in sys.modules)"
    )
    status = [sys.executable, "-c", script, "status", str(made), "--json"]
    finished = subprocess.run(status, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["counts"]["num_passages"] == 3


def damage_a_block(directory):
    """Turn one byte of a stored block around, near the end, where the values are."""
    file = max((path for path in (directory / "blocks").rglob("*") if path.is_file()), key=_is_block)
    content = bytearray(file.read_bytes())
    content[-5] ^= 0xFF
    file.write_bytes(content)


def _is_block(path):
    return path.suffix not in (".db", ".sqlite") and not path.name.endswith(
        ("-wal", "-shm")
    ), path.stat().st_size


def test_a_damaged_block_is_found_and_repaired(made):
    assert run_json("verify", made)["is_sound"]
    damage_a_block(made)
    report = run_json("verify", made, exit_code=1)
    assert (report["is_sound"], len(report["damaged_blocks"])) == (False, 1)
    assert report["damaged_blocks"][0] in run("verify", made, exit_code=1).stdout.replace("\n", "")
    assert run_json("verify", made, "--repair")["num_repaired_blocks"] == 1
    assert "sound" in run("verify", made).stdout


def test_blocks_that_no_document_needs_go_when_asked_for(made, tiny_model_path):
    with BlockCache(tiny_model_path, made) as cache:
        cache.prefill(["A passage of someone else."])
    assert run_json("gc", made, "--dry-run")["num_unknown_blocks"] == 1
    assert "kept" in run("gc", made).stdout
    assert run_json("gc", made, "--unknown-blocks")["num_bytes"] > 0
    assert run_json("gc", made)["num_unknown_blocks"] == 0
    with DiskStore(made / "blocks") as store:
        assert len(store) == 3


@pytest.mark.parametrize("command", ["ask", "status", "verify", "gc", "export"])
def test_a_folder_without_index_is_told_so_and_left_alone(command, tmp_path):
    more = {"ask": ["Who?"], "export": [tmp_path / "kv.tar"]}.get(command, [])
    assert "no index" in error_of(command, tmp_path, *more)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["ask", "status", "verify", "gc", "export"])
def test_a_foreign_index_is_told_so(command, tmp_path):
    with sqlite3.connect(tmp_path / "manifest.sqlite") as connection:
        connection.execute("CREATE TABLE theirs (x)")
    connection.close()
    more = {"ask": ["Who?"], "export": [tmp_path / "kv.tar"]}.get(command, [])
    assert "another program" in error_of(command, tmp_path, *more)


# estimate, export, import


def test_what_blocks_see_is_recorded_kept_and_not_changed(corpus, tmp_path, models, tiny_model_path):
    index(corpus, tmp_path / "kv", *models, "--blocks-see", "themselves")
    assert "themselves" in run("status", tmp_path / "kv").stdout
    assert index(corpus, tmp_path / "kv")["num_encoded_blocks"] == 0  # left out: as on record
    answer = run_json("ask", tmp_path / "kv", "Who?", "--policy", "block", "--max-new-tokens", 2)
    assert answer["num_hits"] > 0
    assert answer["num_misses"] == 0
    other = ("--blocks-see", "stand-ins")
    assert "blocks_see='themselves', not blocks_see='stand-ins'" in error_of(
        "index-and-prefill", corpus, "--out", tmp_path / "kv", *other
    )


@pytest.mark.parametrize("codec", ["none", "int8"])
def test_an_estimate_is_what_the_job_then_does(corpus, tmp_path, models, codec):
    options = ("--max-passage-tokens", 60, "--codec", codec)
    planned = index(corpus, tmp_path / "kv", *models, *options, "--dry-run")["num_bytes"]
    found = run_json("estimate", corpus, "--model", models[1], "--out", tmp_path, *options)
    report = index(corpus, tmp_path / "kv", *models, *options)
    assert (found["num_tokens"], found["num_bytes"]) == (report["num_tokens"], report["num_bytes"])
    assert planned == pytest.approx(report["num_bytes"], rel=0.01)
    assert found["fits"] is True
    shown = run("estimate", corpus, "--model", models[1], "--tokens-per-second", 100).stdout
    assert "with reuse" in shown
    assert "as given" in shown


@pytest.mark.parametrize("codec", ["none", "int4"])
def test_an_index_moves_in_one_file(corpus, tmp_path, models, tiny_model_path, codec):
    index(corpus, tmp_path / "kv", *models, "--codec", codec)
    exported = run_json("export", tmp_path / "kv", tmp_path / "kv.tar")
    imported = run_json("import", tmp_path / "kv.tar", tmp_path / "there", "--model", tiny_model_path)
    assert imported["num_bytes"] == exported["num_bytes"]
    answer = run_json("ask", tmp_path / "there", "Who?", "--policy", "block", "--max-new-tokens", 2)
    assert answer["num_misses"] == 0


def test_an_archive_is_refused_by_another_model(made, tmp_path, other_model_path):
    run("export", made, tmp_path / "kv.tar")
    refused = error_of("import", tmp_path / "kv.tar", tmp_path / "there", "--model", other_model_path)
    assert "fingerprint" in refused
    assert not (tmp_path / "there").exists()
    assert "exists already" in error_of("export", made, tmp_path / "kv.tar")
    assert "not an empty directory" in error_of("import", tmp_path / "kv.tar", made)


# All of them


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_with_an_example(command):
    shown = run(command, "--help").stdout
    assert f"rag-blockcache {command} " in shown
    assert "--json" in shown


def test_the_help_of_all_commands_is_there():
    shown = run("--help").stdout
    assert all(command in shown for command in COMMANDS)


@pytest.mark.slow
def test_a_real_interrupt_of_a_real_process_loses_nothing(tmp_path, models):
    lines = [json.dumps({"text": f"{number} {'note ' * 60}"}) for number in range(2500)]
    (tmp_path / "many.jsonl").write_text("\n".join(lines))
    command = [
        *PROGRAM,
        "index-and-prefill",
        tmp_path / "many.jsonl",
        "--out",
        tmp_path / "kv",
        *models,
        "--json",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("prefill:"):
            break
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "")
    assert "what was committed is kept" in stderr
    assert "Traceback" not in stderr
    counts = run_json("status", tmp_path / "kv")["counts"]
    assert counts["num_passages"] == 2500
    assert counts["num_pending_passages"] == 0
    assert counts["num_pending_blocks"] > 0
