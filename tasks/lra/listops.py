"""ListOps (Nangia and Bowman, arXiv 1804.06028) as Long Range Arena draws it (arXiv 2011.04006).

    tree := digit | operator tree tree ... "]"        operators: [MIN, [MAX, [MED (median), [SM (sum modulo 10)

The root is a list; below it a node is a digit with probability 3/4 and at the maximal depth always. Expressions whose
number of tokens is outside the range, or that exist already, are drawn again.
"""

from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from hgrn2.config import ConfigError
from tasks.dataset import hash_arrays

OPERATORS = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(np.median(values)),
    "[SM": lambda values: sum(values) % 10,
}
NUM_CLASSES = 10
VOCABULARY = ["<pad>", "<eos>", "]", *OPERATORS, *map(str, range(10))]
PAD, EOS = 0, 1
TOKEN_ID = {token: i for i, token in enumerate(VOCABULARY)}
DIGIT_PROBABILITY = 0.75
MAX_ATTEMPTS = 20_000
DATA_SEED = 2011_04006  # the data set is a constant, whatever the run's seed
DRAWN = ("test", "val", "train")  # in this order: an expression that a split holds is in no later one


def draw_expression(rng: np.random.Generator, max_depth: int, max_args: int) -> tuple[list[str], int]:
    """One random expression as tokens, and its value from 0 to 9."""
    operators = list(OPERATORS)

    def draw(depth: int) -> tuple[list[str], int]:
        if depth >= max_depth or (depth > 1 and rng.random() < DIGIT_PROBABILITY):
            digit = int(rng.integers(10))
            return [str(digit)], digit
        operator = operators[rng.integers(len(operators))]
        tokens, values = [operator], []
        for _ in range(rng.integers(2, max_args + 1)):
            part, value = draw(depth + 1)
            tokens += part
            values.append(value)
        return [*tokens, "]"], OPERATORS[operator](values)

    return draw(1)


def draw_sample(
    key: tuple[int, ...], max_depth: int, max_args: int, lengths: tuple[int, int], drawn: set[bytes]
) -> tuple[np.ndarray, int]:
    """Token ids (int64, `<eos>` last) and label of the first expression of stream `key` that fits and is new.

    `drawn` holds the expressions that exist already, and gets this one: no expression is in two places.
    """
    rng = np.random.default_rng(key)
    for _ in range(MAX_ATTEMPTS):
        tokens, value = draw_expression(rng, max_depth, max_args)
        if lengths[0] <= len(tokens) <= lengths[1]:
            ids = np.array([TOKEN_ID[token] for token in tokens] + [EOS])
            if ids.tobytes() not in drawn:
                drawn.add(ids.tobytes())
                return ids, value
    raise ConfigError(
        f"no new expression in {MAX_ATTEMPTS} draws with data.min_length={lengths[0]}, data.max_length={lengths[1]}, "
        f"data.max_depth={max_depth}, data.max_args={max_args}; widen the lengths, or raise depth and arguments"
    )


def evaluate(tokens: list[str]) -> int:
    """The value of an expression's tokens (without `<eos>`)."""
    stack: list[list] = [[]]
    for token in tokens:
        if token in OPERATORS:
            stack.append([token])
        elif token == "]":
            operator, *values = stack.pop()
            stack[-1].append(OPERATORS[operator](values))
        else:
            stack[-1].append(int(token))
    return stack[0][0]


def longest(max_depth: int, max_args: int) -> int:
    """Tokens of the largest expression within the limits."""
    length = 1
    for _ in range(max_depth - 1):
        length = 2 + max_args * length
    return length


@lru_cache(maxsize=len(DRAWN))
def draw_split(
    split: str, train_size: int, eval_size: int, max_depth: int, max_args: int, lengths: tuple[int, int]
) -> tuple[list[np.ndarray], np.ndarray]:
    """Token ids of each expression of a split, and the labels."""
    settings = (train_size, eval_size, max_depth, max_args, lengths)
    stream = DRAWN.index(split)
    drawn = {ids.tobytes() for earlier in DRAWN[:stream] for ids in draw_split(earlier, *settings)[0]}
    size = train_size if split == "train" else eval_size
    samples = [draw_sample((DATA_SEED, stream, i), max_depth, max_args, lengths, drawn) for i in range(size)]
    return [tokens for tokens, _ in samples], np.array([label for _, label in samples])


class ListOps:
    """One split of expressions: `tokens` with `<eos>` last, and `label`. They are drawn when first asked for.

    Args:
        split: train, val or test.
        train_size: number of training expressions.
        eval_size: number of expressions in each of the validation and test sets.
        max_depth: levels of nesting, digits included.
        max_args: arguments an operator has at most (at least 2).
        min_length: tokens an expression has at least.
        max_length: tokens an expression has at most (without the end-of-sequence token).
    """

    info = {"num_classes": NUM_CLASSES, "vocab_size": len(VOCABULARY)}

    def __init__(
        self,
        split: str,
        train_size: int = 20_000,
        eval_size: int = 2_000,
        max_depth: int = 4,
        max_args: int = 5,
        min_length: int = 8,
        max_length: int = 64,
    ):
        for key, value, least in (
            ("train_size", train_size, 1), ("eval_size", eval_size, 1), ("max_depth", max_depth, 2),
            ("max_args", max_args, 2), ("min_length", min_length, 4),
        ):  # fmt: skip
            if value < least:
                raise ConfigError(f"data.{key}={value} must be at least {least}")
        if max_length < min_length:
            raise ConfigError(f"data.max_length={max_length} must not be below data.min_length={min_length}")
        if min_length > longest(max_depth, max_args):
            raise ConfigError(
                f"data.min_length={min_length} cannot be reached with data.max_depth={max_depth} and "
                f"data.max_args={max_args} (at most {longest(max_depth, max_args)} tokens)"
            )
        self._settings = (split, train_size, eval_size, max_depth, max_args, (min_length, max_length))

    @cached_property
    def _drawn(self) -> tuple[list[np.ndarray], np.ndarray]:
        return draw_split(*self._settings)

    @property
    def tokens(self) -> list[np.ndarray]:
        return self._drawn[0]

    @property
    def labels(self) -> np.ndarray:
        return self._drawn[1]

    def __len__(self) -> int:
        return len(self.tokens)

    def get(self, index: int, rng: np.random.Generator | None) -> dict[str, Any]:
        return {"tokens": self.tokens[index], "label": self.labels[index]}

    def fingerprint(self) -> str:
        return hash_arrays(*self.tokens, self.labels)

    @staticmethod
    def decode(tokens: np.ndarray) -> str:
        """An expression as text, without padding and `<eos>`; an id that is none shows as such."""
        kept = (int(t) for t in tokens if t not in (PAD, EOS))
        return " ".join(VOCABULARY[t] if 0 <= t < len(VOCABULARY) else f"<{t}>" for t in kept)
