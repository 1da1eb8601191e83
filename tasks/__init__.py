"""The tasks by domain (`TASKS`), and the command line's runs from Python (`run`)."""


def __getattr__(name: str):
    """`TASKS`: a plain dict, domain -> (LightningModule, LightningDataModule). `run`: see tasks/cli/python.py.

    Made when it is first asked for, so that the command line answers a mistyped task before the slow imports.
    """
    if name == "run":
        from tasks.cli.python import run

        return run
    if name != "TASKS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tasks.lm.data import LMData
    from tasks.lm.module import LMTask
    from tasks.lra.data import LRAData
    from tasks.lra.module import LRATask
    from tasks.vision.data import VisionData
    from tasks.vision.module import VisionTask

    return {
        "lm": (LMTask, LMData),
        "vision": (VisionTask, VisionData),
        "lra": (LRATask, LRAData),
    }
