"""ListOps (Nangia and Bowman, arXiv 1804.06028) as Long Range Arena draws it (arXiv 2011.04006).

    tree := digit | operator tree tree ... "]"        operators: [MIN, [MAX, [MED (median), [SM (sum modulo 10)

The root is a list; below it a node is a digit with probability 3/4 and at the maximal depth always. Expressions whose
number of tokens is outside the range, or that exist already, are drawn again.
"""

import numpy as np

from hgrn2.config import ConfigError

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
