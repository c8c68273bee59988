"""The loss of block fine-tuning, on top of transformers' Trainer; everything else is the Trainer's own."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Trainer

from rag_blockcache.finetuning.mask import Masks
from rag_blockcache.finetuning.packing import IGNORED


def answer_places(batch: Mapping[str, Tensor]) -> Tensor:
    """Return the places of a row whose logits foretell a token of an answer, ``(num_answer_tokens,)``."""
    return (batch["labels"][0, 1:] != IGNORED).nonzero()[:, 0]


def answer_logits(
    network: nn.Module, batch: Mapping[str, Tensor], masks: Masks, *, full: bool = False
) -> Tensor:
    """Return the logits of all tokens of answers in a row, ``(num_answer_tokens, vocab_size)``, float32.

    Args:
        network: As the Trainer wrapped it.
        batch: See ``packing.collate``.
        masks: Of this model.
        full: Attend in full within each sample, whatever its mode.
    """
    output = network(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=masks.of(batch, full=full),
        logits_to_keep=answer_places(batch),
        use_cache=False,
    )
    logits: Tensor = output.logits
    return logits[0].float()


def distance_to(teacher: Tensor, logits: Tensor) -> Tensor:
    """Return the KL divergence from the teacher at each token, ``(num_answer_tokens,)``."""
    told, said = teacher.log_softmax(-1), logits.log_softmax(-1)
    return functional.kl_div(said, told, log_target=True, reduction="none").sum(-1)


class BlockTrainer(Trainer):
    """Trains over rows.

    Args:
        masks: Of the model.
        distill: Share of the loss that is distance to the teacher.
        teaches_itself: The teacher is the model as it is, and not as it was before training.
        **options: As for transformers' Trainer.
    """

    def __init__(self, *, masks: Masks, distill: float, teaches_itself: bool, **options: Any) -> None:
        super().__init__(**options)
        self._masks, self._distill, self._teaches_itself = masks, distill, teaches_itself
        # The Trainer then counts the labels of a step, and leaves dividing by their number to us.
        self.model_accepts_loss_kwargs = True
        self._seen: dict[str, Tensor] = {}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a row, over the number of answer tokens in the whole step."""
        assert num_items_in_batch is not None
        assert not return_outputs
        logits = answer_logits(model, inputs, self._masks)
        targets = inputs["labels"][0, 1:][answer_places(inputs)]
        losses = functional.cross_entropy(logits, targets, reduction="none")
        self._note(inputs, losses.detach())
        if self._distill:
            distances = distance_to(self._teacher_logits(model, inputs), logits)
            losses = (1 - self._distill) * losses + self._distill * distances
        # The average over processes that follows must come to a sum.
        return losses.sum() / num_items_in_batch * self.accelerator.num_processes

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; beside the loss, that of each mode since the last time."""
        if "loss" in logs and self._seen:
            seen = {name: self.accelerator.reduce(each, "sum") for name, each in self._seen.items()}
            for mode in ("block", "full"):
                total, count = seen[mode].tolist()
                if count:
                    logs[f"loss_{mode}"] = total / count
            self._seen = {}
        super().log(logs, start_time)

    @torch.no_grad()
    def _teacher_logits(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        network: Any = self.accelerator.unwrap_model(model)
        with contextlib.nullcontext() if self._teaches_itself else network.disable_adapter():
            return answer_logits(model, inputs, self._masks, full=True)

    def _note(self, inputs: dict[str, Any], losses: Tensor) -> None:
        """Add up losses and their number by mode, on the device."""
        is_block = inputs["is_block_mode"][0, 1:][answer_places(inputs)].bool()
        for mode, chosen in (("block", is_block), ("full", ~is_block)):
            found = torch.stack((losses[chosen].sum().double(), chosen.sum().double()))
            self._seen[mode] = self._seen[mode] + found if mode in self._seen else found
