"""All commands under one roof: version, log, and errors as one sentence."""

from __future__ import annotations

import errno
import importlib.metadata
import inspect
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rag_blockcache.cli.archive import export_index, import_index
from rag_blockcache.cli.ask import ask
from rag_blockcache.cli.bench import bench
from rag_blockcache.cli.calibrate import calibrate
from rag_blockcache.cli.estimate import estimate
from rag_blockcache.cli.evaluate import evaluate
from rag_blockcache.cli.finetune import finetune
from rag_blockcache.cli.guard import guard
from rag_blockcache.cli.index_and_prefill import index_and_prefill
from rag_blockcache.cli.maintenance import gc, status, verify
from rag_blockcache.cli.output import log_to_stderr, print_error, print_note
from rag_blockcache.errors import RagBlockCacheError

_EXIT_BAD_INPUT = 2
_EXIT_INTERRUPTED = 130
_RESUMABLE = {"index-and-prefill", "verify", "gc", "import", "calibrate", "finetune"}


class _Commands(TyperGroup):
    """Runs a command and says on one line why it could not."""

    def invoke(self, ctx: Any) -> Any:
        """Turn errors raised on purpose, and those of the system, into a sentence and an exit code."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            if ctx.invoked_subcommand in _RESUMABLE:
                print_note("interrupted: what was committed is kept, and the same command goes on from there")
            else:
                print_note("interrupted")
            raise typer.Exit(_EXIT_INTERRUPTED) from None
        except BrokenPipeError:  # whoever read our output has gone; typer ends quietly
            raise
        except (RagBlockCacheError, OSError, ModuleNotFoundError) as error:
            if ctx.params.get("debug"):
                raise
            print_error(_sentence(error))
            raise typer.Exit(_EXIT_BAD_INPUT) from error


def _sentence(error: RagBlockCacheError | OSError | ModuleNotFoundError) -> str:
    if isinstance(error, RagBlockCacheError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):  # an adapter needs peft, say
        return f"this needs the library {error.name}, which is not installed; run: pip install {error.name}"
    if error.strerror is None:
        return str(error)
    place = f" for {error.filename}" if error.filename else ""
    if error.errno == errno.ENOSPC:
        advice = "free some and run the same command again, what was committed is kept"
        return f"no space left on the disk{place}; {advice}"
    return f"{error.strerror.lower()}{place}; check that it exists and that you may use it"


app = typer.Typer(
    name="rag-blockcache",
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


_START = """\
rag-blockcache estimate docs/ --model MODEL
rag-blockcache index-and-prefill docs/ --out ./kv --model MODEL --embedder MODEL
rag-blockcache ask ./kv "What does the manual say about refunds?"
"""


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rag-blockcache {importlib.metadata.version('rag_blockcache')}")
        raise typer.Exit


def rag_blockcache(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log each step on stderr.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Answer from retrieved passages with the first token early.

    Passages are prefilled once, when they are indexed; a question then computes only itself.

    Every command takes --json: one JSON object on stdout, everything else on stderr.
    Exit codes: 0 all well, 1 done but some documents failed or problems were found,
    2 bad usage or input, 130 interrupted.
    """
    log_to_stderr(verbose=verbose or debug)


def _help(command: Callable[..., None], examples: str, title: str = "Example:") -> str:
    """Join what a command says of itself with lines to copy; the backspace keeps them apart."""
    paragraphs = [" ".join(each.split()) for each in (inspect.getdoc(command) or "").split("\n\n")]
    lines = "\n".join(f"  {line}" for line in examples.splitlines())
    return "\n\n".join([*paragraphs, f"\b\n{title}\n{lines}"])


def _add(name: str, command: Callable[..., None], examples: str) -> None:
    app.command(name, help=_help(command, examples))(command)


app.callback(help=_help(rag_blockcache, _START, "Start here:"))(rag_blockcache)


_add(
    "index-and-prefill",
    index_and_prefill,
    "rag-blockcache index-and-prefill docs/ --out ./kv --model MODEL --embedder EMBEDDER --disk-budget 20GB",
)
_add("ask", ask, 'rag-blockcache ask ./kv "What does the manual say about refunds?" --passages 8')
_add("status", status, "rag-blockcache status ./kv --json")
_add("verify", verify, "rag-blockcache verify ./kv --repair")
_add("gc", gc, "rag-blockcache gc ./kv --dry-run")
_add("estimate", estimate, "rag-blockcache estimate docs/ --model MODEL --out ./kv")
_add("eval", evaluate, "rag-blockcache eval --data FILE --model MODEL --report ./report")
_add("calibrate", calibrate, "rag-blockcache calibrate ./kv --max-loss 0.05")
_add("guard", guard, "rag-blockcache guard ./kv --reset")
_add("export", export_index, "rag-blockcache export ./kv kv.tar")
_add("import", import_index, "rag-blockcache import kv.tar ./kv --model MODEL")
_add(
    "finetune",
    finetune,
    "rag-blockcache finetune --model MODEL --data train.jsonl --eval-data dev.jsonl --out ./adapter",
)
app.add_typer(bench)


def main() -> None:
    """Run the command line; the entry point of ``rag-blockcache``."""
    if not sys.stderr.isatty():  # bars of the libraries below us; our own knows by itself
        os.environ.setdefault("TQDM_DISABLE", "1")
    app()
