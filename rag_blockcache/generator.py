"""Context and computed slots in, tokens out: one prefill pass, then transformers' own ``generate()``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.modeling_outputs import CausalLMOutputWithPast

from rag_blockcache.assembler import Context
from rag_blockcache.errors import InvalidInputError
from rag_blockcache.generation_options import FIXED, setting, stop_strings
from rag_blockcache.gpu import run_pass
from rag_blockcache.model import Model
from rag_blockcache.monitor import Monitor, StopStrings


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
    if len(rows) == 1 and context.starts[0] == 0:
        context.begin(slice(int(rows[0].positions[0]), end), end)
        logits = run_pass(model, context, rows[0].token_ids, rows[0].positions, num_logits)
        if logits is not None:
            return logits
    if len(rows) == 1 and rows[0].is_tail and context.starts[0] == 0:
        # A run at the end needs no mask of ours: whatever attention the model uses is exact.
        context.begin(slice(end - len(rows[0].positions), end), end)
        return _forward(model, context, rows[0].token_ids[None], rows[0].positions[None], None, num_logits)
    width = max(len(row.positions) for row in rows)
    token_ids = torch.zeros((len(rows), width), dtype=torch.long)
    positions, slots = torch.zeros_like(token_ids), torch.zeros_like(token_ids)
    for index, row in enumerate(rows):
        fill = width - len(row.positions)  # in front, with tokens that no one attends to
        token_ids[index, fill:], positions[index, fill:] = row.token_ids, row.positions
        slots[index, fill:] = row.positions + context.starts[index]
    context.begin(slots, end)
    with model.dense_masks():
        mask = model.mask(slots.to(model.device), context.visible(end, model.device))
        return _forward(model, context, token_ids, positions, mask, num_logits)


def _forward(
    model: Model, context: Context, token_ids: Tensor, positions: Tensor, mask: Any, num_logits: int
) -> Tensor:
    with model.inference():
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
    eos = setting(model, options, "eos_token_id")
    ends = set(eos if isinstance(eos, list | tuple) else [eos]) - {None}
    pads = (setting(model, options, "pad_token_id"), model.tokenizer.pad_token_id, *ends, 0)
    pad = next(token for token in pads if token is not None)
    width = context.length
    input_ids = torch.empty((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        # Filled up with a token of its own, because logits processors count what they find.
        filled = [*[prompt[0]] * (width - len(prompt)), *prompt]
        input_ids[row] = torch.tensor(filled)
    chosen = {"pad_token_id": pad, **options, **FIXED, "stop_strings": None}
    stops = stop_strings(model, options)
    monitor.prompt_width = width
    monitor.criteria = StoppingCriteriaList(chosen.pop("stopping_criteria", None) or [])
    if stops:
        monitor.criteria.append(StopStrings(model, stops, width))
    try:
        sequences = _Decoder(model, context, first_logits).generate(
            input_ids.to(model.device),
            attention_mask=context.visible(width, model.device).long(),
            past_key_values=context,
            max_new_tokens=max_new_tokens,
            stopping_criteria=StoppingCriteriaList([monitor]),
            **chosen,
        )
    except ValueError as error:
        raise InvalidInputError(f"generate() of transformers refuses these options: {error}") from error
    if (setting(model, options, "num_beams") or 1) > 1:
        monitor.ended.clear()  # rows were beams
    rows = [row[width:].tolist() for row in sequences]
    return [_trim(row, ends, max_new_tokens, monitor, monitor.ended.get(i)) for i, row in enumerate(rows)]


def _trim(
    token_ids: list[int], ends: set[int], max_new_tokens: int, monitor: Monitor, num_tokens: int | None
) -> Decoded:
    """Take off what fills a finished row, and say why it is finished."""
    token_ids = token_ids[:num_tokens]
    for index, token in enumerate(token_ids):
        if token in ends:
            return Decoded(token_ids[: index + 1], "stop")
    if num_tokens is None and len(token_ids) >= max_new_tokens:
        return Decoded(token_ids, "length")
    is_cancelled = num_tokens is None and monitor.cancelled.is_set()
    return Decoded(token_ids, "cancelled" if is_cancelled else "stop")


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
        if input_ids.shape[1] > context.length:
            logits.append(self._step(input_ids))
        return CausalLMOutputWithPast(logits=torch.cat(logits, dim=1), past_key_values=context)

    __call__ = forward

    def _step(self, input_ids: Tensor) -> Tensor:
        """Compute the tokens behind the context, and return their logits."""
        model, context, end = self._model, self._context, input_ids.shape[1]
        num_new = end - context.length
        first = min(context.starts)  # of the longest prompt
        if model.regime(end - first) == "long" != model.regime(context.length - first):
            context.length = 0  # from here on the model turns all keys by other angles: compute them again
        start, context.length = context.length, end
        context.begin(slice(start, end), end)
        if len(input_ids) == 1 and context.starts[0] == 0:
            logits = run_pass(model, context, input_ids[0, start:], torch.arange(start, end), num_new)
            if logits is not None:
                return logits
        slots = torch.arange(start, end, device=input_ids.device)
        positions = slots - torch.tensor(context.starts, device=input_ids.device)[:, None]
        token_ids, positions = input_ids[:, start:], positions.clamp(min=0)
        if not any(context.starts):
            return _forward(model, context, token_ids, positions, None, num_new)
        with model.dense_masks():
            visible = context.visible(end, input_ids.device)
            mask = model.mask(slots.expand(len(token_ids), -1), visible)
            return _forward(model, context, token_ids, positions, mask, num_new)
