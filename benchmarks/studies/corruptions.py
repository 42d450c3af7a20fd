"""Accuracy on corrupted pictures, by imagecorruptions: a look of the study of minima.

Its corruptions are made for larger pictures than those here: read differences between
optimizers, not levels.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.tasks.base import DataError, Params, Samples, Workload

#: Of 19, those that run with current NumPy and scikit-image; severity is out of 5.
KINDS, SEVERITY = (
    (
        *("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise"),
        *("defocus_blur", "motion_blur", "zoom_blur"),
        *("snow", "frost", "brightness", "contrast", "saturate", "spatter"),
        *("elastic_transform", "pixelate", "jpeg_compression"),
    ),
    3,
)
#: Test samples that are corrupted, and the least side that imagecorruptions takes.
SAMPLES, SIDE = 500, 32


def load() -> Callable[..., Any]:
    """``imagecorruptions.corrupt``; an error where OpenCV finds no libGL."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            import imagecorruptions
        except ImportError as error:
            raise DataError(
                f"imagecorruptions: {error}. Remedy: pip install imagecorruptions, and "
                "the system's libGL, which OpenCV needs (Debian: libgl1)."
            ) from error
    corrupt: Callable[..., Any] = imagecorruptions.corrupt
    return corrupt


def corrupted(workload: Workload, params: Params, samples: Samples) -> dict[str, float]:
    """Accuracy under each of `KINDS`: pictures in bytes, at least `SIDE` wide."""
    corrupt = load()
    inputs, labels = samples.take(np.arange(min(SAMPLES, len(samples))))
    _, height, width, channels = inputs.shape
    top, left = ((max(SIDE - side, 0) + 1) // 2 for side in (height, width))
    edges = (0, 0), (top, top), (left, left), (0, 3 - channels)
    pixels = np.pad(np.asarray(workload.to_pixels(inputs)), edges, mode="edge")
    drawn = (255 * pixels.clip(0, 1)).round().astype(np.uint8)
    found = {}
    for kind in KINDS:
        np.random.seed(0)
        bent = [corrupt(x, severity=SEVERITY, corruption_name=kind) for x in drawn]
        bent = np.stack(bent)[:, top : top + height, left : left + width] / 255
        if channels == 1:
            bent = bent.mean(-1, keepdims=True)
        given = np.asarray(workload.from_pixels(bent), np.float32)
        found[kind] = workload.measure(params, Samples(given, labels), None)
    return found
