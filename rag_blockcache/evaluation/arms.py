"""What is compared: a reuse policy, with how blocks are encoded and whether passages are shown at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rag_blockcache.errors import InvalidInputError
from rag_blockcache.reuse import parse_policy

if TYPE_CHECKING:
    from rag_blockcache.block_cache import BlockCache


@dataclass(frozen=True)
class Arm:
    """One way to answer.

    Attributes:
        name: As the report shows it.
        policy: Reuse policy; see ``reuse.parse_policy``.
        shows_passages: Whether the model reads the passages.
        moves_keys: Whether keys are moved to their positions; otherwise they stay at those where their block
            was encoded, which shows what position re-encoding is worth.
        options: Further arguments of ``BlockCache``, such as ``blocks_see``.
    """

    name: str
    policy: str
    shows_passages: bool = True
    moves_keys: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def engine(self) -> str:
        """Names the engine that it needs; arms with the same one share its blocks."""
        return json.dumps([self.moves_keys, sorted(self.options.items())])


FULL_ARM = Arm("full", "full")  # the reference of all others
NO_PASSAGES = Arm("no-passages", "full", shows_passages=False)  # the zero of fidelity

_WAYS: dict[str, Mapping[str, Any]] = {  # with what options blocks are made
    "conditioned": {"blocks_see": "preamble"},
    "stand-ins": {"blocks_see": "stand-ins"},
    "unmoved": {},
    "int8": {"codec": "int8"},
    "int4": {"codec": "int4"},
}


def parse_arm(name: str) -> Arm:
    """Read an arm by name: a policy, with ways to make blocks behind it, or ``no-passages``.

    Blocks see themselves alone, as in the paper, if no way says otherwise; those of ``auto`` see what a
    ``BlockCache`` lets them see by default.

    Raises:
        InvalidInputError: If there is no such policy, or no such way.
    """
    if name == NO_PASSAGES.name:
        return NO_PASSAGES
    policy, *ways = name.split("/")
    parse_policy(policy)
    if not set(ways) <= set(_WAYS):
        raise InvalidInputError(
            f"{name!r} is unknown; behind a policy stand /{' and /'.join(_WAYS)}, and "
            f"{NO_PASSAGES.name!r} shows no passages"
        )
    options: dict[str, Any] = {} if policy != "auto" else {"blocks_see": None}
    for way in ways:
        options |= _WAYS[way]
    return Arm(name, policy, moves_keys="unmoved" not in ways, options=options)


def way_of(cache: BlockCache) -> str:
    """Return how the blocks of a cache are made, as it stands behind the name of a policy."""
    seen = {"themselves": "", "preamble": "/conditioned", "stand-ins": "/stand-ins"}[cache.blocks_see]
    return seen + (f"/{cache.codec}" if cache.codec != "none" else "")


def parse_arms(names: str) -> list[Arm]:
    """Read names with commas between them; full attention and no passages, the two ends, always belong."""
    given = [parse_arm(name.strip()) for name in names.split(",") if name.strip()]
    arms = {arm.name: arm for arm in (FULL_ARM, NO_PASSAGES, *given)}
    return list(arms.values())
