"""Python source, byte by byte; by default the standard library's own: a real corpus on every machine."""

import hashlib
import os
import re
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np

from hgrn2 import ConfigError
from tasks.dataset import hash_arrays

END_OF_FILE = 0  # the byte between files; it occurs in no source file
REPLACEMENT = "\ufffd".encode()
LONE_SURROGATE = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # those that stand for no byte (PEP 383)
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "__pycache__"}


def split_of(name: str) -> str:
    """train (90%), val or test (5% each) from a hash of a file's relative name: stable across machines."""
    bucket = int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:4], "big") % 100
    return "test" if bucket < 5 else "val" if bucket < 10 else "train"


def read_sources(root: Path, split: str) -> np.ndarray:
    """A split's .py files below root, in order of name with `END_OF_FILE` after each: uint8 `[bytes]`."""
    files = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if split_of(relative.as_posix()) == split and SKIPPED_FOLDERS.isdisjoint(relative.parts) and path.is_file():
            files.append(_read(path) + bytes([END_OF_FILE]))
    return np.frombuffer(b"".join(files), dtype=np.uint8)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error


class Blocks:
    """Contiguous blocks of seq_len tokens and the token after each; a last, shorter block is not left out.

    Short blocks are padded with `END_OF_FILE`; `length` is the number of targets that count.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, drop_short: bool):
        self.tokens, self.seq_len = tokens, seq_len
        targets = max(len(tokens) - 1, 0)
        self.blocks = targets // seq_len if drop_short else -(-targets // seq_len)

    def __len__(self) -> int:
        return self.blocks

    def fingerprint(self) -> str:
        return hash_arrays(self.tokens, np.array(self.seq_len))

    def get(self, index: int, rng: np.random.Generator | None) -> dict[str, Any]:
        begin = index * self.seq_len
        block = self.tokens[begin : begin + self.seq_len + 1].astype(np.int64)
        length = len(block) - 1
        return {"tokens": np.pad(block, (0, self.seq_len - length)), "length": length}


class PythonSource(Blocks):
    """One split of the .py files below a folder, split 90/5/5 by a hash of their relative name.

    Args:
        split: train, val or test.
        path: the folder; None for the running interpreter's standard library (without site-packages, tests, idlelib).
        seq_len: tokens a block.
    """

    info = {"vocab_size": 256}

    def __init__(self, split: str, path: Path | None = None, seq_len: int = 512):
        if seq_len < 1:
            raise ConfigError(f"data.seq_len={seq_len} must be at least 1")
        root = Path(sysconfig.get_path("stdlib")) if path is None else path
        if not root.is_dir():
            key = "the standard library's folder" if path is None else "data.path"
            raise ConfigError(f"{key}={root} is no folder; data.path takes a folder of .py files")
        tokens = read_sources(root, split)
        if len(tokens) <= seq_len:
            raise ConfigError(
                f"{root} has {len(tokens)} bytes of Python source for the {split} split, fewer than one block "
                f"(data.seq_len={seq_len}); set data.path to a folder of .py files, or install Python's sources"
            )
        super().__init__(tokens, seq_len, drop_short=split == "train")

    @staticmethod
    def decode(tokens: np.ndarray) -> str:
        """Bytes as text; what is no UTF-8, or (in a larger vocabulary) no byte, shows as replacement characters."""
        parts = (bytes([token]) if 0 <= token < 256 else REPLACEMENT for token in np.asarray(tokens).tolist())
        return b"".join(parts).decode("utf-8", errors="replace")

    @staticmethod
    def encode(text: str) -> np.ndarray:
        """Text as byte tokens, int64; text from a command line or a file's name gives back its bytes, UTF-8 or not."""
        text = LONE_SURROGATE.sub("\ufffd", text)
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), dtype=np.uint8).astype(np.int64)
