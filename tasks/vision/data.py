"""Images with one label each. The demo is scikit-learn's digits; `imagefolder` reads a person's own.

A data set of images gives `image` fp32 `[in_chans, img_size, img_size]` and `label`; `class_names` are for TensorBoard.
"""

from tasks.data import TaskData
from tasks.vision.digits import Digits
from tasks.vision.imagefolder import ImageFolder


class VisionData(TaskData):
    """Data sets of images by name: digits (scikit-learn's), imagefolder (data.path holds a folder for each class)."""

    datasets = {"digits": Digits, "imagefolder": ImageFolder}

    def class_names(self, num_classes: int) -> list[str]:
        """The labels' names, or numbers where the data set does not name them."""
        return getattr(self.split("val"), "class_names", None) or [str(i) for i in range(num_classes)]
