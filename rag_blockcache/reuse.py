"""Reuse policies: how much of a placed block is computed again.

``block`` computes nothing again, ``full`` everything; between them stand the policies that repair blocks of a
model that was never fine-tuned on them. A policy is a name; its parts are joined by ``+``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rag_blockcache.errors import InvalidInputError


@dataclass(frozen=True)
class Policy:
    """How placed blocks are used.

    Attributes:
        name: As the user writes it.
        link: Tokens at the start of each passage that are computed again; None computes every slot.
        query: Share of passage tokens computed again because the question attends to them most.
        blend: Share of passage tokens computed again because they deviate most behind the first layer.
    """

    name: str
    link: int | None
    query: float = 0.0
    blend: float = 0.0

    @property
    def is_full(self) -> bool:
        """Whether nothing is reused."""
        return self.link is None

    @property
    def looks(self) -> bool:
        """Whether tokens are chosen for each request, after a look at it."""
        return self.query > 0 or self.blend > 0

    def computed_again(self, passages: Sequence[range]) -> list[int]:
        """Return which slots of placed passages are computed again in every prompt.

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
# Of models that were not block-fine-tuned (docs/decisions/0015), and of those that cannot be looked into.
REPAIR = Policy("link-16+query-0.08", 16, query=0.08)
PLAIN_REPAIR = Policy("link-16", 16)

# From the cheapest to full attention: each step computes more again and comes closer.
LADDER = ("block", "link-4", PLAIN_REPAIR.name, REPAIR.name, "link-64", "full")

_PART = re.compile(r"(link)-(\d+)|(query|blend)-(0?\.\d+|1(?:\.0+)?)", re.ASCII)


def parse_policy(name: str) -> Policy | None:
    """Read a policy by name: ``full``, ``block``, ``auto``, or parts with ``+`` between them.

    The parts are ``link-<k>``, ``query-<share>`` and ``blend-<share>``; see ``Policy``. A share is above 0
    and at most 1.

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
    parts: dict[str, Any] = {"link": 0}
    given: list[str] = []
    for part in name.split("+") if isinstance(name, str) else [""]:
        found = _PART.fullmatch(part)
        if found is None:
            raise _unknown(name)
        kind = found[1] or found[3]
        given.append(kind)
        parts[kind] = int(found[2]) if kind == "link" else float(found[4])
    shares = [parts[kind] for kind in given if kind != "link"]
    if len(set(given)) < len(given) or not all(0 < share <= 1 for share in shares):
        raise _unknown(name)
    return Policy(name, **parts)


def _unknown(name: Any) -> InvalidInputError:
    return InvalidInputError(
        f"policy {name!r} is unknown; use 'auto', 'full', 'block' or 'link-<k>' (say, 'link-16'), "
        "'query-<share>' or 'blend-<share>' (say, 'query-0.15'), or several of these joined by '+'"
    )


def choose_policy(is_block_fine_tuned: bool, *, can_be_observed: bool = True) -> tuple[Policy, str]:
    """Choose for a user who said ``auto``.

    Args:
        is_block_fine_tuned: Whether the model says so of itself.
        can_be_observed: Whether its attention can be looked at, see ``Model``.

    Returns:
        The policy, and the reason for it in a few words.
    """
    if is_block_fine_tuned:
        return BLOCK, "the model was block-fine-tuned"
    if can_be_observed:
        reason = "the start of each block, and what the question attends to, is computed again"
        return REPAIR, f"the model was not block-fine-tuned, so {reason}"
    return PLAIN_REPAIR, "the model was not block-fine-tuned, so the start of each block is computed again"
