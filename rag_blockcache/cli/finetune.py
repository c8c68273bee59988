"""``finetune``: train a model to answer over blocks. Its options are the fields of ``Recipe``."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from rag_blockcache.cli.options import AsJson
from rag_blockcache.cli.output import facts_table, print_json, print_note, stdout
from rag_blockcache.cli.units import format_seconds
from rag_blockcache.errors import InvalidInputError
from rag_blockcache.finetuning.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rag_blockcache.block_cache import BlockCache
    from rag_blockcache.evaluation.qa_examples import QaExample
    from rag_blockcache.finetuning.held_out import Evaluate

_BATCH, _MAX_NEW_TOKENS = 8, 32  # of answers during training


def _takes_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take every field of a recipe as an option, beside those that it names itself."""
    kinds = get_type_hints(Recipe)
    annotations = {field.name: _option(kinds[field.name], field) for field in dataclasses.fields(Recipe)}
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for (name, annotation), default in zip(annotations.items(), _defaults(), strict=True)
    ]
    own = get_type_hints(command, include_extras=True)
    for parameter in inspect.signature(command).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            parameters.append(parameter.replace(annotation=own[parameter.name]))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
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
def finetune(
    *,
    eval_answers: Annotated[
        int,
        typer.Option(min=0, help="Questions of each eval_data file that are answered at each measurement."),
    ] = 0,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Train a model to answer over passages that do not see one another, as an adapter or in all its weights.

    The result says of itself that it was block-fine-tuned, so whatever loads it reuses blocks as they are.

    Name each file with a --data of its own. Killed, the command goes on from its last checkpoint when it is
    run again. On several GPUs, run `accelerate launch -m rag_blockcache.finetuning` with the same options.
    """
    recipe = Recipe(**options)
    from rag_blockcache.finetuning import finetune as train

    report = train(
        recipe, evaluate=_accuracy(recipe, eval_answers) if eval_answers else None, tell=print_note
    )
    if as_json:
        print_json(report)
        return
    last = {name: value for entry in report.history for name, value in entry.items()}
    measured = {
        name.replace("_", " "): f"{value:.3f}" for name, value in last.items() if name.startswith("eval_")
    }
    trained = f"{report.record.totals['steps']:,} steps in {format_seconds(report.seconds)}"
    stdout().print(facts_table("fine-tuned", {"in": str(report.folder), "trained": trained, **measured}))


def _accuracy(recipe: Recipe, limit: int) -> Evaluate:
    """Return what answers questions in both modes as serving does, and counts the right ones."""
    from rag_blockcache.block_cache import BlockCache
    from rag_blockcache.evaluation.qa_files import read_examples
    from rag_blockcache.loading import model_card

    questions = [each for path in recipe.eval_data for each in read_examples(path, limit)]
    if not questions:
        raise InvalidInputError("--eval-answers needs files with questions; name them with --eval-data")
    tokenizer = model_card(recipe.model).tokenizer
    shown: dict[str, Any] = {
        "passage_format": recipe.passage_format,
        "preamble": recipe.preamble,
        "blocks_see": recipe.blocks_see,
    }

    def evaluate(network: PreTrainedModel, step: int) -> dict[str, float]:
        with BlockCache(network, None, tokenizer=tokenizer, **shown) as cache:
            return {
                f"eval_accuracy_{mode}": _share_right(cache, questions, mode) for mode in ("block", "full")
            }

    return evaluate


def _share_right(cache: BlockCache, questions: Sequence[QaExample], policy: str) -> float:
    from rag_blockcache.evaluation.answer_metrics import contains_answer

    num_right = 0
    for start in range(0, len(questions), _BATCH):
        batch = questions[start : start + _BATCH]
        asked = [(each.question, each.passages) for each in batch]
        answers = cache.generate_batch(asked, policy=policy, max_new_tokens=_MAX_NEW_TOKENS, do_sample=False)
        num_right += sum(
            contains_answer(answer.text, each.answers) for answer, each in zip(answers, batch, strict=True)
        )
    return num_right / len(questions)
