"""What a GGUF file says of its model, and where its tensors lie, read in one walk over its header.

A vocabulary is most of a header, and nothing here needs it: lists of texts are walked over and only counted, which
takes a moment where making objects of them takes seconds. The format: https://github.com/ggml-org/ggml/blob/master/
docs/gguf.md, versions 2 and 3, little-endian.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers.integrations import GGUF_CONFIG_MAPPING

FAMILY = "llama"  # in both libraries; others need conversions of their own
VERSIONS = (2, 3)
NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # struct's letters of the value types
TEXT, LIST = 8, 9
ALIGNMENT = 32  # of the tensors, where the file names no other


@dataclass(frozen=True)
class Stored:
    """A tensor in the file. shape: outermost dimension first; kind: ggml's number of its type; start: in bytes."""

    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True)
class Header:
    """metadata: numbers, texts, lists of numbers, and of a list of texts its length."""

    metadata: dict[str, Any]
    tensors: dict[str, Stored]


def read_header(path: Path) -> Header:
    """Raises: ValueError for anything but a whole header, OSError for no file."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            return _header(_Cursor(content))
        except struct.error:
            raise ValueError(f"{path.name} ends within its header") from None


class _Cursor:
    def __init__(self, content: mmap.mmap):
        self.content, self.place = content, 0

    def number(self, letter: str) -> Any:
        return self.numbers(letter)[0]

    def numbers(self, letters: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{letters}", self.content, self.place)
        self.place += struct.calcsize(f"<{letters}")
        return found

    def text(self) -> str:
        length = self.number("Q")
        self.place += length
        return self.content[self.place - length : self.place].decode()

    def skip_texts(self, count: int) -> None:
        unpack, content, place = struct.Struct("<Q").unpack_from, self.content, self.place
        for _ in range(count):
            place += 8 + unpack(content, place)[0]
        self.place = place

    def value(self, kind: int) -> Any:
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == TEXT:
            return self.text()
        if kind != LIST:
            raise ValueError(f"its header holds a value of the unknown type {kind}")
        kind, count = self.numbers("IQ")
        if kind in NUMBERS:
            return list(self.numbers(f"{count}{NUMBERS[kind]}"))
        if kind == TEXT:
            self.skip_texts(count)
            return count
        raise ValueError(f"its header holds a list of the type {kind}")


def _header(cursor: _Cursor) -> Header:
    magic, version, tensor_count, value_count = cursor.numbers("4sIQQ")
    if magic != b"GGUF" or version not in VERSIONS:
        raise ValueError(f"it is no GGUF file of version {' or '.join(map(str, VERSIONS))}")
    metadata = {cursor.text(): cursor.value(cursor.number("I")) for _ in range(value_count)}
    found = []
    for _ in range(tensor_count):
        name, dimensions = cursor.text(), cursor.number("I")
        found.append((name, cursor.numbers(f"{dimensions}Q")[::-1], *cursor.numbers("IQ")))
    alignment = metadata.get("general.alignment", ALIGNMENT)
    start = -(-cursor.place // alignment) * alignment
    return Header(metadata, {name: Stored(shape, kind, start + offset) for name, shape, kind, offset in found})


def is_llama(header: Header) -> bool:
    return header.metadata.get("general.architecture") == FAMILY


def llama_config(header: Header, location: str) -> transformers.LlamaConfig:
    """The config that transformers makes of the header, by its own table of names, without reading the vocabulary."""
    metadata = header.metadata
    table: Any = GGUF_CONFIG_MAPPING
    names = {f"{group}.{key}": ours for group in ("general", FAMILY, "tokenizer") for key, ours in table[group].items()}
    settings = {ours: metadata[theirs] for theirs, ours in names.items() if ours and theirs in metadata}
    settings.setdefault("vocab_size", metadata.get("tokenizer.ggml.tokens"))
    settings["tie_word_embeddings"] = "output.weight" not in header.tensors
    return transformers.LlamaConfig.from_dict(settings, name_or_path=location)
