"""The tasks by domain: (LightningModule, LightningDataModule)."""

from tasks.lm.data import LMData
from tasks.lm.module import LMTask
from tasks.lra.data import LRAData
from tasks.lra.module import LRATask
from tasks.vision.data import VisionData
from tasks.vision.module import VisionTask

TASKS = {
    "lm": (LMTask, LMData),
    "vision": (VisionTask, VisionData),
    "lra": (LRATask, LRAData),
}
