"""One request on its way through the stages: which slots of its prompt are placed, and which computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rag_blockcache.generator import Computed
from rag_blockcache.kv_states import BlockStates, Placement
from rag_blockcache.passages import Block
from rag_blockcache.prompt import Segment
from rag_blockcache.request import Request
from rag_blockcache.reuse import Policy


@dataclass
class Plan:
    """One request on its way through the stages."""

    segments: list[Segment]
    policy: Policy
    policy_reason: str
    regime: str
    is_auto: bool
    start: float
    request: Request | None = None  # none where tokens were given
    blocks: dict[int, Block] = field(default_factory=dict)  # by index of the segment
    found: frozenset[str] = frozenset()
    # Positions that are computed again because of a look at this request; see ``repair``.
    chosen: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    shares_preamble: bool = True  # with most other prompts, so that it is worth a place on disk at once
    is_replay: bool = False  # of an answer that was given: what it needs is not stored again
    num_kept: int = 0  # slots, from the first on, that the context of an earlier answer holds
    num_stored: int = 0  # tokens of blocks that were encoded for this request, and are kept
    num_continuation: int = 0  # tokens behind the prompt, at the end of the last segment
    match_seconds: float = 0.0
    load_seconds: float = 0.0
    encode_seconds: float = 0.0
    assemble_seconds: float = 0.0
    final_block_seconds: float = 0.0

    @property
    def token_ids(self) -> list[int]:
        """Tokens of the whole prompt."""
        return list(chain.from_iterable(segment.token_ids for segment in self.segments))

    @property
    def num_tokens(self) -> int:
        """Length of the prompt."""
        return sum(len(segment.token_ids) for segment in self.segments)

    def spans(self) -> Iterator[tuple[int, range]]:
        """Yield the index and the positions of each segment."""
        offset = 0
        for index, segment in enumerate(self.segments):
            yield index, range(offset, offset + len(segment.token_ids))
            offset += len(segment.token_ids)

    def placements(self, states: Mapping[str, BlockStates]) -> list[Placement]:
        """Return where each block goes; none if everything is computed."""
        if self.policy.is_full:
            return []
        found = []
        for index, span in self.spans():  # hundreds, while a GPU waits
            block = self.blocks.get(index)
            if block is not None and span.stop > self.num_kept:
                found.append(Placement(states[block.block_id].prefix(len(span)), span.start))
        return found

    def origins(self) -> NDArray[np.int64]:
        """Return where keys and values of each slot come from, ``(num_tokens,)``.

        Computed slots are 0; placed ones have a number that stands for their block.
        """
        origins = np.zeros(self.num_tokens, dtype=np.int64)
        if not self.policy.is_full:
            for index, span in self.spans():
                if index in self.blocks:
                    origins[span.start : span.stop] = hash(self.blocks[index].block_id) or 1
            origins[self.policy.computed_again(self._passage_spans())] = 0
        return origins

    def whole_blocks(self, num_slots: int) -> int:
        """Return the most slots, up to so many, that cut no placed block in two."""
        for index, span in self.spans():
            if index in self.blocks and not self.policy.is_full and span.start < num_slots < span.stop:
                return span.start
        return num_slots

    def is_filled(self) -> Tensor:
        """Return for each slot whether a block fills it, ``(num_tokens,)``."""
        can_place = not self.policy.is_full
        filled = np.array([can_place and index in self.blocks for index in range(len(self.segments))], bool)
        return torch.from_numpy(filled.repeat([len(segment.token_ids) for segment in self.segments]))

    def is_computed(self) -> Tensor:
        """Return for each slot whether the pass computes it, ``(num_tokens,)``."""
        computed = ~self.is_filled()
        if not self.policy.is_full:
            computed[self.policy.computed_again(self._passage_spans())] = True
            computed[self.chosen] = True
        computed[: self.num_kept] = False
        return computed

    def candidates(self) -> Tensor:
        """Return for each slot whether it is of a placed passage and not computed again yet."""
        candidates = torch.zeros(self.num_tokens, dtype=torch.bool)
        for span in self._passage_spans():
            candidates[span.start : span.stop] = True
        return candidates & ~self.is_computed()

    @property
    def num_passage_tokens(self) -> int:
        """Number of tokens of the passages whose blocks are placed."""
        return sum(len(span) for span in self._passage_spans())

    def _passage_spans(self) -> list[range]:
        passages = set(self._passages())
        return [span for index, span in self.spans() if index in passages]

    @property
    def question(self) -> range:
        """Positions of what is computed behind all passages: the question, and what stands around it."""
        length = self.num_tokens
        return range(length - len(self.segments[-1].token_ids), length - self.num_continuation)

    def computed(self) -> Computed:
        """Return the slots that the pass computes."""
        return self._at(self.is_computed())

    def unfilled(self) -> Computed:
        """Return the slots that no block fills, the question among them."""
        return self._at(~self.is_filled())

    def _at(self, chosen: Tensor) -> Computed:
        positions = chosen.nonzero()[:, 0]
        token_ids = self.token_ids  # a tensor of them all would take longer to make than the few are worth
        chosen_ids = [token_ids[position] for position in positions.tolist()]
        return Computed(positions, torch.tensor(chosen_ids, dtype=torch.long))

    @property
    def num_placed(self) -> int:
        """Number of slots that are placed."""
        return int((~self.is_computed()).sum())

    @property
    def num_reused(self) -> int:
        """Number of slots whose states were found in the store and are used as they are."""
        reused = ~self.is_computed()
        for index, span in self.spans():
            if index in self.blocks and self.blocks[index].block_id not in self.found:
                reused[span.start : span.stop] = False
        return int(reused.sum())

    @property
    def num_passages(self) -> int:
        """Number of passages whose blocks were looked up."""
        return len(self._passages())

    @property
    def num_hits(self) -> int:
        """Number of passages whose block was found in the store."""
        return sum(self.blocks[index].block_id in self.found for index in self._passages())

    def new_texts(self) -> list[str]:
        """Return the texts of passages whose blocks were not found."""
        missing = (index for index in self._passages() if self.blocks[index].block_id not in self.found)
        return [self.segments[index].text for index in missing]

    def _passages(self) -> list[int]:
        return [index for index in self.blocks if self.segments[index].kind == "passage"]
