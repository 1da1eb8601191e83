"""torch.compile for the shared backbone: what is compiled, and when."""

import warnings
from typing import Literal, get_args

from lightning import Callback, LightningModule, Trainer

from hgrn2 import ConfigError, HGRN2Backbone

CompileMode = Literal["auto", "off", "block", "model"]


class Compile(Callback):
    """Compiles the model in place before it runs: keys of checkpoints stay as they are.

    Args:
        mode: block (each block of the backbone as one whole graph that all blocks share), model (all of the model as
            one graph), off, or auto: block on CUDA, off elsewhere.
    """

    def __init__(self, mode: CompileMode = "auto") -> None:
        if mode not in get_args(CompileMode):
            raise ConfigError(f"compile={mode}: must be one of {', '.join(get_args(CompileMode))}")
        self.mode = mode

    def resolved(self, device: str) -> str:
        """What `mode` means on a type of device."""
        if self.mode != "auto":
            return self.mode
        return "block" if device == "cuda" else "off"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        mode = self.resolved(trainer.strategy.root_device.type)
        # Advice of inductor's: fp32 products stay fp32 (trainer.precision says what is wanted).
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", module=r"torch\._inductor")
        if mode == "model":
            pl_module.model.compile()
        elif mode == "block":
            for module in pl_module.modules():
                if isinstance(module, HGRN2Backbone):
                    module.compile_blocks()
