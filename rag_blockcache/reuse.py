"""Reuse policies: how much of a placed block is computed again.

``block`` computes nothing again, ``full`` everything; between them stand the policies that repair blocks of a
model that was never fine-tuned on them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rag_blockcache.errors import InvalidInputError


@dataclass(frozen=True)
class Policy:
    """How placed blocks are used.

    Attributes:
        name: As the user writes it.
        link: Tokens at the start of each passage that are computed again; None computes every slot.
    """

    name: str
    link: int | None

    @property
    def is_full(self) -> bool:
        """Whether nothing is reused."""
        return self.link is None

    def computed_again(self, passages: Sequence[range]) -> list[int]:
        """Return which slots of placed passages are computed again.

        The first tokens of a block, encoded alone, draw attention as the first tokens of a text do, and
        there is one such run in every block. Computing them again in place makes them ordinary tokens.

        Args:
            passages: Positions of each passage in the prompt.

        Returns:
            Ascending positions.

        Source:
            LegoLink of EPIC, https://arxiv.org/abs/2410.15332
        """
        return [position for span in passages for position in span[: self.link]]


FULL = Policy("full", None)
BLOCK = Policy("block", 0)
REPAIR = Policy("link-16", 16)  # of models that were not block-fine-tuned (docs/decisions/0007)

# From the cheapest to full attention: each step computes more again and comes closer.
LADDER = ("block", "link-4", "link-16", "link-64", "full")


def parse_policy(name: str) -> Policy | None:
    """Read a policy by name: ``full``, ``block``, ``link-<k>``, or ``auto``.

    Returns:
        The policy; None for ``auto``, see ``choose_policy``.

    Raises:
        InvalidInputError: If there is no such policy.
    """
    if name == "auto":
        return None
    for policy in (FULL, BLOCK):
        if name == policy.name:
            return policy
    linked = re.fullmatch(r"link-(\d+)", name, re.ASCII) if isinstance(name, str) else None
    if linked is None:
        raise InvalidInputError(
            f"policy {name!r} is unknown; use 'auto', 'full', 'block' or 'link-<k>' (say, 'link-16')"
        )
    return Policy(name, int(linked[1]))


def choose_policy(is_block_fine_tuned: bool) -> tuple[Policy, str]:
    """Choose for a user who said ``auto``.

    Returns:
        The policy, and the reason for it in a few words.
    """
    if is_block_fine_tuned:
        return BLOCK, "the model was block-fine-tuned"
    return REPAIR, "the model was not block-fine-tuned, so the start of each block is computed again"
