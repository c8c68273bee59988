"""What a block sees beside itself while it is encoded: nothing, the preamble, or stand-ins.

The paper's blocks see themselves alone, and a model that was fine-tuned on them does not mind. Any other has
met the first words of a passage alone only where a text began, and encodes them as such. Behind stand-ins,
short texts in the place of other passages, a block is encoded as what it will be: one passage among several.
They are the same for every prompt, so the block serves them all; and they are placed in none, so that reuse
costs what it did.
"""

from __future__ import annotations

from typing import Literal, get_args

from rag_blockcache.errors import InvalidInputError
from rag_blockcache.passages import Passage

BlocksSee = Literal["themselves", "preamble", "stand-ins"]

# Short, of different kinds, and about nothing that anybody asks for (docs/decisions/0019). With a word
# changed, an index made before is refused.
STAND_INS = (
    Passage(
        title="Mill Lane",
        text="Mill Lane is a street in the old part of the town. It runs from the market square to the "
        "river, where a watermill stood until 1912.",
    ),
    Passage(
        title="Clara Benn",
        text="Clara Benn (born 4 May 1931) is a painter and teacher. She studied in the north of the country "
        "and later taught drawing for twenty years.",
    ),
)


def sight_named(asked: str | None) -> BlocksSee | None:
    """Check what a user wants blocks to see; None leaves it to ``default_sight``.

    Raises:
        InvalidInputError: If nothing is called that.
    """
    known: dict[str, BlocksSee] = {each: each for each in get_args(BlocksSee)}
    if asked is not None and asked not in known:
        raise InvalidInputError(f"blocks_see is {asked!r}; use one of {', '.join(map(repr, known))}")
    return None if asked is None else known[asked]


def default_sight(trained: str | None) -> BlocksSee:
    """Choose for a user who says nothing: a model that was trained on blocks gets those.

    Args:
        trained: What blocks saw then; None if the model never met any.
    """
    return sight_named(trained) or "stand-ins"


def kind_of(blocks_see: BlocksSee) -> list[str]:
    """Return what an index must have on record of what its blocks see, so that others are refused.

    Returns:
        Nothing for the paper's blocks; the words of stand-ins, where those are seen.
    """
    if blocks_see == "themselves":
        return []
    words = [word for each in STAND_INS for word in (each.title, each.text)]
    return [blocks_see, *(words if blocks_see == "stand-ins" else ())]
