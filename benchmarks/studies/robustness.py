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

from benchmarks.tasks.base import DataError, Params, Samples, Workload

#: Radii of the attacks in the largest norm, pixels lying in [0, 1].
RADII = (2 / 255, 4 / 255, 8 / 255)
PGD_STEPS = 40
#: Test samples that are attacked, and corrupted.
ATTACKED, CORRUPTED = 256, 500
#: Of 19, those that run with current NumPy and scikit-image; severity is out of 5.
CORRUPTIONS, SEVERITY = (
    (
        *("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise"),
        *("defocus_blur", "motion_blur", "zoom_blur"),
        *("snow", "frost", "brightness", "contrast", "saturate", "spatter"),
        *("elastic_transform", "pixelate", "jpeg_compression"),
    ),
    3,
)
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
    # Foolbox refuses what rounding put outside.
    pixels = jnp.clip(jnp.asarray(workload.to_pixels(inputs), jnp.float32), 0, 1)
    labels, size = jnp.asarray(labels), workload.batch_size

    @jax.jit
    def predict(x: jax.Array) -> Any:
        return workload.model.apply({"params": params}, workload.from_pixels(x))

    model, kinds = foolbox.JAXModel(predict, bounds=(0, 1)), foolbox.attacks
    pgd = kinds.LinfProjectedGradientDescentAttack(steps=PGD_STEPS, random_start=False)
    fgsm = kinds.LinfFastGradientAttack(random_start=False)
    found = {}
    for name, attack in {"FGSM": fgsm, f"PGD-{PGD_STEPS}": pgd}.items():
        fooled = []
        for start in range(0, len(labels), size):
            part = slice(start, start + size)
            _, _, success = attack(model, pixels[part], labels[part], epsilons=RADII)
            fooled.append(np.asarray(success))
        found[name] = (1 - np.concatenate(fooled, axis=1).mean(1)).tolist()
    return found


def corrupted(workload: Workload, params: Params, samples: Samples) -> dict[str, float]:
    """Accuracy under each corruption, at `SEVERITY`."""
    corrupt = load_corruptions()
    inputs, labels = samples.take(np.arange(min(CORRUPTED, len(samples))))
    pixels = _as_bytes(np.asarray(workload.to_pixels(inputs)))
    found = {}
    for name in CORRUPTIONS:
        np.random.seed(0)
        changed = [corrupt(x, severity=SEVERITY, corruption_name=name) for x in pixels]
        cut = _cut(np.stack(changed) / 255, inputs.shape[1:])
        bent = Samples(np.asarray(workload.from_pixels(cut), np.float32), labels)
        found[name] = workload.measure(params, bent, None)
    return found


def load_corruptions() -> Callable[..., Any]:
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


def _as_bytes(pixels: np.ndarray) -> np.ndarray:
    """``(n, h, w, 3)`` bytes, h and w at least `_SIDE`."""
    _, height, width, channels = pixels.shape
    edges = [((max(_SIDE - n, 0) + 1) // 2,) * 2 for n in (height, width)]
    padded = np.pad(pixels, ((0, 0), *edges, (0, 0)), mode="edge")
    if channels == 1:
        padded = np.repeat(padded, 3, axis=-1)
    return (255 * padded.clip(0, 1)).round().astype(np.uint8)


def _cut(images: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The middle of images, of the shape that they had."""
    height, width, channels = shape
    top, left = (images.shape[1] - height) // 2, (images.shape[2] - width) // 2
    cut = images[:, top : top + height, left : left + width]
    return cut.mean(-1, keepdims=True) if channels == 1 else cut
