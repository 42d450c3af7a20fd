"""Accuracy under attack and under corruption: what a flat minimum might buy.

Attacks by foolbox, corruptions by imagecorruptions. Its corruptions are made for
larger pictures than those here: read differences between optimizers, not levels.
"""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.data import DataError, Samples
from benchmarks.workloads import Params, Workload

#: Radii of the attacks in the largest norm, pixels lying in [0, 1].
RADII = (2 / 255, 4 / 255, 8 / 255)
PGD_STEPS = 40
#: Test samples that are attacked, and corrupted.
ATTACKED, CORRUPTED = 256, 500
#: Of 19, those that run with current NumPy and scikit-image.
CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise"),
    *("defocus_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "brightness", "contrast", "saturate", "spatter"),
    *("elastic_transform", "pixelate", "jpeg_compression"),
)
SEVERITY = 3
#: Least side that imagecorruptions takes.
_SIDE = 32


def attacked(
    workload: Workload, params: Params, samples: Samples
) -> dict[str, list[float]]:
    """Accuracy under each attack, one number a radius of `RADII`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Of SciPy, on import.
        import foolbox

    inputs, labels = samples.take(np.arange(min(ATTACKED, len(samples))))
    pixels = jnp.asarray(workload.to_pixels(inputs), jnp.float32)
    pixels = jnp.clip(pixels, 0, 1)  # Foolbox refuses what rounding put outside.
    labels = jnp.asarray(labels)
    predict = jax.jit(
        lambda x: workload.model.apply({"params": params}, workload.from_pixels(x))
    )
    model = foolbox.JAXModel(predict, bounds=(0, 1))
    attacks = {
        "FGSM": foolbox.attacks.LinfFastGradientAttack(random_start=False),
        f"PGD-{PGD_STEPS}": foolbox.attacks.LinfProjectedGradientDescentAttack(
            steps=PGD_STEPS, random_start=False
        ),
    }
    size = workload.batch_size
    found = {}
    for name, attack in attacks.items():
        fooled = []
        for start in range(0, len(labels), size):
            part = slice(start, start + size)
            _, _, success = attack(model, pixels[part], labels[part], epsilons=RADII)
            fooled.append(np.asarray(success))
        found[name] = (1 - np.concatenate(fooled, axis=1).mean(1)).tolist()
    return found


def corrupted(workload: Workload, params: Params, samples: Samples) -> dict[str, float]:
    """Accuracy under each corruption, at `SEVERITY` of 5."""
    corrupt = load_corruptions()
    inputs, labels = samples.take(np.arange(min(CORRUPTED, len(samples))))
    pixels = _as_bytes(np.asarray(workload.to_pixels(inputs)))
    found = {}
    for name in CORRUPTIONS:
        np.random.seed(0)
        changed = np.stack(
            [_corrupt(corrupt, image, name, inputs.shape[1:]) for image in pixels]
        )
        bent = Samples(np.asarray(workload.from_pixels(changed), np.float32), labels)
        found[name] = workload.measure(params, bent, None)
    return found


def load_corruptions() -> Callable[..., Any]:
    """``imagecorruptions.corrupt``.

    Raises:
      DataError: where OpenCV, which it needs, finds no libGL.
    """
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


def _as_bytes(pixels: np.ndarray) -> np.ndarray:
    """``(n, h, w, 3)`` bytes, h and w at least `_SIDE`."""
    _, height, width, channels = pixels.shape
    edges = [((max(_SIDE - n, 0) + 1) // 2,) * 2 for n in (height, width)]
    padded = np.pad(pixels, ((0, 0), *edges, (0, 0)), mode="edge")
    if channels == 1:
        padded = np.repeat(padded, 3, axis=-1)
    return (255 * padded.clip(0, 1)).round().astype(np.uint8)


def _corrupt(
    corrupt: Callable[..., Any], image: np.ndarray, name: str, shape: tuple[int, ...]
) -> np.ndarray:
    """One image, corrupted and cut back to `shape`, pixels in [0, 1]."""
    bent = np.asarray(corrupt(image, severity=SEVERITY, corruption_name=name)) / 255
    height, width, channels = shape
    top, left = (
        (n - m) // 2 for n, m in zip(bent.shape, (height, width), strict=False)
    )
    cut = bent[top : top + height, left : left + width]
    return cut.mean(-1, keepdims=True) if channels == 1 else cut
