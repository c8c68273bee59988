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

# Short, of different kinds, and about nothing that anybody asks for (docs/decisions/0019). Changing a word of
# them gives every block another name.
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


def choose_sight(asked: str | None, *, is_block_fine_tuned: bool) -> BlocksSee:
    """Choose what blocks see.

    Args:
        asked: One of ``BlocksSee``; None leaves the choice to the model.
        is_block_fine_tuned: Whether the model was trained on blocks that see themselves alone.

    Raises:
        InvalidInputError: If nothing is called that.
    """
    if asked is None:
        return "themselves" if is_block_fine_tuned else "stand-ins"
    for known in get_args(BlocksSee):
        if asked == known:
            return known  # type: ignore[no-any-return]
    raise InvalidInputError(
        f"blocks_see is {asked!r}; use one of {', '.join(map(repr, get_args(BlocksSee)))}"
    )
