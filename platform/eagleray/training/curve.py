"""The learning curve as a picture."""

from __future__ import annotations

import io


def plot_learning_curve(history: list[dict[str, float]], title: str) -> bytes:
    """Draw loss and top-1 by epoch; `history` is the metrics of each epoch. Returns PNG bytes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [metrics["epoch"] + 1 for metrics in history]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for split, color in (("train", "#8aa4c8"), ("val", "#c1440e")):
        left.plot(epochs, [metrics[f"{split}_loss"] for metrics in history], color=color, label=split, marker=".")
        right.plot(epochs, [100 * metrics[f"{split}_top1"] for metrics in history], color=color, label=split, marker=".")
    left.set_ylabel("loss")
    right.set_ylabel("top-1 (%)")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False, loc="lower right")
    figure.suptitle(title)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()
