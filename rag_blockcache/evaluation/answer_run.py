"""Runs every arm over every question, in batches, and keeps what each one did."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from rag_blockcache.answers import Answer
from rag_blockcache.evaluation.answer_metrics import contains_answer, exact_match, f1
from rag_blockcache.evaluation.arms import FULL_ARM, Arm
from rag_blockcache.evaluation.engines import Engines
from rag_blockcache.evaluation.predictions import Prediction, PredictionLog
from rag_blockcache.evaluation.qa_examples import QaExample
from rag_blockcache.evaluation.stopwatch import Clock
from rag_blockcache.evaluation.teacher_forcing import Agreement, Comparison, Reference, TeacherForcing
from rag_blockcache.generation_options import setting
from rag_blockcache.model import Model
from rag_blockcache.passages import Passage

# The likeliest token each time, whatever the model's generation configuration says.
_GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class _Judged:
    """Full attention's answers to a batch, and its distributions along them."""

    reference: Reference
    token_ids: Sequence[Sequence[int]]


class AnswerRun:
    """Measures arms on batches of questions.

    In a batch, full attention answers first. Then every arm answers each question twice in one go: once on
    its own, for accuracy, and once along full attention's answer, for fidelity.

    Args:
        engines: The model, and blocks as the arms need them.
        arms: What is compared; full attention must be among them.
        log: Keeps predictions; what it holds already is not made again.
        max_new_tokens: Longest answer.
        timed: Keys of examples that are asked alone as well, to time the first token.
        scores_gold: Whether gold answers are scored too, which takes a pass of its own.
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
        self._end = end_token(engines.plain.model)
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
        judged, answers = self._full(examples)
        seconds = self._time(arms, examples)
        found = []
        for arm in arms:
            agreements = _own_agreements(judged)
            if arm != FULL_ARM:
                answers, agreements = self._answer(arm, examples, judged)
            for example, answer, agreement in zip(examples, answers, agreements, strict=True):
                timed = seconds.get((arm.name, example.key))
                found.append(self._prediction(arm, example, answer, agreement, timed))
        return found

    def _full(self, examples: Sequence[QaExample]) -> tuple[_Judged, list[Answer]]:
        """Let full attention answer, or go along an answer of its own that is on record."""
        known = [self._log.get(example.key, FULL_ARM.name) for example in examples]
        forced = {row: each.token_ids for row, each in enumerate(known) if each is not None}
        reference = Reference()
        answers = self._decode(FULL_ARM, examples, TeacherForcing(forced, self._end, reference.observe))
        token_ids = [forced.get(row, answer.token_ids) for row, answer in enumerate(answers)]
        return _Judged(reference, token_ids), answers

    def _answer(
        self, arm: Arm, examples: Sequence[QaExample], judged: _Judged
    ) -> tuple[list[Answer], list[Agreement]]:
        """Let an arm answer on its own, and beside that along full attention's answer."""
        comparison = Comparison(judged.reference, judged.token_ids, first_row=len(examples))
        forced = dict(enumerate(judged.token_ids, start=len(examples)))
        processor = TeacherForcing(forced, self._end, comparison.observe)
        answers = self._decode(arm, [*examples, *examples], processor)
        return answers[: len(examples)], comparison.agreements()

    def _decode(self, arm: Arm, examples: Sequence[QaExample], processor: TeacherForcing) -> list[Answer]:
        return self._engines.of(arm).generate_batch(
            [(example.question, _shown(arm, example)) for example in examples],
            policy=arm.policy,
            max_new_tokens=self._max_new_tokens,
            logits_processor=[processor],
            **_GREEDY,
        )

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
                        **_GREEDY,
                    )
                    seconds[arm.name, example.key] = clock() - start
                self._is_warm.add(arm.name)
        return seconds

    def _prediction(
        self, arm: Arm, example: QaExample, answer: Answer, agreement: Agreement, seconds: float | None
    ) -> Prediction:
        gold = example.answers
        num_gold_tokens, gold_log_likelihood = self._score(arm, example)
        num_passage_tokens, num_recomputed = self._recomputed(arm, example, answer)
        return Prediction(
            key=example.key,
            example_id=example.example_id,
            dataset=example.dataset,
            variant=example.variant,
            arm=arm.name,
            question=example.question,
            gold=gold,
            answer=answer.text,
            token_ids=tuple(answer.token_ids),
            is_correct=contains_answer(answer.text, gold) if gold else None,
            is_exact=exact_match(answer.text, gold) if gold else None,
            f1=f1(answer.text, gold) if gold else None,
            num_passages=len(example.passages),
            gold_position=example.gold_position,
            num_prompt_tokens=answer.num_reused_tokens + answer.num_computed_tokens,
            num_passage_tokens=num_passage_tokens,
            num_recomputed_tokens=num_recomputed,
            num_answer_tokens=agreement.num_tokens,
            divergence=agreement.divergence,
            num_same_tokens=agreement.num_same,
            answer_log_likelihood=agreement.log_likelihood,
            first_divergence=agreement.first_divergence,
            first_is_same=agreement.first_is_same,
            num_gold_tokens=num_gold_tokens,
            gold_log_likelihood=gold_log_likelihood,
            ttft_seconds=seconds,
        )

    def _recomputed(self, arm: Arm, example: QaExample, answer: Answer) -> tuple[int, int]:
        """Return how many tokens the passages have, and how many of them the prefill pass computed."""
        cache = self._engines.of(arm)
        segments = cache.segments(example.question, _shown(arm, example))
        num_passage_tokens = sum(len(cache.block(each).token_ids) for each in _shown(arm, example))
        num_placeable = num_passage_tokens + len(segments[0])  # the preamble is placed too
        return num_passage_tokens, min(num_passage_tokens, num_placeable - answer.num_reused_tokens)

    def _score(self, arm: Arm, example: QaExample) -> tuple[int | None, float | None]:
        """Return the length and the log-likelihood of the first gold answer, if that is wanted."""
        if not self._scores_gold or not example.answers:
            return None, None
        scores = self._engines.of(arm).score(
            example.question, _shown(arm, example), example.answers[0], policy=arm.policy
        )
        return len(scores), float(scores.double().sum())


def end_token(model: Model) -> int:
    """Return a token that ends an answer; any token, for a model that has none."""
    given = setting(model, {}, "eos_token_id")
    tokens = given if isinstance(given, list | tuple) else [given]
    return next((int(token) for token in tokens if token is not None), 0)


def _own_agreements(judged: _Judged) -> list[Agreement]:
    """Compare full attention with itself: what it gives its own answers."""
    comparison = Comparison(judged.reference, judged.token_ids)
    for step, log_probabilities in enumerate(judged.reference.steps):
        comparison.observe(step, log_probabilities)
    return comparison.agreements()


def _shown(arm: Arm, example: QaExample) -> tuple[Passage, ...]:
    return example.passages if arm.shows_passages else ()
