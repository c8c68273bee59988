"""The command line: what people type, what scripts read, and what goes wrong."""

import errno
import io
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from rag_blockcache.cli import app
from rag_blockcache.cli.app import _Commands
from rag_blockcache.cli.output import print_json, to_json
from rag_blockcache.cli.parsing import parse_prefill, parse_shard, parse_size
from rag_blockcache.cli.progress import ProgressBar, describe
from rag_blockcache.cli.units import format_bytes, format_count, format_seconds, format_share
from rag_blockcache.errors import ModelNotFoundError
from rag_blockcache.jobs.progress import JobProgress


def run(*arguments, **options):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


# Values as people type them


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("20GB", 20 * 10**9),
        ("20 gb", 20 * 10**9),
        ("20G", 20 * 10**9),
        ("1.5TiB", 3 * 2**39),
        ("512k", 512_000),
        (".5MiB", 2**19),
        ("1024", 1024),
        ("7B", 7),
    ],
)
def test_a_size_is_read_with_its_unit(text, num_bytes):
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "20 parsecs", "1,5GB", "0", "0.2B", "nan", "1e3"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(typer.BadParameter, match="size"):
        parse_size(text)


def test_a_shard_counts_from_one():
    assert parse_shard("1/4") == (1, 4)
    assert parse_shard("4/4") == (4, 4)
    for text in ("0/4", "5/4", "1", "a/b", "1/0", "-1/4", "1/4/2"):
        with pytest.raises(typer.BadParameter, match="shard"):
            parse_shard(text)


def test_prefill_is_all_none_or_a_number():
    assert [parse_prefill(text) for text in ("all", "None", "12")] == ["all", "none", 12]
    for text in ("some", "0", "-3", "1.5", ""):
        with pytest.raises(typer.BadParameter, match="all, none"):
            parse_prefill(text)


# Numbers as people read them


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1.4e9, "1.4 GB"),
        (99.94e6, "99.9 MB"),
        (99.96e6, "100 MB"),
        (999.6e6, "1.0 GB"),
        (2.5e18, "2,500 PB"),
    ],
)
def test_bytes_read_with_two_or_three_digits(num_bytes, text):
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0012, "1.2 ms"),
        (0.085, "85 ms"),
        (0.9996, "1.00 s"),
        (2.41, "2.41 s"),
        (59.96, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3599.6, "1 h 0 min"),
        (18_720, "5 h 12 min"),
        (864_000, "10.0 days"),
    ],
)
def test_a_duration_reads_at_the_precision_that_matters(seconds, text):
    assert format_seconds(seconds) == text


def test_counts_and_shares_read_as_words():
    assert format_count(1, "passage") == "1 passage"
    assert format_count(2400, "passage") == "2,400 passages"
    assert format_count(0, "copy", "copies") == "0 copies"
    assert format_share(1, 8) == "12 %"
    assert format_share(0, 0) == "-"


# Results on stdout, everything else on stderr


def test_json_holds_dataclasses_paths_and_no_nan(capsys):
    @dataclass(frozen=True)
    class Found:
        path: Path
        scores: tuple[float, ...]

    print_json({"found": Found(Path("a/b"), (1.5, float("nan"), float("inf"))), "num_bytes": 7})
    assert json.loads(capsys.readouterr().out) == {
        "found": {"path": "a/b", "scores": [1.5, None, None]},
        "num_bytes": 7,
    }
    assert to_json({1: {"x"}}) == {"1": ["x"]}


def test_progress_says_how_much_how_fast_how_large_and_how_long():
    progress = JobProgress("prefill", 100, 400, num_tokens=50_000, num_bytes=1_400_000_000, seconds=50)
    assert describe(progress) == "100/400 passages, 1,000 tokens/s, 1.4 GB, 2 min 30 s left"
    assert describe(JobProgress("scan", 7)) == "7 documents"
    assert describe(JobProgress("blocks", 0, 0)) == "0/0"


def test_without_a_terminal_progress_is_a_line_now_and_then():
    written = io.StringIO()
    with ProgressBar(Console(file=written)) as bar:
        for num_done in range(101):
            bar(JobProgress("embed", num_done, 100))
            bar(JobProgress("scan", num_done))
        bar(JobProgress("prefill", 0, 100))
    assert written.getvalue().splitlines() == [
        "embed: 0/100 passages",
        "scan: 0 documents",
        "embed: 100/100 passages",
        "prefill: 0/100 passages",
    ]


def test_on_a_terminal_progress_is_a_bar_for_each_stage():
    written = io.StringIO()
    with ProgressBar(Console(file=written, force_terminal=True, width=100)) as bar:
        bar(JobProgress("embed", 10, 10))
        bar(JobProgress("[prefill]", 1, None))
    lines = written.getvalue().splitlines()
    assert any("embed" in line and "10/10" in line for line in lines)
    assert any("[prefill]" in line for line in lines)


# Errors and exit codes


def failing_app(error):
    failing = typer.Typer(cls=_Commands, pretty_exceptions_enable=False)

    @failing.callback()
    def root(debug: bool = False):
        pass

    @failing.command("gc")
    def gc():
        raise error

    @failing.command("ask")
    def ask():
        raise error

    return failing


def test_an_error_is_one_sentence_on_stderr():
    error = ModelNotFoundError("model 'x/y' cannot be found;\n  check the name")
    result = CliRunner().invoke(failing_app(error), ["gc"])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == "error: model 'x/y' cannot be found; check the name\n"


def test_an_error_of_the_system_is_one_sentence_too():
    error = OSError(errno.EACCES, "Permission denied", "/etc/shadow")
    result = CliRunner().invoke(failing_app(error), ["gc"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: permission denied for /etc/shadow; check")
    full = CliRunner().invoke(failing_app(OSError(errno.ENOSPC, "No space left on device")), ["gc"])
    assert full.stderr.startswith("error: no space left on the disk; free some and run the same")


def test_a_library_that_is_missing_is_named():
    missing = ModuleNotFoundError("No module named 'peft'", name="peft")
    result = CliRunner().invoke(failing_app(missing), ["gc"])
    assert (
        result.stderr == "error: this needs the library peft, which is not installed; run: pip install peft\n"
    )


def test_debug_shows_the_traceback():
    result = CliRunner().invoke(failing_app(ModelNotFoundError("no model")), ["--debug", "gc"])
    assert isinstance(result.exception, ModelNotFoundError)


def test_an_interrupt_says_what_is_kept():
    resumable = CliRunner().invoke(failing_app(KeyboardInterrupt()), ["gc"])
    assert resumable.exit_code == 130
    assert "what was committed is kept, and the same command goes on" in resumable.stderr
    asking = CliRunner().invoke(failing_app(KeyboardInterrupt()), ["ask"])
    assert (asking.exit_code, asking.stderr) == (130, "interrupted\n")


# Help and start-up


def test_help_starts_without_heavy_libraries():
    script = (
        "import sys; from rag_blockcache.cli import app; app(['--help'], standalone_mode=False); "
        "heavy = {'torch', 'transformers', 'faiss', 'numpy', 'diskcache'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "index-and-prefill" in finished.stdout


def test_the_version_is_told():
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("rag-blockcache 0.")
