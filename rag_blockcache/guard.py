"""The guard: compares some answers with full attention, and gives up policies that stray too far."""

from __future__ import annotations

import dataclasses
import logging
import math
import random
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rag_blockcache.auto_policy import AutoPolicy
from rag_blockcache.errors import InvalidInputError, StoreError
from rag_blockcache.guard_comparison import Comparison, Serve, ServedAnswer
from rag_blockcache.guard_rule import weighed
from rag_blockcache.model import Model
from rag_blockcache.plan import Plan
from rag_blockcache.policy_record import PolicyRecord, WatchedPolicy

THRESHOLD = 0.1  # nats a token: on average at most 22 % of the probability moves (Pinsker)

_MAX_TOKENS = 64  # of an answer; bounds the logits in memory
_MAX_WAITING = 8

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GuardStatus:
    """What the guard does, and what it has found.

    Attributes:
        rate: Share of answers that are compared; 0 if the guard is off.
        threshold: Most divergence from full attention that is allowed, in nats a token.
        policy: What ``auto`` stands for now.
        reason: Why.
        watched: What was found of each policy, by this process and those before it in the same directory.
        num_compared: Answers compared since the cache was opened.
        num_waiting: Answers chosen and not compared yet.
        num_dropped: Answers chosen and passed over, since too many were waiting.
        num_failed: Answers that could not be compared; the log says why.
    """

    rate: float
    threshold: float
    policy: str
    reason: str
    watched: tuple[WatchedPolicy, ...]
    num_compared: int = 0
    num_waiting: int = 0
    num_dropped: int = 0
    num_failed: int = 0


class _ClosedError(Exception):
    """The guard is to stop."""


class Guard:
    """Compares answers in the background, while no request is being answered.

    There is a thread as long as there are answers to compare. It gives way to requests between its passes,
    none of which is longer than a few hundred tokens.

    Args:
        model: The model.
        auto: Keeps what is found.
        rate: Share of answers to compare, above 0 and at most 1.
        threshold: Most divergence from full attention that is allowed, in nats a token.
        seed: Makes the choice of answers repeatable.
    """

    def __init__(
        self, model: Model, auto: AutoPolicy, *, rate: float, threshold: float, seed: int | None = None
    ) -> None:
        self._model, self._auto, self._rate, self._threshold = model, auto, rate, threshold
        self._random = random.Random(seed)
        self._comparison = Comparison(model, self._give_way)
        self._changed = threading.Condition()  # guards all that follows
        self._waiting: deque[ServedAnswer] = deque()
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._told: set[str] = set()  # what went wrong before; the log says it once
        self._num_answering = self._num_compared = self._num_dropped = self._num_failed = 0

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Keep the guard from starting a pass while a request is being answered."""
        with self._changed:
            self._num_answering += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_answering -= 1
                self._changed.notify_all()

    def sample(self, plan: Plan, token_ids: Sequence[int], finish_reason: str, serve: Serve) -> None:
        """Choose an answer to compare, or pass it over; returns at once.

        Args:
            plan: Of its request.
            token_ids: The answer.
            finish_reason: Of the answer; one that was cancelled is not looked at.
            serve: See ``ServedAnswer``.
        """
        token_ids = tuple(token_ids[:_MAX_TOKENS])
        if plan.policy.is_full or not plan.num_passages or not token_ids or finish_reason == "cancelled":
            return
        # Where the answer crossed into another set of rotary frequencies, all of it was computed anew.
        if self._model.regime(plan.num_tokens + len(token_ids)) != plan.regime:
            return
        with self._changed:
            if self._random.random() >= self._rate or self._is_closed:
                return
            if len(self._waiting) == _MAX_WAITING:
                self._num_dropped += 1
                return
            self._waiting.append(ServedAnswer(_as_planned(plan), token_ids, serve))
            self._start()

    def _start(self) -> None:
        if self._thread is not None:
            return
        self._thread = threading.Thread(target=self._work, name="rag-blockcache-guard")
        try:
            self._thread.start()
        except RuntimeError as error:  # no more threads, or the program ends
            self._thread = None
            self._num_dropped += len(self._waiting)
            self._waiting.clear()
            self._tell("answers are not compared with full attention", error)

    def status(self) -> GuardStatus:
        """Return what it does and has found."""
        with self._changed:
            return dataclasses.replace(
                status_of(self._auto, self._rate, self._threshold),
                num_compared=self._num_compared,
                num_waiting=len(self._waiting),
                num_dropped=self._num_dropped,
                num_failed=self._num_failed,
            )

    def close(self) -> None:
        """Stop after the pass that is under way; answers that are waiting are not compared."""
        with self._changed:
            self._is_closed = True
            self._waiting.clear()
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():  # it may be the last to let go
            thread.join()

    # In the background

    def _work(self) -> None:
        while (answer := self._next()) is not None:
            try:
                self._learn(answer, *self._comparison.compare(answer))
            except _ClosedError:
                continue
            except Exception as error:  # nobody waits for it, and answers go on without
                self._tell("an answer could not be compared with full attention", error)
                with self._changed:
                    self._num_failed += 1

    def _tell(self, what: str, error: Exception) -> None:
        """Warn of an error; the next of its kind would only fill the log."""
        kind = f"{what}: {type(error).__name__}"
        logger.log(logging.DEBUG if kind in self._told else logging.WARNING, "%s: %s", kind, error)
        self._told.add(kind)

    def _next(self) -> ServedAnswer | None:
        """Return what to compare next; None ends the thread."""
        with self._changed:
            if self._waiting:
                return self._waiting.popleft()
            self._thread = None
            return None

    def _give_way(self) -> None:
        """Wait until no request is being answered."""
        with self._changed:
            while self._num_answering and not self._is_ending():
                self._changed.wait(0.2)  # a program that ends does not say so
            if self._is_ending():
                raise _ClosedError

    def _is_ending(self) -> bool:
        return self._is_closed or not threading.main_thread().is_alive()

    def _learn(self, answer: ServedAnswer, divergence: float, num_same: int) -> None:
        """Add a comparison to what is on record, and say so once if it is enough."""
        name, num_tokens = answer.plan.policy.name, len(answer.token_ids)
        if not math.isfinite(divergence):
            raise ArithmeticError(f"under {name} its divergence is {divergence}")
        was_given_up = False

        def change(record: PolicyRecord) -> PolicyRecord:
            nonlocal was_given_up
            before = record.seen(name)
            was_given_up = before.is_given_up
            return record.with_seen(
                weighed(before, num_tokens, divergence, num_same, threshold=self._threshold)
            )

        try:
            self._auto.update(change)
        except StoreError as error:
            self._tell("what the guard found holds until this program ends", error)
        with self._changed:
            self._num_compared += 1
        seen = self._auto.record.seen(name)
        if seen.is_given_up and not was_given_up:
            logger.warning(
                "policy %s is %.3f nats a token from full attention over %d answers, %g are allowed; "
                "auto uses %s from here on",
                *(name, seen.divergence, seen.num_answers, seen.threshold, self._auto.current[0].name),
            )


def _as_planned(plan: Plan) -> Plan:
    """Return a plan as it was before its request was served, but with the policy that it was served under."""
    return Plan(
        plan.segments,
        plan.policy,
        plan.policy_reason,
        plan.regime,
        is_auto=False,  # no other policy may be chosen now
        start=plan.start,
        blocks=plan.blocks,
        shares_preamble=plan.shares_preamble,
        num_continuation=plan.num_continuation,
        is_replay=True,  # what was forgotten since stays forgotten
    )


def check_guard(rate: float, threshold: float) -> None:
    """Refuse options that no guard can have.

    Raises:
        InvalidInputError: If the rate or the threshold is out of bounds.
    """
    if not 0 <= rate <= 1:
        raise InvalidInputError(f"guard_rate is {rate}; give a share of answers from 0 to 1, such as 0.01")
    if not 0 < threshold < math.inf:
        raise InvalidInputError(f"guard_threshold is {threshold}; give nats a token above 0, such as 0.1")


def start_guard(model: Model, auto: AutoPolicy, *, rate: float, threshold: float) -> Guard | None:
    """Return a guard; None if the rate is 0."""
    return Guard(model, auto, rate=rate, threshold=threshold) if rate else None


def status_of(auto: AutoPolicy, rate: float, threshold: float) -> GuardStatus:
    """Return what is on record, without a guard at work."""
    policy, reason = auto.current
    return GuardStatus(rate, threshold, policy.name, reason, auto.record.watched)
