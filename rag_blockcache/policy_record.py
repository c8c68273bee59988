"""What ``auto`` stands for in a directory, and why: the default, a calibration, what the guard found.

The record is one small JSON file, ``policy.json``, with an entry for each model and prompt that were used
with the directory. Processes take turns to change it, and it is replaced as a whole.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rag_blockcache.errors import StoreError
from rag_blockcache.reuse import FULL, LADDER, Policy, parse_policy

FILE_NAME = "policy.json"

_FORMAT, _VERSION = "rag_blockcache policies", 1

_TYPES: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}

_Kind = TypeVar("_Kind")


@dataclass(frozen=True)
class Calibration:
    """The cheapest policy that stayed within a loss on the user's own passages.

    Attributes:
        policy: Its name.
        dearer: Names of the measured policies that cost more and lose less, the cheapest first; the guard
            steps up along them.
        num_questions: How many questions it was measured on.
        fidelity: Of the policy; 1 is full attention.
        fidelity_low: Lower end of its 95 % interval.
        max_loss: What 1 - ``fidelity_low`` was to stay within.
    """

    policy: str
    dearer: tuple[str, ...]
    num_questions: int
    fidelity: float
    fidelity_low: float
    max_loss: float

    @property
    def reason(self) -> str:
        """Why this policy, in a few words."""
        return (
            f"calibrated on {self.num_questions} questions: fidelity {self.fidelity:.3f}, at least "
            f"{self.fidelity_low:.3f} with 95 % confidence, where {1 - self.max_loss:.3f} is enough"
        )


@dataclass(frozen=True)
class WatchedPolicy:
    """What the guard has seen of one policy.

    Attributes:
        name: Of the policy.
        num_answers: Answers that were compared with full attention.
        num_tokens: Tokens of them that were compared.
        divergence_sum: Sum over these tokens of KL(full ‖ policy), in nats.
        num_same: How many of these tokens both find likeliest.
        evidence: That the divergence exceeds ``threshold``; see ``guard``.
        threshold: Most nats a token that are allowed.
        is_given_up: Whether the evidence was enough, so that ``auto`` does not use the policy any more.
    """

    name: str
    num_answers: int = 0
    num_tokens: int = 0
    divergence_sum: float = 0.0
    num_same: int = 0
    evidence: float = 1.0
    threshold: float = 0.0
    is_given_up: bool = False

    @property
    def divergence(self) -> float:
        """KL(full ‖ policy) a token, in nats; 0 before the first answer."""
        return self.divergence_sum / self.num_tokens if self.num_tokens else 0.0

    @property
    def agreement(self) -> float:
        """Share of tokens at which both find the same one likeliest; 0 before the first answer."""
        return self.num_same / self.num_tokens if self.num_tokens else 0.0


@dataclass(frozen=True)
class PolicyRecord:
    """What is on record for one model and prompt.

    Attributes:
        model: Name of the model, for people.
        fingerprint: ``Model.fingerprint``.
        prompt: Hash of what stands around passages in every prompt, and of how blocks are made.
        calibration: The latest; None for none.
        watched: Policies that the guard has seen, in that order.
        policy: What ``auto`` used when the record was written, for people; it is worked out anew when read.
        reason: Why.
    """

    model: str
    fingerprint: str
    prompt: str
    calibration: Calibration | None = None
    watched: tuple[WatchedPolicy, ...] = ()
    policy: str = ""
    reason: str = ""

    def seen(self, name: str) -> WatchedPolicy:
        """Return what the guard has seen of a policy."""
        return next((each for each in self.watched if each.name == name), WatchedPolicy(name))

    def with_seen(self, seen: WatchedPolicy) -> PolicyRecord:
        """Return the record with this in place of what the guard had seen of the same policy."""
        by_name = {each.name: each for each in self.watched} | {seen.name: seen}
        return dataclasses.replace(self, watched=tuple(by_name.values()))

    def choose(
        self, default: tuple[Policy, str], can_use: Callable[[Policy], bool] = lambda _: True
    ) -> tuple[Policy, str]:
        """Choose for a user who said ``auto``.

        From what was calibrated, else from the default, the choice steps over every policy that the guard
        gave up, to the next dearer one; ``full`` is the last.

        Args:
            default: Policy and reason where nothing is on record.
            can_use: Whether a policy can be used with the model; others are stepped over too.

        Raises:
            InvalidInputError: If the record names a policy that is not known here.
        """
        policy, reason = default
        steps = [policy.name, *_above(policy.name)]
        if self.calibration is not None:
            steps, reason = [self.calibration.policy, *self.calibration.dearer], self.calibration.reason
        for name in steps:
            seen, policy = self.seen(name), parse_policy(name) or policy
            if not policy.is_full and seen.is_given_up:
                reason = (
                    f"the guard gave up {name}: {seen.divergence:.3f} nats a token from full attention over "
                    f"{seen.num_answers} answers, {seen.threshold:g} are allowed"
                )
            elif can_use(policy):
                return policy, reason
        return FULL, reason


def _above(name: str) -> tuple[str, ...]:
    """Return the policies of the ladder that cost more; none for one that does not stand on it."""
    return LADDER[LADDER.index(name) + 1 :] if name in LADDER else ()


def read_records(directory: Path | str) -> list[PolicyRecord]:
    """Return all that is on record in a directory; nothing where there is no file.

    Raises:
        StoreError: If the file is damaged, or of another release.
    """
    path = Path(directory) / FILE_NAME
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != _FORMAT or content["version"] != _VERSION:
            raise StoreError(
                f"{path} has format {content['format']!r}, version {content['version']!r}; this release "
                f"reads {_FORMAT!r}, version {_VERSION}: install the one that wrote it, or delete the file"
            )
        return [_record(row) for row in content["records"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise StoreError(
            f"{path} cannot be read ({type(error).__name__}: {error}); delete it, and calibrate again"
        ) from error


def reset_guard(directory: Path | str) -> list[str]:
    """Forget what the guard found in a directory; calibrations stay.

    Returns:
        Names of the policies that it had given up.

    Raises:
        StoreError: If the file cannot be read or written.
    """
    folder = Path(directory)
    if not (folder / FILE_NAME).is_file():
        return []
    with held(folder):
        records = read_records(folder)
        write_records(folder, [without_guard(each) for each in records])
    return [seen.name for each in records for seen in each.watched if seen.is_given_up]


def without_guard(record: PolicyRecord) -> PolicyRecord:
    """Return a record without what the guard found."""
    made = record.calibration
    policy, reason = ("", "") if made is None else (made.policy, made.reason)
    return dataclasses.replace(record, watched=(), policy=policy, reason=reason)


def _record(row: Mapping[str, Any]) -> PolicyRecord:
    calibration = row["calibration"]
    if calibration is not None:
        calibration = _typed(Calibration, {**calibration, "dearer": tuple(calibration["dearer"])})
    watched = tuple(_typed(WatchedPolicy, seen) for seen in row["watched"])
    return _typed(PolicyRecord, {**row, "calibration": calibration, "watched": watched})


def _typed(kind: type[_Kind], row: Mapping[str, Any]) -> _Kind:
    """Make a value of what was read, or raise what is wrong with it."""
    made = kind(**row)
    for each in dataclasses.fields(kind):  # type: ignore[arg-type]
        known, value = _TYPES.get(str(each.type)), getattr(made, each.name)
        if known is not None and not isinstance(value, known):
            raise TypeError(f"{each.name} is {value!r}")
    return made


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Keep other processes, and other caches of this one, from changing the record meanwhile."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise StoreError(f"{directory} cannot be opened ({error}); no policy is recorded in it") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    except OSError as error:
        raise StoreError(f"{directory} cannot be written ({error}); no policy is recorded in it") from error
    finally:
        os.close(descriptor)


def write_records(directory: Path, records: list[PolicyRecord]) -> None:
    """Replace the file as a whole, so that whoever reads it finds one of the two."""
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "records": [dataclasses.asdict(each) for each in records],
    }
    descriptor, name = tempfile.mkstemp(prefix=f".{FILE_NAME}.", suffix=".tmp", dir=directory)  # mode 0600
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, directory / FILE_NAME)
    except BaseException:
        os.unlink(name)
        raise
