"""What becomes of the update of a kernel as a matrix."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

from dsbp_optax.linalg.newton_schulz import newton_schulz
from dsbp_optax.linalg.types import Array, Direction

Scale: TypeAlias = Literal["muon", "adam"]

#: RMS of a typical update of Adam.
_ADAM_RMS = 0.2


def orthogonalize(
    steps: int = 5, scale: Scale = "muon", dtype: Any = None
) -> Direction:
    """The update of each kernel made semi-orthogonal, as Muon does.

    Args:
      steps: of the Newton-Schulz iteration.
      scale: "muon" multiplies by ``sqrt(max(1, fan out / fan in))``, so that the
        learning rate is that of `optax.contrib.muon`; "adam" gives each entry an RMS
        of 0.2, so that it is that of `optax.adamw`.
      dtype: of the iteration, such as "bfloat16"; None is float32 at least.

    Returns:
      ``(matrix, fan in, fan out) -> matrix``, for
      ``scale_by_spectral_projection(direction=...)``.

    Raises:
      ValueError: for an unknown scale, or steps below 1.

    Cost: ``steps`` times ``2 s^2 (2 l + s)`` FLOPs for an ``s x l`` matrix, s the
    smaller side; no state.

    Reference: Jordan et al., Muon (2024); the RMS of Adam: Liu et al., 2502.16982.

    Example:
      >>> import optax, dsbp_optax
      >>> tx = dsbp_optax.scale_by_spectral_projection(
      ...     optax.trace(0.95), residual=dsbp_optax.scale_residual(1.0),
      ...     direction=dsbp_optax.orthogonalize())
    """
    if scale not in ("muon", "adam"):
        raise ValueError(f"scale: got {scale!r}, expected 'muon' or 'adam'.")
    if steps < 1:
        raise ValueError(f"steps: got {steps}, expected at least 1.")

    def direction(matrix: Array, fan_in: int, fan_out: int) -> Array:
        factor = math.sqrt(max(1.0, fan_out / fan_in))
        if scale == "adam":
            factor = _ADAM_RMS * math.sqrt(max(fan_in, fan_out))
        return factor * newton_schulz(matrix, steps, dtype)

    return direction
