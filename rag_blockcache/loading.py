"""Models by name: from a hub, from a folder, or already in the user's hands."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from rag_blockcache.errors import InvalidInputError, MissingDependencyError, ModelNotFoundError
from rag_blockcache.model import Model
from rag_blockcache.training_record import RECORD_FILE, TrainingRecord, weights_fingerprint

logger = logging.getLogger(__name__)


def load_model(
    model: str | Path | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    adapter: str | Path | None = None,
) -> Model:
    """Load a model by hub id or local path, or take one that is loaded already as it is.

    Args:
        model: Hub id, local folder, or a causal language model of transformers.
        tokenizer: Needed with a loaded model; otherwise the model's own by default.
        device: Where to put a model that is loaded here; ``"auto"`` spreads it over all devices. None
            takes a GPU if there is one.
        dtype: Of a model that is loaded here, such as ``"bfloat16"``; None keeps that of its files.
        adapter: A PEFT adapter (hub id or folder) to load into a model that is loaded here.

    Raises:
        ModelNotFoundError: If model, tokenizer or adapter cannot be found or read.
        InvalidInputError: If options do not go together.
        UnsupportedModelError: If the model cannot be served exactly.
    """
    if isinstance(model, PreTrainedModel):
        if tokenizer is None:
            raise InvalidInputError("a loaded model needs its tokenizer; pass tokenizer= beside model=")
        if device is not None or dtype is not None or adapter is not None:
            raise InvalidInputError(
                "device, dtype and adapter apply to a model that is loaded by name; "
                "set them on the loaded model before you pass it"
            )
        network, record = model, None
    elif isinstance(model, str | Path):
        record = training_record_of(model, adapter)
        network = _load_network(str(model), device, dtype, adapter, record)
        tokenizer = str(model) if tokenizer is None else tokenizer
    else:
        raise InvalidInputError(
            f"model is {type(model).__name__}; pass a hub id, a folder, or a transformers PreTrainedModel"
        )
    if isinstance(tokenizer, str | Path):
        tokenizer = _load_tokenizer(str(tokenizer))
    return Model(network, tokenizer, training_record=record)


@dataclass(frozen=True)
class ModelCard:
    """What is known of a model without its weights.

    Attributes:
        tokenizer: As it will be used.
        max_length: Context window in tokens.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int


def model_card(
    model: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | str | Path | None = None
) -> ModelCard:
    """Read configuration and tokenizer of a model; see ``load_model``.

    Raises:
        ModelNotFoundError: If one of them cannot be found or read.
    """
    if isinstance(model, PreTrainedModel):
        config: Any = model.config
    else:
        try:
            config = AutoConfig.from_pretrained(str(model))
        except (OSError, ValueError, KeyError) as error:
            raise ModelNotFoundError(
                f"cannot read the configuration of model {model}: {_first_line(error)}; "
                "give a hub id, or a folder with config.json and weights"
            ) from error
    if tokenizer is None or isinstance(tokenizer, str | Path):
        tokenizer = _load_tokenizer(str(tokenizer or model))
    return ModelCard(tokenizer, int(config.get_text_config(decoder=True).max_position_embeddings))


def _load_network(
    name: str,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    adapter: str | Path | None,
    record: TrainingRecord | None,
) -> PreTrainedModel:
    if isinstance(dtype, str) and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise InvalidInputError(f"dtype {dtype!r} is unknown; use float32, bfloat16 or float16")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    options: dict[str, Any] = {"dtype": "auto" if dtype is None else dtype}
    if device == "auto":
        options["device_map"] = "auto"
    what = name if adapter is None else f"{name} with adapter {adapter}"
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
        network: PreTrainedModel = loaded[0]
        if adapter is not None:
            if record is not None:
                compare_base(weights_fingerprint(network), record)
            network.load_adapter(str(adapter))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelNotFoundError(
            f"cannot load model {what}: {_first_line(error)}; "
            "give a hub id, or a folder with config.json and weights"
        ) from error
    except ImportError as error:
        extra = "install what is missing" if adapter is None else "pip install 'rag_blockcache[finetune]'"
        raise MissingDependencyError(f"cannot load model {what}: {_first_line(error)}; {extra}") from error
    except RuntimeError as error:  # PEFT, of shapes that do not fit
        raise InvalidInputError(
            f"cannot load model {what}: {_first_line(error)}; use the adapter with the model it was made for"
        ) from error
    missing = sorted(loaded[1]["missing_keys"])
    if missing:  # transformers fills them with random numbers
        raise ModelNotFoundError(
            f"the files of {name} lack {len(missing)} weights, {missing[0]} first; get them complete"
        )
    if device == "auto":
        return network
    try:
        network.to(device)  # type: ignore[arg-type]  # transformers narrows torch's signature
    except (RuntimeError, AssertionError) as error:
        raise InvalidInputError(
            f"device {str(device)!r} cannot be used: {_first_line(error)}; try device='cpu'"
        ) from error
    return network


def training_record_of(model: str | Path, adapter: str | Path | None) -> TrainingRecord | None:
    """Read what an adapter, or else a folder of weights, says of its training."""
    if adapter is None:
        path = Path(model) / RECORD_FILE
        return TrainingRecord.read(path) if path.is_file() else None
    try:
        found = cached_file(
            str(adapter),
            RECORD_FILE,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:  # no such adapter, which loading it says better
        return None
    return TrainingRecord.read(Path(found)) if found is not None else None


def compare_base(fingerprint: str, record: TrainingRecord) -> None:
    """Warn if an adapter was trained on other weights than these, see ``weights_fingerprint``."""
    if fingerprint != record.base_fingerprint:
        logger.warning(
            "the adapter was trained on other weights of %s than these, such as another revision or a "
            "quantized copy; answers can be worse than those it was measured by",
            record.base_model,
        )


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ModelNotFoundError(
            f"cannot load a tokenizer from {name}: {_first_line(error)}; "
            "pass tokenizer= with a folder that has one"
        ) from error
    return loaded


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
