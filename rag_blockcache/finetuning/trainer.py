"""The loss of block fine-tuning, on top of transformers' Trainer; everything else is the Trainer's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Trainer

from rag_blockcache.finetuning.mask import Masks
from rag_blockcache.finetuning.network import as_teacher
from rag_blockcache.finetuning.packing import IGNORED, part_of

KINDS = ("block", "full", "text")  # answers by the mode they are learned in, and general text
_PARTS = 4  # lengths that a teacher is compiled for: so many parts of a row


def learned_places(batch: Mapping[str, Tensor]) -> Tensor:
    """Return the places of a row whose logits foretell a token that is learned, ``(num_learned,)``."""
    return (batch["labels"][0, 1:] != IGNORED).nonzero()[:, 0]


def learned_logits(
    network: nn.Module, batch: Mapping[str, Tensor], masks: Masks, *, full: bool = False
) -> Tensor:
    """Return the logits of all learned tokens of a row, ``(num_learned, vocab_size)``, float32.

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
        logits_to_keep=learned_places(batch),
        use_cache=False,
    )
    logits: Tensor = output.logits
    return logits[0].float()


def kinds_of(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return for each of ``KINDS`` which learned tokens of a row are of it, ``(num_learned,)``, bool."""
    places = learned_places(batch)
    is_block, is_text = (batch[name][0, 1:][places].bool() for name in ("is_block_mode", "is_text"))
    return dict(zip(KINDS, (is_block, ~is_block & ~is_text, is_text), strict=True))


def distance_to(teacher: Tensor, logits: Tensor) -> Tensor:
    """Return the KL divergence from the teacher at each token, ``(num_learned,)``."""
    told, said = teacher.log_softmax(-1), logits.log_softmax(-1)
    return functional.kl_div(said, told, log_target=True, reduction="none").sum(-1)


class BlockTrainer(Trainer):
    """Trains over rows.

    What counts of general text is its distance to what the base says, where there is a base to ask.

    Args:
        masks: Of the model.
        distill: Share of the loss of answers that is distance to the teacher.
        teacher: Who teaches them, see ``Recipe``.
        has_base: The model is one with an adapter, without which it is the base.
        **options: As for transformers' Trainer.
    """

    def __init__(self, *, masks: Masks, distill: float, teacher: str, has_base: bool, **options: Any) -> None:
        super().__init__(**options)
        self._masks, self._distill, self._teacher = masks, distill, teacher
        self._has_base = has_base
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
        """Return the loss of a row, over the number of learned tokens in the whole step."""
        assert num_items_in_batch is not None
        assert not return_outputs
        logits, places = learned_logits(model, inputs, self._masks), learned_places(inputs)
        losses = functional.cross_entropy(logits, inputs["labels"][0, 1:][places], reduction="none")
        is_text = inputs["is_text"][0, 1:][places].bool()
        if self._has_base and bool(is_text.any()):
            taught = self._teacher_logits(model, inputs, of_text=True, teacher="base")
            losses = losses.masked_scatter(is_text, distance_to(taught, logits[is_text]))
        self._note(inputs, losses.detach())
        if self._distill and not bool(is_text.all()):
            taught = self._teacher_logits(model, inputs, of_text=False, teacher=self._teacher)
            distances = distance_to(taught, logits[~is_text])
            mixed = (1 - self._distill) * losses[~is_text] + self._distill * distances
            losses = losses.masked_scatter(~is_text, mixed)
        # The average over processes that follows must come to a sum.
        return losses.sum() / num_items_in_batch * self.accelerator.num_processes

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; beside the loss, that of each kind of sample since the last time."""
        if "loss" in logs and self._seen:
            seen = {name: self.accelerator.reduce(each, "sum") for name, each in self._seen.items()}
            for kind in KINDS:
                total, count = seen[kind].tolist()
                if count:
                    logs[f"loss_{kind}"] = total / count
            self._seen = {}
        super().log(logs, start_time)

    @torch.no_grad()
    def _teacher_logits(
        self, model: nn.Module, inputs: dict[str, Any], *, of_text: bool, teacher: str
    ) -> Tensor:
        """Return what a teacher says of the learned tokens of text, or of answers, under full attention."""
        is_wanted = (inputs["is_text"][0].bool() == of_text) & (inputs["block_ids"][0] >= 0)
        multiple = -(-inputs["input_ids"].shape[1] // _PARTS) if self._masks.is_flex else 1
        part = part_of(inputs, is_wanted, multiple_of=multiple)
        with as_teacher(self.accelerator.unwrap_model(model), teacher):
            return learned_logits(model, part, self._masks, full=True)

    def _note(self, inputs: dict[str, Any], losses: Tensor) -> None:
        """Add up losses and their number by kind, on the device."""
        for kind, chosen in kinds_of(inputs).items():
            found = torch.stack((losses[chosen].sum().double(), chosen.sum().double()))
            self._seen[kind] = self._seen[kind] + found if kind in self._seen else found
