"""The loss of block fine-tuning, on top of transformers' Trainer; everything else is the Trainer's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
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


@contextlib.contextmanager
def recorded_states(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect what layers give inside this block, in the order in which they are run."""
    found: list[Tensor] = []

    def note(_layer: nn.Module, _inputs: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def distance_of_states(teacher: Sequence[Tensor], states: Sequence[Tensor]) -> Tensor:
    """Return how far states are from those of a teacher, the mean over layers and dimensions.

    Args:
        teacher: Of each layer, ``(num_tokens, hidden_size)``.
        states: Alike.

    Returns:
        A scalar: the squared distance over the variance that the teacher's states have over the tokens. So a
        dimension of large values weighs what any other does.
    """
    shares = []
    for told, said in zip(teacher, states, strict=True):
        variance = told.float().var(0, correction=0).clamp(min=torch.finfo(torch.float32).tiny)
        shares.append(((said.float() - told.float()).square().mean(0) / variance).mean())
    return torch.stack(shares).mean()


def of_branches(batch: Mapping[str, Tensor], states: Sequence[Tensor]) -> list[Tensor]:
    """Return the states of questions and answers in a row, of each layer, ``(num_tokens, hidden_size)``."""
    places = batch["branch_ids"][0].nonzero()[:, 0]
    return [each[0, places] for each in states]


class BlockTrainer(Trainer):
    """Trains over rows.

    What counts of general text is its distance to what the base says, where there is a base to ask.

    Args:
        masks: Of the model.
        distill: Share of the loss of answers that is distance to the teacher.
        match_states: Weight of the distance of states to the teacher's, for each token of an answer.
        teacher: Who teaches, see ``Recipe``.
        layers: Of the model.
        has_base: The model is one with an adapter, without which it is the base.
        **options: As for transformers' Trainer.
    """

    def __init__(
        self,
        *,
        masks: Masks,
        distill: float,
        match_states: float,
        teacher: str,
        layers: Sequence[nn.Module],
        has_base: bool,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._masks, self._distill, self._teacher = masks, distill, teacher
        self._match_states, self._has_base = match_states, has_base
        self._layers = layers if match_states else ()
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
        with recorded_states(self._layers) as states:
            logits, places = learned_logits(model, inputs, self._masks), learned_places(inputs)
        losses = functional.cross_entropy(logits, inputs["labels"][0, 1:][places], reduction="none")
        is_text = inputs["is_text"][0, 1:][places].bool()
        if self._has_base and bool(is_text.any()):
            taught, _ = self._teacher_logits(model, inputs, of_text=True, teacher="base")
            losses = losses.masked_scatter(is_text, distance_to(taught, logits[is_text]))
        self._note(inputs, losses.detach())
        if (self._distill or self._match_states) and not bool(is_text.all()):
            answers = self._taught(model, inputs, losses[~is_text], logits[~is_text], states)
            losses = losses.masked_scatter(~is_text, answers)
        # The average over processes that follows must come to a sum.
        return losses.sum() / num_items_in_batch * self.accelerator.num_processes

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; beside the loss, that of each kind of sample since the last time."""
        if "loss" in logs and self._seen:
            seen = {name: self.accelerator.reduce(each, "sum") for name, each in self._seen.items()}
            for kind, (total, count) in ((kind, each.tolist()) for kind, each in seen.items()):
                if count:
                    logs[f"loss_{kind}"] = total / count
            self._seen = {}
        super().log(logs, start_time)

    def _taught(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        losses: Tensor,
        logits: Tensor,
        states: Sequence[Tensor],
    ) -> Tensor:
        """Return the losses of answer tokens, the teacher heard, ``(num_answer_tokens,)``."""
        with recorded_states(self._layers) as told:
            taught, asked = self._teacher_logits(model, inputs, of_text=False, teacher=self._teacher)
        losses = (1 - self._distill) * losses + self._distill * distance_to(taught, logits)
        if not self._match_states:
            return losses
        distance = distance_of_states(of_branches(asked, told), of_branches(inputs, states))
        self._add("states", distance.detach()[None])
        return losses + self._match_states * distance

    @torch.no_grad()
    def _teacher_logits(
        self, model: nn.Module, inputs: dict[str, Any], *, of_text: bool, teacher: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what a teacher says of the learned tokens of text, or of answers, under full attention.

        The part of the row that it was asked for comes with it.
        """
        is_wanted = (inputs["is_text"][0].bool() == of_text) & (inputs["block_ids"][0] >= 0)
        multiple = -(-inputs["input_ids"].shape[1] // _PARTS) if self._masks.is_flex else 1
        part = part_of(inputs, is_wanted, multiple_of=multiple)
        with as_teacher(self.accelerator.unwrap_model(model), teacher):
            return learned_logits(model, part, self._masks, full=True), part

    def _note(self, inputs: dict[str, Any], losses: Tensor) -> None:
        """Add up losses and their number by kind, on the device."""
        for kind, chosen in kinds_of(inputs).items():
            self._add(kind, losses[chosen])

    def _add(self, kind: str, losses: Tensor) -> None:
        found = torch.stack((losses.sum().double(), losses.new_tensor(losses.numel()).double()))
        self._seen[kind] = self._seen[kind] + found if kind in self._seen else found
