"""What all implementations of the ops share as torch ops: what they refuse."""

import torch


def refuse_second_derivatives() -> None:
    """For every backward: raise if autograd records it (`create_graph=True`), lest a derivative of it be wrong."""
    if torch.is_grad_enabled():
        no_second_derivative()


def no_second_derivative(*_):
    raise NotImplementedError(
        "this implementation of HGRN2's scan has no second derivatives (create_graph=True); impl='reference' has them"
    )
