"""Time to first token by length of the prompt: full prefill, reuse from memory and disk, and the floor."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import torch

from rag_blockcache.block_cache import BlockCache
from rag_blockcache.errors import ContextTooLongError, InvalidInputError
from rag_blockcache.evaluation.bandwidth import Bandwidth
from rag_blockcache.evaluation.environment import Environment
from rag_blockcache.evaluation.flops import forward_flops
from rag_blockcache.evaluation.latency_report import LatencyReport, LengthLatency, ReuseLatency
from rag_blockcache.evaluation.places import OTHERWISE, PACKED, Places, scratch_folder
from rag_blockcache.evaluation.requests import FirstToken, Floor, full_first_token
from rag_blockcache.evaluation.stopwatch import Spread, in_turn, ratios
from rag_blockcache.evaluation.text_request import TextRequest
from rag_blockcache.evaluation.token_prompts import TokenPrompt, cut_prompt, token_run
from rag_blockcache.gpu import has_kernels
from rag_blockcache.model import Model
from rag_blockcache.reuse import BLOCK, REPAIR, Policy, parse_policy

logger = logging.getLogger(__name__)

_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4}  # relative, between places; 0.02 for half precision
_ROUNDING = 10  # times that, where other kernels round in other places
_PARTS = ("name_seconds", "load_seconds", "assemble_seconds", "compute_seconds")

Times = Mapping[str, Sequence[FirstToken]]


def measure_latency(
    model: Model,
    *,
    lengths: Sequence[int] = (512, 1024, 2048, 4096, 8000),
    final_tokens: int = 50,
    passage_tokens: int = 100,
    repeats: int = 5,
    policies: Sequence[str] = (BLOCK.name, REPAIR.name),
    text: str | None = None,
    name: str | None = None,
    directory: Path | str | None = None,
    progress: Callable[[str], None] | None = None,
) -> LatencyReport:
    """Time the first token of the same token ids, prefilled in full and from reused blocks.

    All ways take turns, round by round, so that whatever else the machine does falls on each alike.

    Args:
        model: The model.
        lengths: Tokens of the prompts.
        final_tokens: Tokens after the passages.
        passage_tokens: Tokens of a passage, about.
        repeats: Rounds at each length, after one to warm up.
        policies: Under which blocks are reused; the first one, as a rule the paper's ``block``, is what the
            table compares.
        text: Passages are cut from it; None takes random tokens.
        name: Of the model, for the report; None takes that in its configuration.
        directory: Blocks are stored in it while this runs; None takes a place for temporary files.
        progress: Called with a line at each round.

    Raises:
        InvalidInputError: If a length does not fit the model or cannot hold a passage, ``repeats`` is below
            1, a policy reuses nothing, or the text is too short.
    """
    if repeats < 1 or not lengths or not policies:
        raise InvalidInputError("repeats must be at least 1, and lengths and policies name one each at least")
    if max(lengths) > model.max_length:
        raise ContextTooLongError(
            f"a prompt of {max(lengths)} tokens exceeds the context window of the model, "
            f"{model.max_length}; take shorter lengths"
        )
    run = token_run(model, max(lengths), text)
    prompts = [cut_prompt(run, n, final_tokens=final_tokens, passage_tokens=passage_tokens) for n in lengths]
    bench = _Bench(model, _reusing(policies), repeats, directory, progress or logger.info)
    found = [bench.measure(prompt, in_text=text is not None) for prompt in prompts]
    return LatencyReport(
        environment=Environment.of(model, name),
        repeats=repeats,
        passage_tokens=passage_tokens,
        policies=tuple(policies),
        notes=tuple(dict.fromkeys(bench.notes)),
        lengths=tuple(found),
        bandwidth=bench.bandwidth,
    )


def _reusing(names: Sequence[str]) -> list[Policy]:
    policies = [policy for policy in map(parse_policy, names) if policy is not None and not policy.is_full]
    if len(policies) < len(names):
        raise InvalidInputError(
            "full prefill is measured in any case, and 'auto' stands for another policy; name policies that "
            "reuse blocks, such as 'block' or 'link-16'"
        )
    return policies


class _Bench:
    """Measures one length after the other with the same model."""

    def __init__(
        self,
        model: Model,
        policies: Sequence[Policy],
        repeats: int,
        directory: Path | str | None,
        tell: Callable[[str], None],
    ) -> None:
        self._model, self._policies, self._repeats = model, policies, repeats
        self._directory, self._tell = directory, tell
        self.notes: list[str] = []
        if model.cuda_graphs:
            runs = (
                "run"
                if model.device.type == "cuda" and has_kernels()
                else "do not run here, though asked for"
            )
            self.notes.append(f"CUDA graphs and kernels of our own {runs}, except where a column says so")
        self.bandwidth = Bandwidth.of(model.device) if model.device.type == "cuda" else None

    def measure(self, prompt: TokenPrompt, *, in_text: bool) -> LengthLatency:
        """Encode the blocks of a prompt, and let all ways to its first token take turns."""
        label, bandwidth = f"{prompt.num_tokens:,} tokens", self.bandwidth
        self._tell(f"{label}: encoding {len(prompt.passages)} passages")
        with ExitStack() as stack:
            folder = Path(stack.enter_context(scratch_folder(self._directory)))
            places = stack.enter_context(closing(Places(self._model, prompt, self._policies[0], folder)))
            runs = self._runs(prompt, places)
            text = self._text_request(prompt, stack) if in_text else None
            if text is not None:
                runs["text"] = text.first_token
            _, times = in_turn(
                runs,
                self._repeats,
                lambda n: self._tell(f"{label}: " + (f"round {n} of {self._repeats}" if n else "warming up")),
            )
        # A pass becomes a graph when it comes again, so that of the warm-up may have run another way.
        last = {way: found[-1] for way, found in times.items()}
        distance = _distance_between_places(last, self._policies, OTHERWISE + PACKED)
        assert distance <= _TOLERANCE.get(self._model.dtype, 0.02), f"ways differ in their logits: {distance}"
        otherwise = _distance_between_places(last, self._policies, PACKED)
        assert otherwise <= _ROUNDING * _TOLERANCE.get(self._model.dtype, 0.02), (
            f"kernels differ: {otherwise}"
        )
        kv_bytes = prompt.num_tokens * self._model.kv_bytes_per_token
        return LengthLatency(
            num_tokens=prompt.num_tokens,
            num_passages=len(prompt.passages),
            num_final_tokens=len(prompt.final_block),
            kv_bytes=kv_bytes,
            full=Spread.of(_seconds(times["full"])),
            full_flops=forward_flops(self._model, range(prompt.num_tokens)).total,
            floor=Spread.of(_seconds(times["floor"])),
            reuse=tuple(self._reuse(name, times) for name in times if "/" in name),
            text_seconds=Spread.of(_seconds(times["text"])) if text else None,
            text_tokens=text.num_tokens if text else None,
            logit_distance=distance,
            cold_share=places.cold_share,
            memory_floor_seconds=bandwidth.memory_floor_seconds(self._model, kv_bytes) if bandwidth else None,
            bus_floor_seconds=bandwidth.bus_floor_seconds(kv_bytes) if bandwidth else None,
        )

    def _runs(self, prompt: TokenPrompt, places: Places) -> dict[str, Callable[[], FirstToken]]:
        """Return all ways to the first token; those that reuse are called ``policy/place``."""
        if not places.can_be_cold:
            self.notes.append(
                "disk_cold was not measured: the block files stay in the page cache (a RAM disk, or a system "
                "without posix_fadvise and mincore)"
            )
        runs: dict[str, Callable[[], FirstToken]] = {"full": lambda: full_first_token(self._model, prompt)}
        for policy in self._policies:
            for place, read in places.readers().items():
                if place == "naive" and policy.name != BLOCK.name:
                    continue
                runs[f"{policy.name}/{place}"] = lambda read=read, policy=policy: read(policy)  # type: ignore[misc]
        runs["floor"] = Floor(places.memory, prompt, BLOCK).first_token
        return runs

    def _text_request(self, prompt: TokenPrompt, stack: ExitStack) -> TextRequest | None:
        cache = BlockCache(
            self._model.network,
            None,
            tokenizer=self._model.tokenizer,
            memory_budget_bytes=None,
            context_budget_bytes=0,  # the same request is asked again and again
        )
        request = TextRequest.fitting(stack.enter_context(cache), prompt, self._policies[0])
        if request is None:
            self.notes.append(f"no prompt of text fits {prompt.num_tokens} tokens beside its template")
        return request

    def _reuse(self, name: str, times: Times) -> ReuseLatency:
        policy_name, _, place = name.partition("/")
        passes, seconds = times[name][0].passes, _seconds(times[name])
        return ReuseLatency(
            policy=policy_name,
            place=place,
            seconds=Spread.of(seconds),
            parts={part: Spread.of(getattr(each, part) for each in times[name]).median for part in _PARTS},
            times_sooner=ratios(_seconds(times["full"]), seconds),
            times_floor=ratios(seconds, _seconds(times["floor"])),
            num_computed=len(passes[-1]),
            flops=sum(forward_flops(self._model, positions).total for positions in passes),
        )


def _seconds(times: Sequence[FirstToken]) -> list[float]:
    return [each.seconds for each in times]


def _distance_between_places(
    runs: Mapping[str, FirstToken], policies: Sequence[Policy], but: Sequence[str]
) -> float:
    """Return the largest relative distance between logits that should agree.

    What is timed must be the work that is claimed: under one policy, every place ``but`` some gives the same
    logits, and the floor gives those of ``block``.
    """
    largest = 0.0
    for policy in policies:
        names = [name for name in runs if name.startswith(f"{policy.name}/")]
        same = [runs[name] for name in names if name.partition("/")[2] not in but]
        same += [runs["floor"]] if policy.name == "block" else []
        first, *others = (run.logits.float() for run in same if run.logits is not None)
        for other in others:
            largest = max(largest, float((other - first).norm() / first.norm()))
    return largest
