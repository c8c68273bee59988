"""Runs every arm over every question, in batches, and keeps what each one did."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from rag_blockcache.evaluation.agreement import Agreement, compare, log_likelihood
from rag_blockcache.evaluation.answer_metrics import contains_answer, exact_match, f1
from rag_blockcache.evaluation.arms import FULL_ARM, Arm
from rag_blockcache.evaluation.engines import Engines
from rag_blockcache.evaluation.predictions import Prediction, PredictionLog
from rag_blockcache.evaluation.prefilled import GREEDY, Prefilled, decode_together, prefill_prompts
from rag_blockcache.evaluation.qa_examples import QaExample
from rag_blockcache.evaluation.stopwatch import Clock
from rag_blockcache.passages import Passage
from rag_blockcache.plan import Plan
from rag_blockcache.request import Question
from rag_blockcache.text_stream import whole_text

_CPU_BYTES = 2**30  # of contexts that are decoded together; a few arms of eight questions on a small model
_GPU_SHARE = 0.15  # of the memory that is free; joined, they are there twice


class AnswerRun:
    """Measures arms on batches of questions.

    Every arm prefills a batch of questions once. From there it goes two ways: it answers on its own, for
    accuracy, and is led along full attention's answer, for fidelity.

    Args:
        engines: The model, and blocks as the arms need them.
        arms: What is compared; full attention must be among them.
        log: Keeps predictions; what it holds already is not made again.
        max_new_tokens: Longest answer.
        timed: Keys of examples that are asked alone as well, to time the first token.
        scores_gold: Whether gold answers are scored too.
    """

    def __init__(
        self,
        engines: Engines,
        arms: Sequence[Arm],
        log: PredictionLog,
        *,
        max_new_tokens: int,
        timed: Collection[str] = (),
        scores_gold: bool = False,
    ) -> None:
        assert FULL_ARM in arms, "full attention is what every arm is compared with"
        self._engines, self._arms, self._log = engines, list(arms), log
        self._max_new_tokens, self._timed, self._scores_gold = max_new_tokens, set(timed), scores_gold
        self._model = engines.plain.model
        self._decoded_bytes = _decoded_bytes(self._model.device)
        self._is_warm: set[str] = set()

    def missing(self, example: QaExample) -> list[Arm]:
        """Return the arms that have not answered a question."""
        return [arm for arm in self._arms if self._log.get(example.key, arm.name) is None]

    def measure(self, examples: Sequence[QaExample]) -> None:
        """Let every arm answer a batch of questions, and keep what is new."""
        arms = [arm for arm in self._arms if any(arm in self.missing(example) for example in examples)]
        passages = list(dict.fromkeys(passage for each in examples for passage in each.passages))
        caches = {arm.engine: self._engines.of(arm) for arm in arms if arm.policy != "full"}
        for cache in caches.values():
            cache.prefill(passages)
        try:
            found = self._measure(arms, examples)
        finally:
            for cache in caches.values():
                cache.forget(passages)
        self._log.add(each for each in found if self._log.get(each.key, each.arm) is None)

    def _measure(self, arms: Sequence[Arm], examples: Sequence[QaExample]) -> list[Prediction]:
        seconds = self._time(arms, examples)
        reference: _Reference | None = None
        found: list[Prediction] = []
        for group in self._groups(arms, examples):
            asked = [_Asked(arm, self._prefill(arm, examples)) for arm in group]
            answers = self._answers([each for each in asked if each.arm in arms])
            if reference is None:  # full attention comes first
                reference = self._reference(asked[0], answers.get(FULL_ARM.name), examples)
            for each in asked:
                if each.arm in arms:
                    agreements = self._agreements(each, reference)
                    golden = self._gold_scores(each, examples)
                    rows = zip(examples, each.plans, answers[each.arm.name], agreements, golden, strict=True)
                    found += [self._prediction(each.arm, *row, seconds) for row in rows]
        return found

    def _groups(self, arms: Sequence[Arm], examples: Sequence[QaExample]) -> Iterator[list[Arm]]:
        """Cut arms, full attention in front, into groups whose contexts fit into memory together."""
        plain = self._engines.plain
        lengths = [sum(map(len, plain.segments(each.question, each.passages))) for each in examples]
        num_bytes = (sum(lengths) + len(examples) * self._max_new_tokens) * self._model.kv_bytes_per_token
        size = max(1, self._decoded_bytes // num_bytes)
        ordered = [FULL_ARM, *(arm for arm in arms if arm != FULL_ARM)]
        yield from (ordered[start : start + size] for start in range(0, len(ordered), size))

    def _prefill(self, arm: Arm, examples: Sequence[QaExample]) -> list[Prefilled]:
        questions = [Question(each.question, _shown(arm, each)) for each in examples]
        return prefill_prompts(self._engines.of(arm), questions, arm.policy, room=self._max_new_tokens)

    def _answers(self, asked: Sequence[_Asked]) -> dict[str, list[list[int]]]:
        """Let arms answer on their own; returns token ids by name of the arm."""
        if not asked:
            return {}
        written = iter(
            decode_together([some for each in asked for some in each.prefilled], self._max_new_tokens)
        )
        return {each.arm.name: list(islice(written, len(each.plans))) for each in asked}

    def _reference(
        self, asked: _Asked, fresh: Sequence[Sequence[int]] | None, examples: Sequence[QaExample]
    ) -> _Reference:
        """Take full attention's answers, those on record before fresh ones, and what it finds along them."""
        known = [self._log.get(example.key, FULL_ARM.name) for example in examples]
        written = [()] * len(examples) if fresh is None else fresh
        answers = [one.token_ids if one else new for one, new in zip(known, written, strict=True)]
        return _Reference(answers, asked.along(answers))

    def _agreements(self, asked: _Asked, reference: _Reference) -> list[Agreement]:
        is_full = asked.arm == FULL_ARM
        own = reference.distributions if is_full else asked.along(reference.answers)
        return list(map(compare, reference.distributions, own, reference.answers))

    def _time(self, arms: Sequence[Arm], examples: Sequence[QaExample]) -> dict[tuple[str, str], float]:
        """Time the first token of chosen questions, asked alone; the arms take turns."""
        clock, seconds = Clock(self._engines.plain.model.device), {}
        for example in (each for each in examples if each.key in self._timed):
            for arm in arms:
                for _ in range(1 if arm.name in self._is_warm else 2):
                    start = clock()
                    self._engines.of(arm).generate(
                        example.question,
                        _shown(arm, example),
                        policy=arm.policy,
                        max_new_tokens=1,
                        **GREEDY,
                    )
                    seconds[arm.name, example.key] = clock() - start
                self._is_warm.add(arm.name)
        return seconds

    def _gold_scores(
        self, asked: _Asked, examples: Sequence[QaExample]
    ) -> list[tuple[int | None, float | None]]:
        """Return length and log-likelihood of first gold answers, where that is wanted and there is one."""
        golden = [example.answers[0] if self._scores_gold and example.answers else "" for example in examples]
        tokens = [self._engines.plain.prompt.text_tokens(text) for text in golden]
        if not any(tokens):
            return [(None, None)] * len(examples)
        distributions = asked.along([each or (0,) for each in tokens])
        return [
            (len(each), log_likelihood(found, each)) if each else (None, None)
            for each, found in zip(tokens, distributions, strict=True)
        ]

    def _prediction(
        self,
        arm: Arm,
        example: QaExample,
        plan: Plan,
        token_ids: Sequence[int],
        agreement: Agreement,
        golden: tuple[int | None, float | None],
        seconds: Mapping[tuple[str, str], float],
    ) -> Prediction:
        gold, answer = example.answers, whole_text(self._model, token_ids)
        num_passage_tokens, num_recomputed = _recomputed(plan)
        return Prediction(
            key=example.key,
            example_id=example.example_id,
            dataset=example.dataset,
            variant=example.variant,
            arm=arm.name,
            question=example.question,
            gold=gold,
            answer=answer,
            token_ids=tuple(token_ids),
            is_correct=contains_answer(answer, gold) if gold else None,
            is_exact=exact_match(answer, gold) if gold else None,
            f1=f1(answer, gold) if gold else None,
            num_passages=len(example.passages),
            gold_position=example.gold_position,
            num_prompt_tokens=plan.num_tokens,
            num_passage_tokens=num_passage_tokens,
            num_recomputed_tokens=num_recomputed,
            num_answer_tokens=agreement.num_tokens,
            divergence=agreement.divergence,
            num_same_tokens=agreement.num_same,
            answer_log_likelihood=agreement.log_likelihood,
            first_divergence=agreement.first_divergence,
            first_is_same=agreement.first_is_same,
            num_gold_tokens=golden[0],
            gold_log_likelihood=golden[1],
            ttft_seconds=seconds.get((arm.name, example.key)),
        )


@dataclass(frozen=True)
class _Reference:
    """Full attention's answers, and what it finds at each of their tokens; see ``Prefilled.along``."""

    answers: Sequence[Sequence[int]]
    distributions: Sequence[Tensor]


@dataclass(frozen=True)
class _Asked:
    """A batch of questions as one arm was asked them."""

    arm: Arm
    prefilled: Sequence[Prefilled]

    @property
    def plans(self) -> list[Plan]:
        """One a question."""
        return [plan for each in self.prefilled for plan in each.plans]

    def along(self, answers: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return log-probabilities along an answer to each question; see ``Prefilled.along``."""
        rest = iter(answers)
        return [one for some in self.prefilled for one in some.along(list(islice(rest, len(some.plans))))]


def _decoded_bytes(device: torch.device) -> int:
    """Return how much memory may go to contexts that are decoded together."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _GPU_SHARE)
    return _CPU_BYTES


def _recomputed(plan: Plan) -> tuple[int, int]:
    """Return how many tokens the passages have, and how many of them the prefill pass computed."""
    passages = [segment for segment in plan.segments if segment.kind == "passage"]
    num_passage_tokens = sum(len(segment.token_ids) for segment in passages)
    num_placeable = num_passage_tokens + len(plan.segments[0].token_ids)  # the preamble is placed too
    return num_passage_tokens, min(num_passage_tokens, num_placeable - plan.num_reused)


def _shown(arm: Arm, example: QaExample) -> tuple[Passage, ...]:
    return example.passages if arm.shows_passages else ()
