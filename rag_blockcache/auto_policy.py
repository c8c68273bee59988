"""What ``auto`` stands for in one cache: its default, or what is on record for its model and prompt."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rag_blockcache.errors import InvalidInputError, StoreError
from rag_blockcache.policy_record import PolicyRecord, held, read_records, write_records
from rag_blockcache.reuse import Policy

if TYPE_CHECKING:
    from rag_blockcache.plan import Plan

logger = logging.getLogger(__name__)


class AutoPolicy:
    """What ``auto`` stands for in one cache.

    Args:
        directory: Holds the record; None keeps it in memory.
        default: Policy and reason where nothing is on record.
        model: Name of the model, for people.
        fingerprint: ``Model.fingerprint``.
        prompt: Hash of what stands around passages in every prompt, and of how blocks are made.
        can_use: Whether a policy can be used with the model; others are stepped over.

    Attributes:
        can_use: See above.
        record: As it was last read or written by this process.
    """

    def __init__(
        self,
        directory: Path | str | None,
        *,
        default: tuple[Policy, str],
        model: str,
        fingerprint: str,
        prompt: str,
        can_use: Callable[[Policy], bool] = lambda _: True,
    ) -> None:
        self._directory = None if directory is None else Path(directory)
        self._default, self.can_use = default, can_use
        self._changing = (
            threading.Lock()
        )  # held while the record changes; who reads it takes what stands there
        self.record = PolicyRecord(model, fingerprint, prompt)
        self._choice: tuple[Policy, str] | None = None
        if self._directory is not None:
            self._read(self._directory)

    def _read(self, directory: Path) -> None:
        """Take what is on record; a file that cannot be used costs its advice, not the cache."""
        try:
            records = read_records(directory)
        except StoreError as error:
            logger.warning("auto goes by the default: %s", error)
            return
        found = [each for each in records if self._is_ours(each)]
        if found:
            self._take(found[0])
        elif any(each.calibration is not None for each in records):
            logger.info(
                "the calibration in %s is of another model or prompt, and does not count here; run "
                "rag-blockcache calibrate for this one",
                directory,
            )

    def _is_ours(self, record: PolicyRecord) -> bool:
        own = self.record
        return (record.fingerprint, record.prompt) == (own.fingerprint, own.prompt)

    def _take(self, record: PolicyRecord) -> None:
        self.record, self._choice = record, self._chosen(record)

    def _chosen(self, record: PolicyRecord) -> tuple[Policy, str] | None:
        """Return what a record asks for; None if it says nothing, or nothing that is known here."""
        if record.calibration is None and not any(seen.is_given_up for seen in record.watched):
            return None
        try:
            return record.choose(self._default, self.can_use)
        except InvalidInputError as error:  # another release made it
            logger.warning("auto goes by the default: %s", error)
            return None

    @property
    def current(self) -> tuple[Policy, str]:
        """Policy that ``auto`` stands for now, and the reason."""
        return self._choice or self._default

    def apply(self, plan: Plan) -> None:
        """Let what is on record prevail over the default in the plan of a request that said ``auto``."""
        choice = self._choice  # once: the guard may change it meanwhile
        if choice is None or not plan.is_auto or plan.policy.is_full:
            return
        plan.policy, plan.policy_reason = choice
        if plan.policy.is_full:
            plan.blocks = {}  # none is looked up

    def update(self, change: Callable[[PolicyRecord], PolicyRecord]) -> None:
        """Change the record; other processes that do so take turns.

        Args:
            change: Is given the record as it is, and returns what is to stand there instead.

        Raises:
            StoreError: If the file cannot be read or written; the change holds in this process all the same.
        """
        with self._changing:
            try:
                self._take(self._written(change))
            except StoreError:
                self._take(change(self.record))
                raise

    def _written(self, change: Callable[[PolicyRecord], PolicyRecord]) -> PolicyRecord:
        """Return the record after a change, which is then in the directory, if there is one."""
        if self._directory is None:
            return change(self.record)
        with held(self._directory):
            records = read_records(self._directory)
            after = change(next(filter(self._is_ours, records), self.record))
            others = [each for each in records if not self._is_ours(each)]
            write_records(self._directory, [*others, self._described(after)])
        return after

    def _described(self, record: PolicyRecord) -> PolicyRecord:
        policy, reason = self._chosen(record) or self._default
        return dataclasses.replace(record, policy=policy.name, reason=reason)
