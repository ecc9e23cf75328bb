"""Recognise handwritten digits: sweep, pick the best, refit, draw the confusion matrix.

Plain Python and scikit-learn. Nothing here knows where it runs: the same four functions are
called by the tests, by a notebook, or as nodes of Airflow, Prefect and Dagster on GPU machines.
Arguments and results are JSON values, and heavy imports are inside the functions, so that an
orchestrator can read this file without scikit-learn.

The data is scikit-learn's copy of the UCI digits test set: 1797 images of 8 x 8 pixels by 13 writers,
in whose order they stand. A shuffled split tests on hands that it has trained on and reports 0.99;
everything here splits in order, so that a score (0.97) says how well a *new* writer is read.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

HELD_OUT = 360  # the last fifth of the images: never seen by the sweep
FOLDS = 5


def sweep_settings() -> list[dict[str, Any]]:
    """Return the nine settings to try: three penalties C by three kernel widths gamma."""
    return [{"C": c, "gamma": gamma} for c in (0.1, 1.0, 10.0) for gamma in (0.0001, 0.001, 0.01)]


def evaluate(setting: dict[str, Any]) -> dict[str, Any]:
    """Cross-validate one setting on the training images.

    Returns `setting`, the mean `accuracy`, the accuracy of every fold and the `seconds` it took.
    """
    from sklearn.model_selection import KFold, cross_val_score

    images, digits = _split()[0]
    started = time.perf_counter()
    folds = cross_val_score(_classifier(setting), images, digits, cv=KFold(FOLDS))
    seconds = time.perf_counter() - started
    accuracy = round(float(folds.mean()), 6)
    name = f"C={setting['C']:g} gamma={setting['gamma']:g}"
    print(f"{name}: accuracy {accuracy:.4f} in {seconds:.2f} s", flush=True)
    return {
        "setting": setting,
        "accuracy": accuracy,
        "fold_accuracies": [round(float(fold), 6) for fold in folds],
        "seconds": round(seconds, 3),
    }


def pick_best(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the result with the highest accuracy, whatever the order in which results arrive.

    Of equals, the softest model (smallest C, then smallest gamma) wins.
    Raises ValueError when there is nothing to choose from.
    """
    if not results:
        raise ValueError("nothing to choose from: the sweep has no results")
    return min(results, key=lambda r: (-r["accuracy"], r["setting"]["C"], r["setting"]["gamma"]))


def refit(best: dict[str, Any], picture: str) -> dict[str, Any]:
    """Train the best setting on all training images, test it on the held-out ones, draw the outcome.

    `picture` is where the PNG goes; missing folders are made.
    Returns `setting`, `cv_accuracy`, `test_accuracy`, `errors`, `confusion` (row = written digit,
    column = digit read) and the absolute path of the `picture`. The same `best` gives the same numbers.
    """
    from sklearn.metrics import confusion_matrix

    (images, digits), (test_images, test_digits) = _split()
    read = _classifier(best["setting"]).fit(images, digits).predict(test_images)
    confusion = confusion_matrix(test_digits, read).tolist()
    wrong = [
        (image.reshape(8, 8), int(truth), int(guess))
        for image, truth, guess in zip(test_images, test_digits, read, strict=True)
        if truth != guess
    ]
    accuracy = round(1 - len(wrong) / len(test_digits), 6)
    path = _draw(confusion, wrong, _caption(best["setting"], accuracy, len(test_digits)), Path(picture))
    print(f"{accuracy:.4f} of {len(test_digits)} held-out digits read right; picture: {path}", flush=True)
    return {
        "setting": best["setting"],
        "cv_accuracy": best["accuracy"],
        "test_accuracy": accuracy,
        "errors": len(wrong),
        "confusion": confusion,
        "picture": str(path),
    }


def _split() -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """((images, digits) to train on, (images, digits) to test on), in the data's own order."""
    from sklearn.datasets import load_digits

    images, digits = load_digits(return_X_y=True)
    return (images[:-HELD_OUT], digits[:-HELD_OUT]), (images[-HELD_OUT:], digits[-HELD_OUT:])


def _classifier(setting: dict[str, Any]) -> Any:
    from sklearn.svm import SVC

    return SVC(C=setting["C"], gamma=setting["gamma"])


def _caption(setting: dict[str, Any], accuracy: float, count: int) -> str:
    model = f"SVM, C = {setting['C']:g}, gamma = {setting['gamma']:g}"
    return f"{accuracy:.1%} of {count} held-out digits read right  ({model})"


def _draw(confusion: list[list[int]], wrong: list[tuple[Any, int, int]], caption: str, path: Path) -> Path:
    """Write the confusion matrix, and beside it the images that were misread, as a PNG."""
    from matplotlib.figure import Figure  # not pyplot: no display, no state shared between calls

    figure = Figure(figsize=(11, 6), dpi=120, layout="constrained")
    figure.suptitle(caption, fontsize=13)
    left, right = figure.subfigures(1, 2, width_ratios=(1.25, 1))
    _draw_matrix(left.subplots(), confusion)
    _draw_mistakes(right, wrong)
    path = path.expanduser().absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    figure.savefig(unfinished, format="png", metadata={"Software": None})
    unfinished.replace(path)  # a reader never sees half a picture
    return path


def _draw_matrix(axes: Any, confusion: list[list[int]]) -> None:
    """Shade each row by its share, write the counts that are not zero."""
    shares = [[count / max(1, sum(row)) for count in row] for row in confusion]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for written, row in enumerate(confusion):
        for read, count in enumerate(row):
            if count:
                colour = "white" if shares[written][read] > 0.5 else "#b3261e"
                axes.text(read, written, count, ha="center", va="center", color=colour, fontsize=11)
    axes.set(xticks=range(10), yticks=range(10), xlabel="read as", ylabel="written digit")
    axes.set_xticks([edge - 0.5 for edge in range(1, 10)], minor=True)
    axes.set_yticks([edge - 0.5 for edge in range(1, 10)], minor=True)
    axes.grid(which="minor", color="#d8dee6", linewidth=0.8)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_color("#d8dee6")


def _draw_mistakes(figure: Any, wrong: list[tuple[Any, int, int]], columns: int = 4, rows: int = 4) -> None:
    """Show up to `columns * rows` of the misread images, each with what was written and what was read."""
    shown = wrong[: columns * rows]
    more = f", {len(shown)} of them shown" if len(shown) < len(wrong) else ""
    figure.suptitle(f"{len(wrong)} misread{more}", fontsize=11)
    for axes in figure.subplots(rows, columns).flat:
        axes.set_axis_off()
    for axes, (image, truth, guess) in zip(figure.axes, shown, strict=False):
        axes.imshow(image, cmap="gray_r", vmin=0, vmax=16)
        axes.set_title(f"{truth} read as {guess}", fontsize=9, color="#b3261e")
