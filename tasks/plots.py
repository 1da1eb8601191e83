"""Figures and text for TensorBoard; drawn with matplotlib's object interface (no global state, no display)."""

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

RIGHT, WRONG = "#1a7f37", "#cf222e"


def printable(text: str) -> str:
    """Text that can be written as UTF-8: lone surrogates, the bytes of a file name that is none, become escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def image_grid(images: Tensor, captions: list[tuple[str, bool]], columns: int = 6) -> Figure:
    """Images `[B, C, Y, X]` with captions, green where right and red where wrong; each image is scaled to its range."""
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(0.95 * columns, 1.25 * rows), dpi=110, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, image, (caption, right) in zip(axes, images.numpy(), captions, strict=False):
        image = image.transpose(1, 2, 0)
        image = (image - image.min()) / max(np.ptp(image), 1e-6)
        axis.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray_r")
        color = RIGHT if right else WRONG  # a class may be called $x^
        axis.set_title(printable(caption), fontsize=11, color=color, pad=3, parse_math=False)
    return figure


def horizon_map(half_life: np.ndarray) -> Figure:
    """Median memory horizon per layer and head, in tokens: half_life `[L, H]`."""
    layers, heads = half_life.shape
    # small, with large type: TensorBoard shows a card 300 pixels wide
    figure = Figure(figsize=(min(2.4 + 0.45 * heads, 14), 1.3 + 0.4 * layers), dpi=100, layout="constrained")
    axis = figure.subplots()
    low, high = 0.1, max(1e4, float(half_life.max()))
    picture = axis.imshow(half_life.clip(low, high), aspect="auto", cmap="viridis", norm=LogNorm(low, high))
    axis.set(xlabel="head", ylabel="layer", title="median half-life (tokens)")
    axis.set_xticks(range(0, heads, max(1, heads // 16)))
    axis.set_yticks(range(layers))
    if heads <= 16:
        for (layer, head), value in np.ndenumerate(half_life):
            dark = np.log(value.clip(low, high) / low) < 0.55 * np.log(high / low)
            axis.text(head, layer, f"{value:.3g}", ha="center", va="center", fontsize=10, color="w" if dark else "k")
    figure.colorbar(picture, ax=axis)
    return figure
