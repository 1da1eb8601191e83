"""A mixer option of one's own, a learnt scale for each head's output: python train.py task=head_scale.yaml"""

import torch
from torch import Tensor, nn

from hgrn2 import HGRN2Config, HGRN2Mixer
from tasks.lm.module import LMTask


class HeadScaleMixer(HGRN2Mixer):
    """`HGRN2Mixer` with a scale for each head; training and decoding both pass through `_output`."""

    def __init__(self, config: HGRN2Config):
        super().__init__(config)
        self.head_scale = nn.Parameter(torch.ones(config.heads))

    def _output(self, o: Tensor) -> Tensor:
        return super()._output(o * self.head_scale[:, None])


class HeadScaleTask(LMTask):
    """Language modelling with the option.

    Args:
        head_scale: scale each head's output by a learnt factor.
    """

    def __init__(self, backbone: HGRN2Config = HGRN2Config(), head_scale: bool = True, **settings):
        super().__init__(backbone, **settings)
        if head_scale:
            for block in self.model.backbone.blocks:
                block.mixer = HeadScaleMixer(self.backbone_config)
