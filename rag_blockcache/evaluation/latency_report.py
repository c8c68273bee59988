"""What ``latency`` measures: records of every length, and the table that documentation shows."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rag_blockcache.evaluation.bandwidth import Bandwidth
from rag_blockcache.evaluation.environment import Environment
from rag_blockcache.evaluation.stopwatch import Spread

_HEADINGS = {
    "memory": "reuse from memory",
    "without_graphs": "from memory, without CUDA graphs",
    "naive": "from memory, joined and turned whole",
    "host_memory": "from pinned host memory",
    "host_int8": "from pinned host memory, int8",
    "host_int4": "from pinned host memory, int4",
    "disk_kept": "from disk, kept on the GPU",
    "disk": "from disk, warm",
    "disk_first": "from disk, first read",
    "disk_cold": "from disk, cold",
}
_FLOORS = {
    "memory_floor_seconds": "floor of memory bandwidth",
    "bus_floor_seconds": "floor of the bus, from host memory",
}


@dataclass(frozen=True)
class ReuseLatency:
    """Reusing blocks under one policy, from one place.

    Attributes:
        policy: See ``reuse.parse_policy``.
        place: ``memory``; for a model on a GPU ``without_graphs`` and ``naive`` from the same memory, and
            ``host_memory``, ``host_int8`` and ``host_int4`` from pinned memory of the host, and
            ``disk_kept`` from a disk whose blocks were used before and stayed on the GPU; ``disk`` with
            the files in the page cache, checked before; ``disk_first``, the same read for the first time in
            a process, checksums included; ``disk_cold``, that with the files thrown out of the page cache.
        seconds: Time to first token.
        parts: Median seconds of naming, loading, assembling, and of the pass.
        times_sooner: Than full prefill, in pairs.
        times_floor: Multiple of the floor, in pairs.
        num_computed: Tokens that the last pass computes.
        flops: Of all passes through all layers, attention included.
    """

    policy: str
    place: str
    seconds: Spread
    parts: Mapping[str, float]
    times_sooner: Spread
    times_floor: Spread
    num_computed: int
    flops: int


@dataclass(frozen=True)
class LengthLatency:
    """Everything measured at one length.

    Attributes:
        num_tokens: Length of the prompt.
        num_passages: Blocks in it.
        num_final_tokens: Length of the final block.
        kv_bytes: Keys and values of the whole prompt.
        full: Full prefill, seconds.
        full_flops: Of full prefill, attention included.
        floor: The final block over an assembled context, seconds.
        reuse: One entry for each policy and place.
        text_seconds: ``BlockCache.generate`` from text to its first token, from memory, under the first
            policy; None if no text was given or the prompt would not fit.
        text_tokens: Length of that prompt; None likewise.
        logit_distance: Largest relative distance between the logits of one policy from different places,
            the floor included: above 0 only by rounding.
        memory_floor_seconds: On a GPU, the bytes that must be read and written for a first token from its
            memory, by its measured bandwidth; None elsewhere.
        bus_floor_seconds: Likewise for keys and values that must come from the host.
        cold_share: Share of the block files left in the page cache when ``disk_cold`` was timed; None if
            it was not.
    """

    num_tokens: int
    num_passages: int
    num_final_tokens: int
    kv_bytes: int
    full: Spread
    full_flops: int
    floor: Spread
    reuse: tuple[ReuseLatency, ...]
    text_seconds: Spread | None
    text_tokens: int | None
    logit_distance: float
    cold_share: float | None
    memory_floor_seconds: float | None = None
    bus_floor_seconds: float | None = None


@dataclass(frozen=True)
class LatencyReport:
    """Times to first token by length.

    Attributes:
        environment: Where this was measured.
        repeats: Rounds, after one to warm up.
        passage_tokens: Tokens in a passage, about.
        policies: In the order asked for.
        notes: What could not be measured, and why.
        lengths: One entry a length.
        bandwidth: Of the GPU, in bytes a second; None on a CPU.
    """

    environment: Environment
    repeats: int
    passage_tokens: int
    policies: tuple[str, ...]
    notes: tuple[str, ...]
    lengths: tuple[LengthLatency, ...]
    bandwidth: Bandwidth | None = None

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values, and as ``rows`` what a table and a plot of it show."""
        places = [each.place for each in self.lengths[0].reuse if each.policy == self.policies[0]]
        columns = {
            "num_tokens": "prompt tokens",
            "full_seconds": "full prefill",
            **{f"{place}_seconds": _HEADINGS[place] for place in places},
            **{f"{_key(policy)}_seconds": f"from memory, {policy}" for policy in self.policies[1:]},
            "floor_seconds": "floor",
            **(_FLOORS if self.bandwidth else {}),
            "times_sooner": "memory: times sooner",
            "times_floor": "memory: times the floor",
            **{f"{_key(policy)}_times_sooner": f"{policy}: times sooner" for policy in self.policies[1:]},
            "full_gflops": "GFLOPs, full",
            "reuse_gflops": "GFLOPs, reuse",
        }
        series = {key: heading for key, heading in columns.items() if key.endswith("_seconds")}
        return {
            **dataclasses.asdict(self.environment),
            "repeats": self.repeats,
            "passage_tokens": self.passage_tokens,
            "policies": list(self.policies),
            "notes": list(self.notes),
            "bandwidth": dataclasses.asdict(self.bandwidth) if self.bandwidth else None,
            "columns": columns,
            "rows": [self._row(length) for length in self.lengths],
            "plot": {"x": "num_tokens", "y": series, "y_label": "time to first token, seconds"},
            "lengths": [dataclasses.asdict(length) for length in self.lengths],
        }

    def _row(self, length: LengthLatency) -> dict[str, Any]:
        first = {each.place: each for each in length.reuse if each.policy == self.policies[0]}
        others = [each for each in length.reuse if each.policy != self.policies[0] and each.place == "memory"]
        return {
            "num_tokens": length.num_tokens,
            "full_seconds": length.full.median,
            **{f"{place}_seconds": each.seconds.median for place, each in first.items()},
            **{f"{_key(each.policy)}_seconds": each.seconds.median for each in others},
            "floor_seconds": length.floor.median,
            **({name: getattr(length, name) for name in _FLOORS} if self.bandwidth else {}),
            "times_sooner": first["memory"].times_sooner.median,
            "times_floor": first["memory"].times_floor.median,
            **{f"{_key(each.policy)}_times_sooner": each.times_sooner.median for each in others},
            "full_gflops": length.full_flops / 1e9,
            "reuse_gflops": first["memory"].flops / 1e9,
        }


def _key(policy: str) -> str:
    return re.sub(r"\W", "_", policy)
