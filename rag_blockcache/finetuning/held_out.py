"""Measurements while training: loss and exactness on examples that are not trained on, in both modes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, TrainerCallback

from rag_blockcache.finetuning.mask import Masks
from rag_blockcache.finetuning.packing import Row, collate
from rag_blockcache.finetuning.trainer import KINDS, BlockTrainer, kinds_of, learned_logits, learned_places

Evaluate = Callable[[PreTrainedModel, int], Mapping[str, float]]


@torch.no_grad()
def measure(
    network: nn.Module, rows: Sequence[Row], masks: Masks, device: torch.device, padded_to: int | None
) -> dict[str, float]:
    """Measure a model on rows, by the kind of their samples.

    Returns:
        ``eval_loss_block`` and ``eval_loss_full``, the mean loss of an answer token; ``eval_exact_block`` and
        ``eval_exact_full``, the share of answers that greedy decoding would give to the token: each token is
        the likeliest behind the true ones before it; ``eval_loss_text``, the mean loss of a token of general
        text. What there are no samples for is left out.
    """
    losses: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    exact: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    for row in rows:
        batch = {name: values.to(device) for name, values in collate([row], padded_to=padded_to).items()}
        logits, places = learned_logits(network, batch, masks), learned_places(batch)
        targets, owners = (batch[name][0, 1:][places] for name in ("labels", "sample_ids"))
        token_losses = functional.cross_entropy(logits, targets, reduction="none")
        is_right = logits.argmax(-1) == targets
        for kind, chosen in kinds_of(batch).items():
            losses[kind].append(token_losses[chosen])
            for owner in torch.unique(owners[chosen]):
                exact[kind].append(is_right[owners == owner].all()[None])
    measured = {}
    for kind in KINDS:
        if exact[kind]:
            measured[f"eval_loss_{kind}"] = torch.cat(losses[kind]).mean().item()
            if kind != "text":
                measured[f"eval_exact_{kind}"] = torch.cat(exact[kind]).float().mean().item()
    return measured


class Evaluations(TrainerCallback):
    """Measures before the first step, every so many steps, and after the last one.

    Args:
        every: Steps between measurements.
        measure: Called with the model as the Trainer wrapped it.
        evaluate: Of the user's own; called with the model of transformers and the step. Both return numbers
            by name, which join the history.
    """

    trainer: BlockTrainer  # is made after its callbacks

    def __init__(
        self, every: int, measure: Callable[[nn.Module], Mapping[str, float]], evaluate: Callable[[int], Any]
    ) -> None:
        self._every, self._measure, self._evaluate = every, measure, evaluate

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure the model that training begins with."""
        if state.global_step == 0:
            self._run(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure if it is time to."""
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            is_loss_due = control.should_log
            self._run(state.global_step)
            control.should_log = is_loss_due  # logging what was measured has unset it

    def _run(self, step: int) -> None:
        network = self.trainer.model_wrapped
        was_training = network.training
        network.eval()
        found = {**self._measure(network), **self._evaluate(step)}
        network.train(was_training)
        if found:
            self.trainer.log(dict(found))
