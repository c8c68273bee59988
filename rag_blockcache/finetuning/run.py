"""Block fine-tuning from files to a folder of weights that ``BlockCache`` knows how to use."""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainingArguments

from rag_blockcache.errors import InvalidInputError
from rag_blockcache.finetuning.examples import DataFile, read_data
from rag_blockcache.finetuning.held_out import Evaluate, Evaluations, measure
from rag_blockcache.finetuning.network import (
    Trainee,
    layers_of,
    load_trainee,
    merge_adapter,
    save_weights,
    served_attention,
)
from rag_blockcache.finetuning.own_answers import answer_missing
from rag_blockcache.finetuning.packing import Row, collate
from rag_blockcache.finetuning.progress import Progress, Tell
from rag_blockcache.finetuning.recipe import Recipe
from rag_blockcache.finetuning.results import TrainingReport, read_results, record_of, write_results
from rag_blockcache.finetuning.rows import TrainingRows, held_out_rows, sample_maker, training_rows
from rag_blockcache.finetuning.run_folder import ANSWERS_FILE, claim, is_complete, last_checkpoint
from rag_blockcache.finetuning.trainer import BlockTrainer

logger = logging.getLogger(__name__)


def finetune(recipe: Recipe, *, evaluate: Evaluate | None = None, tell: Tell | None = None) -> TrainingReport:
    """Train a model to answer over blocks.

    A run that was killed goes on from its last checkpoint, with the same data in the same order, when it is
    called again with the same recipe; one that is complete is not repeated.

    Args:
        recipe: What to train, on what, and how.
        evaluate: Called with the model of transformers and the step, before the first step, every
            ``eval_every`` steps and after the last one. The numbers that it returns by name join the history.
        tell: Called with a line now and then; None logs them.

    Raises:
        InvalidInputError: If the recipe or a file cannot be used, or ``out`` holds another run.
        ModelNotFoundError: If the model cannot be found.
        UnsupportedModelError: If it cannot be trained, or could not be served.
    """
    tell = (tell or logger.info) if _is_first_process() else logger.debug
    out = Path(recipe.out)
    files, held_out = (
        [
            read_data(
                Path(path),
                Path(recipe.passages) if recipe.passages else None,
                needs_answers=not recipe.own_answers,
            )
            for path in paths
        ]
        for paths in (recipe.data, recipe.eval_data)
    )
    if _is_first_process():
        claim(out, recipe, [*files, *held_out])
    if is_complete(out):
        tell(f"{out} is complete, nothing is trained")
    else:
        _train(recipe, files, held_out, evaluate or (lambda network, step: {}), tell)
    if recipe.merge and _is_first_process():
        tell("merging the adapter into the model")
        merge_adapter(recipe, out, out / "merged")
    return read_results(out)


def _train(
    recipe: Recipe, files: list[DataFile], held_out: list[DataFile], evaluate: Evaluate, tell: Tell
) -> None:
    out, start = Path(recipe.out), time.monotonic()
    trainee = load_trainee(recipe)
    maker = sample_maker(recipe, trainee.tokenizer, trainee.closing, trainee.max_tokens)
    if recipe.own_answers:
        answers = out / ANSWERS_FILE
        files = answer_missing(files, trainee, maker, answers, tell)
        held_out = answer_missing(held_out, trainee, maker, answers, tell)
    data = training_rows(recipe, files, trainee.tokenizer, trainee.closing, trainee.max_tokens)
    tell(_described(data, recipe, time.monotonic() - start))
    trainer = _trainer(recipe, trainee, data, held_out_rows(recipe, held_out, maker), evaluate, tell)
    start = time.monotonic()
    trainer.train(resume_from_checkpoint=last_checkpoint(out))
    seconds = time.monotonic() - start
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        record = record_of(recipe, trainee, files, data)
        save_weights(trainee, weights, record, out)
        write_results(record, trainer.state.log_history, seconds, out, is_adapter=recipe.is_adapter)
        tell(f"{recipe.steps:,} steps are done, the last of them in {seconds:.0f} s; weights are in {out}")
    trainer.accelerator.wait_for_everyone()


def _trainer(
    recipe: Recipe,
    trainee: Trainee,
    data: TrainingRows,
    held_out: list[Row],
    evaluate: Evaluate,
    tell: Tell,
) -> BlockTrainer:
    """Wire the Trainer with data, measurements and progress."""
    padded_to = recipe.row_tokens if trainee.masks.is_flex else None  # compiled for one length
    arguments = _arguments(recipe)

    def measure_held_out(network: Any) -> Mapping[str, float]:
        if not held_out:
            return {}
        return measure(network, held_out, trainee.masks, arguments.device, padded_to)

    def ask_user(step: int) -> Mapping[str, float]:
        with served_attention(trainee) as network:
            return evaluate(network, step)

    evaluations = Evaluations(recipe.eval_every, measure_held_out, ask_user)
    trainer = BlockTrainer(
        model=trainee.network,
        args=arguments,
        train_dataset=data.rows,
        data_collator=functools.partial(collate, padded_to=padded_to),
        callbacks=[evaluations, Progress(tell, recipe.row_tokens * recipe.rows_per_step)],
        masks=trainee.masks,
        distill=recipe.distill,
        match_states=recipe.match_states,
        teacher=recipe.teacher,
        layers=layers_of(trainee.base),
        has_base=recipe.is_adapter,
    )
    trainer.remove_callback(PrinterCallback)  # prints on stdout
    evaluations.trainer = trainer
    return trainer


def _arguments(recipe: Recipe) -> TrainingArguments:
    on_gpu, num_processes = torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE", "1"))
    if recipe.rows_per_step % num_processes:
        raise InvalidInputError(
            f"rows_per_step is {recipe.rows_per_step}, which {num_processes} processes cannot share; "
            f"give a multiple of {num_processes}"
        )
    if num_processes == 1 and torch.cuda.device_count() > 1:
        raise InvalidInputError(
            f"there are {torch.cuda.device_count()} GPUs; start with `accelerate launch` to use them, "
            "or set CUDA_VISIBLE_DEVICES to one"
        )
    return TrainingArguments(
        output_dir=str(Path(recipe.out) / "checkpoints"),
        max_steps=recipe.steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=recipe.rows_per_step // num_processes,
        learning_rate=recipe.peak_learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        bf16=recipe.precision == "bfloat16",
        train_sampling_strategy="sequential",
        logging_steps=recipe.log_every,
        save_steps=recipe.save_every,
        save_total_limit=2,
        seed=recipe.seed,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        report_to="none",
        **_checkpointing(recipe),
    )


def _checkpointing(recipe: Recipe) -> dict[str, Any]:
    """Ask for checkpointing by the name that this version of transformers has for it."""
    if not recipe.gradient_checkpointing:
        return {}
    is_renamed = any(each.name == "activation_checkpointing" for each in fields(TrainingArguments))
    name = f"{'activation' if is_renamed else 'gradient'}_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def _described(data: TrainingRows, recipe: Recipe, seconds: float) -> str:
    num_tokens = sum(len(row.token_ids) for row in data.rows)
    share = num_tokens / (len(data.rows) * recipe.row_tokens)
    too_long = f", {data.num_too_long:,} examples too long" if data.num_too_long else ""
    return (
        f"{sum(row.num_questions for row in data.rows):,} questions over "
        f"{sum(row.num_samples for row in data.rows):,} sets of passages in {len(data.rows):,} rows "
        f"({share:.0%} filled{too_long}), {num_tokens:,} tokens, made in {seconds:.0f} s"
    )


def _is_first_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0
