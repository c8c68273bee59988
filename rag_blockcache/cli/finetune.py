"""``finetune``: train a model to answer over blocks. Its options are the fields of ``Recipe``."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from rag_blockcache.cli.options import AsJson
from rag_blockcache.cli.output import facts_table, print_json, print_note, stdout
from rag_blockcache.cli.units import format_seconds
from rag_blockcache.finetuning.recipe import Recipe


def _takes_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take every field of a recipe as an option, and ``as_json`` beside them."""
    kinds = get_type_hints(Recipe)
    annotations = {field.name: _option(kinds[field.name], field) for field in dataclasses.fields(Recipe)}
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for (name, annotation), default in zip(annotations.items(), _defaults(), strict=True)
    ]
    parameters.append(
        inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=AsJson)
    )
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {**annotations, "as_json": AsJson}
    return command


def _option(kind: Any, field: dataclasses.Field[Any]) -> Any:
    """Return the annotation that typer reads an option from."""
    shown: dict[str, Any] = {"help": field.metadata["help"]}
    if get_origin(kind) is Literal:  # the recipe checks it
        shown["metavar"], kind = f"[{'|'.join(get_args(kind))}]", str
    if kind is bool:
        return Annotated[bool, typer.Option(f"--{field.name.replace('_', '-')}", **shown)]
    return Annotated[kind, typer.Option(**shown)]


def _defaults() -> list[Any]:
    return [
        field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(Recipe)
    ]


@_takes_recipe
def finetune(*, as_json: bool, **options: Any) -> None:
    """Train a model to answer over passages that do not see one another, as an adapter or in all its weights.

    The result says of itself that it was block-fine-tuned, so whatever loads it reuses blocks as they are.

    Name each file with a --data of its own. Killed, the command goes on from its last checkpoint when it is
    run again. On several GPUs, run `accelerate launch -m rag_blockcache.finetuning` with the same options.
    """
    recipe = Recipe(**options)
    from rag_blockcache.finetuning import finetune as train

    report = train(recipe, tell=print_note)
    if as_json:
        print_json(report)
        return
    last = {name: value for entry in report.history for name, value in entry.items()}
    measured = {
        name.replace("_", " "): f"{value:.3f}" for name, value in last.items() if name.startswith("eval_")
    }
    trained = f"{report.record.totals['steps']:,} steps in {format_seconds(report.seconds)}"
    stdout().print(facts_table("fine-tuned", {"in": str(report.folder), "trained": trained, **measured}))
