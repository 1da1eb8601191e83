"""Text. The demo is the Python standard library's own source, byte by byte: a real corpus on every machine."""

import hashlib
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np

from hgrn2 import ConfigError
from tasks.data import TaskData

END_OF_FILE = 0  # the byte between files; it occurs in no source file
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "__pycache__"}
SPLITS = ("train", "val", "test")


def split_of(name: str) -> str:
    """train (90%), val or test (5% each) from a hash of a file's relative name: stable across machines."""
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100
    return "test" if bucket < 5 else "val" if bucket < 10 else "train"


def read_sources(root: Path) -> dict[str, np.ndarray]:
    """The .py files below root, files in order of name with `END_OF_FILE` after each: split -> uint8 `[bytes]`."""
    parts: dict[str, list[bytes]] = {split: [] for split in SPLITS}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts) and path.is_file():
            parts[split_of(relative.as_posix())].append(path.read_bytes() + bytes([END_OF_FILE]))
    return {split: np.frombuffer(b"".join(files), dtype=np.uint8) for split, files in parts.items()}


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

    def content(self) -> list[np.ndarray]:
        return [self.tokens, np.array(self.seq_len)]

    def get(self, index: int, rng: np.random.Generator | None) -> dict[str, Any]:
        begin = index * self.seq_len
        block = self.tokens[begin : begin + self.seq_len + 1].astype(np.int64)
        length = len(block) - 1
        return {"tokens": np.pad(block, (0, self.seq_len - length)), "length": length}


class LMData(TaskData):
    """A byte-level corpus in contiguous blocks.

    Args:
        source: folder of .py files to model; null for the running interpreter's standard library (without
            site-packages, tests and idlelib). Files are split 90/5/5 by a hash of their relative name.
        seq_len: tokens a block.
    """

    def __init__(
        self,
        source: str | None = None,
        seq_len: int = 512,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__(batch_size, eval_batch_size, num_workers, seed)
        if seq_len < 1:
            raise ConfigError(f"data.seq_len={seq_len} must be at least 1")
        self.seq_len = seq_len
        self.root = Path(source if source is not None else sysconfig.get_path("stdlib"))
        if not self.root.is_dir():
            key = "data.source" if source is not None else "the standard library's folder"
            raise ConfigError(f"{key}={self.root} is no folder; data.source takes a folder of .py files")

    def model_needs(self) -> dict[str, tuple[int, str]]:
        return {"vocab_size": (256, "byte-level data")}

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        corpus = read_sources(self.root)
        for split, tokens in corpus.items():
            if len(tokens) <= self.seq_len:
                raise ConfigError(
                    f"{self.root} has {len(tokens)} bytes of Python source for the {split} split, fewer than one block "
                    f"(data.seq_len={self.seq_len}); set data.source to a folder of .py files, or install Python's "
                    "sources"
                )
            self.splits[split] = Blocks(tokens, self.seq_len, drop_short=split == "train")

    @staticmethod
    def decode(tokens: np.ndarray) -> str:
        """Bytes as text; what is no UTF-8 shows as replacement characters."""
        return bytes(np.asarray(tokens, dtype=np.uint8).tolist()).decode("utf-8", errors="replace")

    @staticmethod
    def encode(text: str) -> np.ndarray:
        """Text as byte tokens, int64."""
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)
