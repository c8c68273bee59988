"""What a block-fine-tuned model or adapter says of itself: one JSON file beside its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn

from rag_blockcache.errors import ModelNotFoundError

RECORD_FILE = "rag_blockcache.json"
_FORMAT = 1


@dataclass(frozen=True)
class TrainingRecord:
    """How weights were trained, as far as serving and readers need to know.

    Attributes:
        block_fine_tuned: Whether they learned to answer over blocks.
        base_model: Name of the model that training began with, never a path.
        base_revision: Its commit on the hub, where it came from there.
        base_fingerprint: See ``weights_fingerprint``.
        passage_format: In which passages were shown.
        preamble: Text before the passages; None for that of the format.
        seed: Of everything random.
        data: Each file with ``name``, ``sha256``, ``num_examples`` and ``num_drawn``.
        recipe: All options of the training.
        totals: Steps, samples and tokens that were trained on.
        versions: Of the libraries that trained.
        blocks_see: What blocks saw beside themselves, see ``conditioning``.
    """

    block_fine_tuned: bool
    base_model: str
    base_revision: str | None
    base_fingerprint: str
    passage_format: str
    preamble: str | None
    seed: int
    data: Sequence[Mapping[str, Any]] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    totals: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    blocks_see: str = "themselves"  # before there was a choice, too

    def write(self, folder: Path) -> None:
        """Write the record into a folder of weights."""
        content = {"format": _FORMAT, **asdict(self)}
        (folder / RECORD_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> TrainingRecord:
        """Read a record.

        Raises:
            ModelNotFoundError: If the file is damaged, or of a newer format than this version knows.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found = content["format"]
            content.setdefault("blocks_see", "themselves")
            known = {each.name: content[each.name] for each in fields(cls)} if found == _FORMAT else {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelNotFoundError(
                f"{RECORD_FILE} beside the weights cannot be read ({type(error).__name__}: {error}); get it "
                "again, or delete it to use the weights as if nothing were known of their training"
            ) from error
        if not known:
            raise ModelNotFoundError(
                f"{RECORD_FILE} beside the weights has format {found!r}, this version knows {_FORMAT}; "
                "update rag_blockcache"
            )
        return cls(**known)


def weights_fingerprint(network: nn.Module) -> str:
    """Name the weights of a model, whatever dtype they were loaded in.

    They are hashed as bfloat16: rounding twice is rounding once, so a model trained on in bfloat16 is known
    again in float32 and the other way around.

    Returns:
        32 hexadecimal digits.
    """
    digest = xxhash.xxh3_128()
    for name, weight in sorted(network.named_parameters()):
        rounded = weight.detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(rounded.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
