"""Which classes are taken for which: the validation of a run's best epoch, as a file and as a picture."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eagleray.training.metrics import class_rates

CONFUSION_NAME = "confusion.json"
PICTURE_NAME = "confusion.png"

MAX_DRAWN_CLASSES = 50


def confusion_files(epoch: int, val_top1: float, classes: list[str], confusion: NDArray[np.int64]) -> dict[str, bytes]:
    """Return `confusion.json` of an epoch and, up to 50 classes, `confusion.png`.

    Args:
        confusion: int64 [C, C], true classes down and predicted ones across.
    """
    files = {CONFUSION_NAME: json.dumps(_document(epoch, val_top1, classes, confusion)).encode()}
    if len(classes) <= MAX_DRAWN_CLASSES:
        files[PICTURE_NAME] = plot_confusion(classes, confusion)
    return files


def plot_confusion(classes: list[str], confusion: NDArray[np.int64]) -> bytes:
    """Draw the share of each true class (a row) that was taken for each class (a column). Returns PNG bytes."""
    from matplotlib.figure import Figure

    side = 2 + 0.3 * len(classes)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    for row, column in zip(*np.nonzero(confusion), strict=True):
        is_dark = confusion[row, column] > confusion[row].sum() / 2
        axes.text(column, row, str(confusion[row, column]), ha="center", va="center", fontsize=6, color="white" if is_dark else "black")
    axes.set_xticks(range(len(classes)), classes, rotation=90)
    axes.set_yticks(range(len(classes)), classes)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()


def _document(epoch: int, val_top1: float, classes: list[str], confusion: NDArray[np.int64]) -> dict[str, Any]:
    recall, precision = ([None if math.isnan(rate) else rate for rate in rates.tolist()] for rates in class_rates(confusion))
    return {
        "epoch": epoch,
        "val_top1": val_top1,
        "classes": classes,
        "recall": recall,
        "precision": precision,
        "matrix": confusion.tolist(),
    }
