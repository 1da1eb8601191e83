"""Text in blocks of tokens. The demo is the Python standard library's own source, byte by byte.

A data set of text gives `tokens` int64 `[seq_len + 1]` and `length`, the number of targets that count; `encode` and
`decode` turn text into tokens and back for the samples in TensorBoard.
"""

import numpy as np

from tasks.data import TaskData
from tasks.lm.python_source import PythonSource


class LMData(TaskData):
    """Data sets of text by name: python (a folder of .py files, byte by byte; null is the standard library's)."""

    datasets = {"python": PythonSource}

    def encode(self, text: str) -> np.ndarray:
        """Text as tokens, int64."""
        return self.split("val").encode(text)

    def decode(self, tokens: np.ndarray) -> str:
        """Tokens as text."""
        return self.split("val").decode(tokens)
