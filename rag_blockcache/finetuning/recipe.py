"""All options of block fine-tuning, once for Python and for every command line."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from rag_blockcache.errors import InvalidInputError

Mode = Literal["block", "full"]
_LEARNING_RATES = {True: 5e-4, False: 2e-5}  # of an adapter, of all weights
_TEACHERS = ("base", "start", "itself")  # or an adapter
_NOT_OF_THE_RUN = {"out", "workers", "merge"}  # may differ when a run goes on


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Recipe:
    """What is trained, on what, and how; every field is an option of the command line."""

    model: str = _option("", "Hub id or folder of the model to start from.")
    out: str = _option("", "Folder for the adapter, or the model; a run that was killed goes on from there.")
    data: list[str] = field(
        default_factory=list, metadata={"help": "Files with examples, .jsonl or .jsonl.gz."}
    )
    passages: str | None = _option(
        None, "File of passages that examples name by pid; passages.jsonl[.gz] beside them if left out."
    )
    eval_data: list[str] = field(
        default_factory=list,
        metadata={"help": "Files with examples to measure on during training; never trained on."},
    )
    own_answers: bool = _option(
        False, "Let the model itself answer questions that have no answer, under full attention."
    )
    modes: Literal["block+full", "full", "block"] = _option(
        "block+full",
        "Attention each example is trained under; it is drawn twice in any case, "
        "so that runs of different modes see the same data in the same number of steps.",
    )
    passage_format: str = _option("paper", "How passages are shown: paper, plain, verbatim or template.")
    preamble: str | None = _option(None, "Text before the passages; that of the format if left out.")
    blocks_see: Literal["themselves", "stand-ins"] = _option(
        "themselves",
        "What a block sees beside itself, when it is trained and ever after: nothing, as in the paper, or "
        "stand-ins for other passages.",
    )
    min_passages: int = _option(4, "Fewest passages of a sample; the most is what its example has.")
    max_questions: int = _option(
        1,
        "Most questions of a sample: beside that of the example others of its file, each for itself, "
        "whose answers rest on passages that are shown.",
    )
    balance: float = _option(
        0.5, "0 draws from all files alike, 1 in proportion to their size; between them, to that power of it."
    )
    steps: int = _option(1000, "Optimizer steps.")
    row_tokens: int = _option(8192, "Length of a row, into which samples are packed; the longest sample.")
    rows_per_step: int = _option(4, "Rows of one optimizer step, over all processes.")
    learning_rate: float | None = _option(None, "Highest; 5e-4 for an adapter, 2e-5 for all weights.")
    warmup_steps: int = _option(50, "Steps to the highest learning rate; a cosine leads down to zero.")
    weight_decay: float = _option(0.0, "Of AdamW.")
    max_grad_norm: float = _option(1.0, "Gradients are clipped to it.")
    lora_rank: int = _option(32, "Rank of the adapter in every linear layer; 0 trains all weights.")
    lora_alpha: int = _option(64, "Scale of the adapter, divided by its rank.")
    lora_dropout: float = _option(0.0, "Dropout in the adapter.")
    start_from: str | None = _option(
        None, "Adapter of this model to go on with, hub id or folder; rank and scale are then those it has."
    )
    distill: float = _option(0.0, "Share of the loss that is distance to the teacher, 0 to 1.")
    teacher: str = _option(
        "base",
        "Who teaches under full attention: base, the model without its adapter; start, with the adapter that "
        "training started from; itself, as it is at that step; or with another adapter, hub id or folder.",
    )
    match_states: float = _option(
        0.0,
        "Weight, beside the loss, of how far the states of questions and answers are from the teacher's in "
        "every layer, as a share of their variance.",
    )
    precision: Literal["bfloat16", "float32"] = _option("bfloat16", "What matrix products are computed in.")
    attention: Literal["auto", "flex", "sdpa"] = _option(
        "auto", "flex needs a GPU and no dense mask, sdpa runs anywhere; auto takes flex on a GPU."
    )
    compile_layers: bool = _option(False, "Compile the model's layers: a slow start, then faster steps.")
    gradient_checkpointing: bool = _option(False, "Compute activations again instead of keeping them.")
    eval_every: int = _option(100, "Steps between measurements on eval_data.")
    eval_samples: int = _option(100, "Examples of each eval_data file that are measured.")
    log_every: int = _option(10, "Steps between points of the loss curve.")
    save_every: int = _option(100, "Steps between checkpoints.")
    seed: int = _option(0, "Of order, passages, and the start of the adapter.")
    workers: int = _option(1, "Processes that tokenize.")
    base_name: str | None = _option(
        None, "Name to record for the model, such as its hub id; that of its folder if left out."
    )
    merge: bool = _option(False, "Also write the model with the adapter merged into it, to OUT/merged.")

    def __post_init__(self) -> None:
        """Refuse what cannot be trained before anything is read."""
        for name in ("model", "out", "data"):
            if not getattr(self, name):
                raise InvalidInputError(
                    f"--{name} is missing; say what to train, on what, and where to put it"
                )
        for name, kind in get_type_hints(Recipe).items():
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                raise InvalidInputError(
                    f"{name} is {getattr(self, name)!r}; choose one of {', '.join(get_args(kind))}"
                )
        for name in ("steps", "row_tokens", "rows_per_step", "min_passages", "max_questions", "eval_every",
                     "eval_samples", "log_every", "save_every", "workers"):  # fmt: skip
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("balance", "distill"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidInputError(f"{name} is {getattr(self, name)}; it lies between 0 and 1")
        if not 0 <= self.match_states < math.inf:
            raise InvalidInputError(f"match_states is {self.match_states}; give 0, or a weight above it")
        self._check_weights()

    def _check_weights(self) -> None:
        if self.lora_rank < 0:
            raise InvalidInputError(f"lora_rank is {self.lora_rank}; give a rank, or 0 for all weights")
        if self.teacher == "start" and not self.start_from:
            raise InvalidInputError(
                "teacher is 'start', and there is nothing to start from; name an adapter in start_from"
            )
        if not self.teacher:
            raise InvalidInputError(f"teacher is empty; name one of {', '.join(_TEACHERS)}, or an adapter")
        if self.is_adapter:
            return
        if self.start_from:
            raise InvalidInputError(
                "with lora_rank 0 all weights are trained, and no adapter; leave start_from out"
            )
        if self.is_taught and self.teacher != "itself":
            raise InvalidInputError(
                f"with lora_rank 0 the base model changes, and {self.teacher!r} cannot teach; "
                "take teacher 'itself'"
            )
        if self.merge:
            raise InvalidInputError("with lora_rank 0 there is no adapter to merge; leave merge out")

    @property
    def is_adapter(self) -> bool:
        """Whether an adapter is trained, and not all weights."""
        return self.lora_rank > 0

    @property
    def is_taught(self) -> bool:
        """Whether a teacher is asked."""
        return bool(self.distill or self.match_states)

    @property
    def adapters(self) -> dict[str, str]:
        """The adapters that are read, hub ids or folders, by the option that names them."""
        named = {"start_from": self.start_from, "teacher": self.teacher}
        return {option: name for option, name in named.items() if name and name not in _TEACHERS}

    @property
    def teaching_adapter(self) -> str | None:
        """The adapter that has to be loaded to teach, if any."""
        if not self.is_taught:
            return None
        return self.start_from if self.teacher == "start" else self.adapters.get("teacher")

    @property
    def peak_learning_rate(self) -> float:
        """The highest learning rate."""
        return _LEARNING_RATES[self.is_adapter] if self.learning_rate is None else self.learning_rate

    @property
    def mode_pair(self) -> tuple[Mode, Mode]:
        """The modes in which each example is drawn, one after the other."""
        pairs: dict[str, tuple[Mode, Mode]] = {
            "block+full": ("block", "full"),
            "full": ("full", "full"),
            "block": ("block", "block"),
        }
        return pairs[self.modes]

    @property
    def model_name(self) -> str:
        """Name of the base model, without folders of this machine."""
        is_folder = Path(self.model).is_dir()
        return self.base_name or (Path(self.model).resolve().name if is_folder else self.model)

    def described(self) -> dict[str, Any]:
        """Return all options with paths cut to names: what a record holds, and what a run is known by."""
        options = {name: value for name, value in asdict(self).items() if name not in _NOT_OF_THE_RUN}
        options["model"], options["learning_rate"] = self.model_name, self.peak_learning_rate
        for name in ("data", "eval_data"):
            options[name] = [Path(path).name for path in options[name]]
        options["passages"] = Path(self.passages).name if self.passages else None
        for option, name in self.adapters.items():
            options[option] = Path(name).resolve().name if Path(name).is_dir() else name
        return options
