"""Every random stream of a run, as a pure function of its seed and of where training stands.

The weights are drawn by Lightning's `seed_everything`; `hgrn2` draws nothing else.
"""

import random
from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """Keeps the streams of one seed apart."""

    ORDER = 1  # of the training samples: (seed, epoch)
    SAMPLE = 2  # augmentation: (seed, epoch, index)
    STEP = 3  # dropout: (seed, micro-batch, rank)


def sequence(seed: int, stream: Stream, *place: int) -> np.random.SeedSequence:
    """What seeds one place in a stream; `np.random.default_rng` takes it."""
    return np.random.SeedSequence((seed, int(stream), *place))


def seed_globals(place: np.random.SeedSequence, devices: bool) -> None:
    """Seed the global generators of torch (with `devices` CUDA's, too), numpy and python."""
    words = place.generate_state(2, np.uint64)
    (torch.manual_seed if devices else torch.default_generator.manual_seed)(int(words[0]) >> 1)
    np.random.seed(int(words[1]) & 0xFFFFFFFF)  # noqa: NPY002 - libraries draw from the global state
    random.seed(int(words[1]))
