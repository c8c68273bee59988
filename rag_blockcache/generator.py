"""Context and computed slots in, tokens out: one prefill pass, then transformers' own ``generate()``."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.modeling_outputs import CausalLMOutputWithPast

from rag_blockcache.assembler import Context
from rag_blockcache.errors import InvalidInputError
from rag_blockcache.model import Model

_OURS = ("max_new_tokens", "use_cache", "cache_implementation", "past_key_values", "return_dict_in_generate")


@dataclass(frozen=True)
class Computed:
    """The slots of one prompt that a pass computes.

    Attributes:
        positions: Ascending positions in the prompt, up to its last token; ``(num_computed,)``.
        token_ids: Tokens at those positions, same shape.
    """

    positions: Tensor
    token_ids: Tensor

    @property
    def is_tail(self) -> bool:
        """Whether the slots are one run, with nothing placed after its start."""
        return int(self.positions[-1] - self.positions[0]) == len(self.positions) - 1


@torch.inference_mode()
def prefill(model: Model, context: Context, rows: Sequence[Computed], *, num_logits: int = 1) -> Tensor:
    """Compute slots of a context, wherever they stand, in one pass.

    Every computed token attends causally to all slots before it, placed or computed, and its keys and values
    are written in place.

    Args:
        model: The model.
        context: Holds the placed slots already.
        rows: Computed slots of each prompt of the context.
        num_logits: For how many of the last tokens logits are wanted.

    Returns:
        Logits ``(batch, num_logits, vocab_size)``, in the model's dtype.
    """
    end = context.length
    if len(rows) == 1 and rows[0].is_tail and context.starts[0] == 0:
        # A run at the end needs no mask of ours: whatever attention the model uses is exact.
        context.begin(slice(end - len(rows[0].positions), end), end)
        return _forward(model, context, rows[0].token_ids[None], rows[0].positions[None], None, num_logits)
    width = max(len(row.positions) for row in rows)
    token_ids = torch.zeros((len(rows), width), dtype=torch.long)
    positions, slots = torch.zeros_like(token_ids), torch.zeros_like(token_ids)
    for index, row in enumerate(
        rows
    ):  # a shorter row is filled up in front, with tokens that no one attends to
        fill = width - len(row.positions)
        token_ids[index, fill:], positions[index, fill:] = row.token_ids, row.positions
        slots[index, fill:] = row.positions + context.starts[index]
    context.begin(slots, end)
    with model.dense_masks():
        mask = model.mask(slots.to(model.device), context.visible(end, model.device))
        return _forward(model, context, token_ids, positions, mask, num_logits)


def _forward(
    model: Model, context: Context, token_ids: Tensor, positions: Tensor, mask: Any, num_logits: int
) -> Tensor:
    with model.lock:
        output = model.network(
            input_ids=token_ids.to(model.device),
            position_ids=positions.to(model.device),
            attention_mask=mask,
            past_key_values=context,
            use_cache=True,
            logits_to_keep=num_logits,
        )
    return output.logits[:, -num_logits:]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Decoded:
    """What decoding gave for one prompt.

    Attributes:
        token_ids: New tokens, without the padding of a finished row.
        finish_reason: ``stop`` (end of sequence, stop string or criterion), ``length`` or ``cancelled``.
    """

    token_ids: list[int]
    finish_reason: str


class Monitor(StoppingCriteria):
    """Sees every step of ``generate()``: keeps the clock, reports tokens of the first row, can end it.

    Attributes:
        cancelled: Set it, from any thread, and decoding stops after the current token.
        first_token_time: ``time.perf_counter()`` when the first token was chosen; None before.
        last_token_time: Likewise of the latest.
        prompt_width: Tokens in front of the first new one.
        num_tokens: New tokens so far, in a row.
    """

    def __init__(self, on_token: Callable[[int], None] | None = None) -> None:
        self.cancelled = threading.Event()
        self.first_token_time: float | None = None
        self.last_token_time: float | None = None
        self.prompt_width = 0
        self.num_tokens = 0
        self._on_token = on_token

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Take note of one step; called by transformers after each."""
        self.last_token_time = time.perf_counter()
        if self.first_token_time is None:
            self.first_token_time = self.last_token_time
        known = self.prompt_width + self.num_tokens
        self.num_tokens = input_ids.shape[1] - self.prompt_width
        if self._on_token is not None:
            for token in input_ids[0, known:].tolist():
                self._on_token(token)
        return torch.full((len(input_ids),), self.cancelled.is_set(), device=input_ids.device)


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse generation options that transformers' ``generate()`` would not know, and those that are ours.

    Raises:
        InvalidInputError: If an option is unknown or cannot be chosen here.
    """
    known = set(GenerationConfig().to_dict())  # type: ignore[no-untyped-call]
    known |= set(inspect.signature(GenerationMixin.generate).parameters)
    for name in options:
        if name in _OURS or name in ("self", "inputs", "kwargs", "custom_generate", "negative_prompt_ids"):
            raise InvalidInputError(f"generation option {name!r} cannot be set here; the engine chooses it")
        if name not in known:
            raise InvalidInputError(
                f"generation option {name!r} is unknown; see transformers.GenerationConfig"
            )


@torch.inference_mode()
def decode(
    model: Model,
    context: Context,
    prompts: Sequence[Sequence[int]],
    first_logits: Tensor,
    *,
    max_new_tokens: int,
    monitor: Monitor,
    options: Mapping[str, Any],
) -> list[Decoded]:
    """Generate from prefilled prompts with everything that transformers' ``generate()`` offers.

    Args:
        model: The model.
        context: All slots of the prompts are filled.
        prompts: Token ids of each, which logits processors may look at.
        first_logits: Of the first new token, ``(batch, 1, vocab_size)``.
        max_new_tokens: Stop after so many.
        monitor: Keeps the clock; see there.
        options: Further arguments of ``generate()``: sampling, processors, stop strings, criteria, streamer.
    """
    config = model.network.generation_config
    eos = options.get("eos_token_id", config.eos_token_id)
    ends = set(eos if isinstance(eos, list | tuple) else [eos]) - {None}
    pad = next(
        (token for token in (config.pad_token_id, model.tokenizer.pad_token_id, *ends) if token is not None),
        0,
    )
    input_ids = torch.full((len(prompts), context.length), pad)
    for row, prompt in enumerate(prompts):
        input_ids[row, context.length - len(prompt) :] = torch.tensor(prompt)
    chosen = {"pad_token_id": pad, **options}
    if chosen.get("stop_strings"):
        chosen["tokenizer"] = model.tokenizer
    monitor.prompt_width = width = context.length
    criteria = StoppingCriteriaList([*(chosen.pop("stopping_criteria", None) or []), monitor])
    sequences = _Decoder(model, context, first_logits).generate(
        input_ids.to(model.device),
        attention_mask=context.visible(width, model.device).long(),
        past_key_values=context,
        max_new_tokens=max_new_tokens,
        stopping_criteria=criteria,
        **chosen,
    )
    return [_trim(row[width:].tolist(), ends, max_new_tokens, monitor) for row in sequences]


def _trim(token_ids: list[int], ends: set[int], max_new_tokens: int, monitor: Monitor) -> Decoded:
    for index, token in enumerate(token_ids):
        if token in ends:
            return Decoded(token_ids[: index + 1], "stop")
    if monitor.cancelled.is_set():
        return Decoded(token_ids, "cancelled")
    return Decoded(token_ids, "length" if len(token_ids) >= max_new_tokens else "stop")


class _Decoder(GenerationMixin):
    """Lets ``generate()`` start from a context that is filled already, the first logits included.

    It is what transformers asks of a model that generates, and nothing more; each step is the user's model.
    """

    main_input_name = "input_ids"
    _is_stateful = False

    def __init__(self, model: Model, context: Context, first_logits: Tensor) -> None:
        self._model, self._context, self._first_logits = model, context, first_logits
        self._has_started = False
        self.config = model.network.config
        self.generation_config = model.network.generation_config
        self.device, self.dtype = model.device, model.dtype

    def __getattr__(self, name: str) -> Any:
        """Answer whatever else ``generate()`` asks of a model as the user's model does."""
        return getattr(self.__dict__["_model"].network, name)

    def prepare_inputs_for_generation(  # type: ignore[override]  # what is not named here is an error
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Context | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        is_first_iteration: bool | None = None,
    ) -> dict[str, Any]:
        """Pass all tokens on; ``forward`` knows which of them are in the context."""
        return {"input_ids": input_ids}

    def forward(self, input_ids: Tensor, return_dict: bool = True) -> CausalLMOutputWithPast:
        """Return logits of the tokens that are not in the context yet, after those known at the start."""
        context = self._context
        if len(input_ids) > len(context.starts):
            context.batch_repeat_interleave(len(input_ids) // len(context.starts))
        logits = []
        if not self._has_started:
            logits.append(
                self._first_logits.repeat_interleave(len(input_ids) // len(self._first_logits), dim=0)
            )
            self._has_started = True
        new = input_ids[:, context.length :]
        if new.shape[1]:
            logits.append(self._step(new))
        return CausalLMOutputWithPast(logits=torch.cat(logits, dim=1), past_key_values=context)

    __call__ = forward

    def _step(self, token_ids: Tensor) -> Tensor:
        context, start = self._context, self._context.length
        context.length = end = start + token_ids.shape[1]
        context.begin(slice(start, end), end)
        slots = torch.arange(start, end, device=token_ids.device)
        positions = slots - torch.tensor(context.starts, device=token_ids.device)[:, None]
        if not any(context.starts):
            return _forward(self._model, context, token_ids, positions, None, token_ids.shape[1])
        with self._model.dense_masks():
            visible = context.visible(end, token_ids.device)
            mask = self._model.mask(slots.expand(len(token_ids), -1), visible)
            return _forward(self._model, context, token_ids, positions, mask, token_ids.shape[1])
