"""The model that is trained: loading it, its adapter, saving what came out, and merging."""

from __future__ import annotations

import contextlib
import functools
import inspect
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from rag_blockcache import attention as grouped_attention
from rag_blockcache.errors import InvalidInputError, UnsupportedModelError
from rag_blockcache.finetuning import lora_layers, mask
from rag_blockcache.finetuning.mask import Masks
from rag_blockcache.finetuning.recipe import Recipe
from rag_blockcache.finetuning.samples import closing_tokens
from rag_blockcache.loading import compare_base, load_model, training_record_of
from rag_blockcache.model import Model
from rag_blockcache.training_record import RECORD_FILE, TrainingRecord, weights_fingerprint

_VARIANTS = 64  # of a layer: trained, measured or asked as a teacher, in each length
_TRAINED, _TEACHER = "default", "teacher"  # names of adapters inside the model


@dataclass(frozen=True)
class Trainee:
    """A model ready for training.

    Attributes:
        network: Of transformers, or of PEFT around it.
        tokenizer: Its tokenizer.
        masks: Makes its attention masks.
        closing: Tokens behind every answer.
        max_tokens: Longest sample.
        base_fingerprint: Of the weights before training.
        base_revision: Their commit on the hub, if they came from there.
        served_attention: What the model attends with when it is not trained.
    """

    network: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    masks: Masks
    closing: tuple[int, ...]
    max_tokens: int
    base_fingerprint: str
    base_revision: str | None
    served_attention: str

    @property
    def base(self) -> PreTrainedModel:
        """The model of transformers, the layers of the adapter included."""
        network = self.network
        return cast(PreTrainedModel, network.get_base_model()) if isinstance(network, PeftModel) else network


def load_trainee(recipe: Recipe) -> Trainee:
    """Load the model of a recipe, and give it an adapter if the recipe asks for one.

    Raises:
        ModelNotFoundError: If it cannot be found.
        UnsupportedModelError: If blocks of it could not be served, or it cannot be trained over rows.
        InvalidInputError: If rows are longer than it can be served with reused blocks.
    """
    set_seed(recipe.seed)
    # Adam needs weights of full precision; a frozen base is only computed with.
    dtype = recipe.precision if recipe.is_adapter else "float32"
    model = load_model(recipe.model, device="cpu", dtype=dtype)  # the Trainer moves it
    network, tokenizer = model.network, model.tokenizer
    if "logits_to_keep" not in inspect.signature(network.forward).parameters:
        raise UnsupportedModelError(
            f"{type(network).__name__} computes logits of all tokens at once, which takes too much memory "
            "over long rows; use a model whose forward takes logits_to_keep"
        )
    max_tokens = min(recipe.row_tokens, model.max_length)
    if model.regime(max_tokens) != "":
        raise InvalidInputError(
            f"at {max_tokens} tokens the rotary frequencies of this model are others than for short prompts, "
            "and a row may hold both; give a smaller row_tokens"
        )
    served = str(model.config._attn_implementation)
    masks = choose_attention(model, recipe.attention)
    fingerprint = weights_fingerprint(network)
    for adapter in recipe.adapters.values():
        if (known := training_record_of(recipe.model, adapter)) is not None:
            compare_base(fingerprint, known)
    trained = _with_adapter(network, recipe) if recipe.is_adapter else network
    if recipe.compile_layers:
        _compile_layers(network, masks)
    return Trainee(
        network=trained,
        tokenizer=tokenizer,
        masks=masks,
        closing=closing_tokens(tokenizer, _end_ids(network, tokenizer)),
        max_tokens=max_tokens,
        base_fingerprint=fingerprint,
        base_revision=getattr(network.config, "_commit_hash", None),
        served_attention=served,
    )


def _compile_layers(network: PreTrainedModel, masks: Masks) -> None:
    """Compile each layer; they are alike, so that this is done for one, and the others have it.

    Rows for FlexAttention have one length, their teachers a few: each is compiled for, and for each teacher.
    """
    if masks.is_flex:
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, _VARIANTS)
    for layer in layers_of(network):  # not with its hooks, which come and go
        layer.forward = torch.compile(layer.forward, dynamic=False if masks.is_flex else None)


def layers_of(network: PreTrainedModel) -> list[nn.Module]:
    """Return the layers of a model in their order."""
    kinds = set(network._no_split_modules or ())
    return [
        module for module in network.modules() if type(module).__name__ in kinds and module is not network
    ]


@contextlib.contextmanager
def served_attention(trainee: Trainee) -> Iterator[PreTrainedModel]:
    """Let the model attend as it does when it is served, inside this block only."""
    used = trainee.base.config._attn_implementation
    trainee.base.set_attn_implementation(trainee.served_attention)
    try:
        yield trainee.base
    finally:
        trainee.base.set_attn_implementation(used)


def choose_attention(model: Model, wanted: Literal["auto", "flex", "sdpa"]) -> Masks:
    """Set the attention that a model is trained with, and return what makes its masks.

    A model that transformers computes eagerly, because its scores are capped, say, stays so without flex.

    Raises:
        InvalidInputError: If FlexAttention is asked for and there is no GPU, or the model does not take it.
    """
    network = model.network
    takes_flex = all(
        getattr(network, name, False) for name in ("_supports_attention_backend", "_supports_flex_attn")
    )
    if wanted == "flex" and not (takes_flex and torch.cuda.is_available()):
        reason = "this model does not take it" if torch.cuda.is_available() else "it needs a GPU to train"
        raise InvalidInputError(f"FlexAttention cannot be used: {reason}; take attention 'sdpa' or 'auto'")
    windows = {layer.layer_type: layer.window for layer in model.layers}
    if wanted != "sdpa" and takes_flex and torch.cuda.is_available():
        mask.register()
        network.set_attn_implementation(mask.FLEX)
        return Masks(windows, "flex")
    if model.config._attn_implementation == "eager":
        return Masks(windows, "additive", model.dtype)
    if getattr(network, "_supports_attention_backend", False):
        network.set_attn_implementation(grouped_attention.NAME)
    return Masks(windows, "boolean")


def _end_ids(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens at which generation stops."""
    given = getattr(network.generation_config, "eos_token_id", None)
    ids = [given] if isinstance(given, int) else list(given or ())
    ids = ids or ([int(tokenizer.eos_token_id)] if tokenizer.eos_token_id is not None else [])
    if not ids:
        raise InvalidInputError("neither model nor tokenizer has an end-of-sequence token; set one")
    return ids


def _with_adapter(network: PreTrainedModel, recipe: Recipe) -> PeftModel:
    network.config._name_or_path = network.name_or_path = recipe.model_name  # no folder of this machine
    with _without_warning_of_peft():
        model = _going_on(network, recipe) if recipe.start_from else _starting(network, recipe)
        if recipe.teaching_adapter:
            with _named_adapter(recipe, recipe.teaching_adapter, "no one can teach as"):
                model.load_adapter(recipe.teaching_adapter, _TEACHER)
    lora_layers.fuse(model)
    # Left to itself, PEFT asks the hub at every checkpoint whether the vocabulary has grown.
    model.save_pretrained = functools.partial(  # type: ignore[method-assign]
        model.save_pretrained, save_embedding_layers=False, selected_adapters=[_TRAINED]
    )
    return model


def _starting(network: PreTrainedModel, recipe: Recipe) -> PeftModel:
    config = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return cast(PeftModel, get_peft_model(network, config, adapter_name=_TRAINED))


def _going_on(network: PreTrainedModel, recipe: Recipe) -> PeftModel:
    assert recipe.start_from is not None
    with _named_adapter(recipe, recipe.start_from, "training cannot start from"):
        return PeftModel.from_pretrained(network, recipe.start_from, _TRAINED, is_trainable=True)


@contextlib.contextmanager
def _named_adapter(recipe: Recipe, adapter: str, what: str) -> Iterator[None]:
    """Say of an adapter that cannot be loaded what it was wanted for."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InvalidInputError(
            f"{what} {adapter}: {error}; give an adapter of {recipe.model_name}"
        ) from error


@contextlib.contextmanager
def as_teacher(network: nn.Module, teacher: str) -> Iterator[None]:
    """Let a model be its teacher inside this block, see ``Recipe.teacher``; one without adapter is itself."""
    if teacher == "itself":
        yield
        return
    model = cast(PeftModel, network)
    if teacher == "base":
        # Of the tuner, not of the model: that one looks at every layer first, before every step.
        tuner: Any = model.base_model
        tuner.disable_adapter_layers()
        try:
            yield
        finally:
            tuner.enable_adapter_layers()
        return
    model.set_adapter(_TEACHER, inference_mode=True)
    try:
        yield
    finally:
        model.set_adapter(_TRAINED)


@contextlib.contextmanager
def _without_warning_of_peft() -> Iterator[None]:
    """Keep from users that PEFT asks a model for something by an old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield


def save_weights(trainee: Trainee, weights: Mapping[str, Tensor], record: TrainingRecord, out: Path) -> None:
    """Write what was trained, in bfloat16, with its record.

    Args:
        trainee: What was trained.
        weights: Its weights, complete, by the names of ``trainee.network``.
        record: What to say of them.
        out: Folder to write to.
    """
    rounded = {
        name: weight.to(torch.bfloat16) if weight.is_floating_point() else weight
        for name, weight in weights.items()
    }
    if isinstance(trainee.network, PeftModel):
        trainee.network.save_pretrained(str(out), state_dict=rounded)
    else:
        _save_model(trainee.network, trainee.tokenizer, rounded, record, out)
    record.write(out)


def merge_adapter(recipe: Recipe, adapter: Path, out: Path) -> None:
    """Write the base model with an adapter merged into it, to be used like any other model."""
    record = TrainingRecord.read(adapter / RECORD_FILE)
    model = load_model(recipe.model, device="cpu", dtype="float32")
    with _without_warning_of_peft():
        merged = PeftModel.from_pretrained(model.network, str(adapter)).merge_and_unload()
    network = cast(PreTrainedModel, merged).to(torch.bfloat16)  # type: ignore[arg-type]
    shutil.rmtree(out, ignore_errors=True)
    _save_model(network, model.tokenizer, None, record, out)
    record.write(out)


def _save_model(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: Any,
    record: TrainingRecord,
    out: Path,
) -> None:
    network.save_pretrained(out, state_dict=weights)
    network.config.block_fine_tuned = record.block_fine_tuned
    network.config.dtype = torch.bfloat16  # saving the model wrote what it was trained in
    network.config.save_pretrained(out)
    tokenizer.save_pretrained(out)
