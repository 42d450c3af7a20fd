"""What one spectral projection is told."""

from typing import Any, NamedTuple

import optax

from dsbp_optax._eigenbasis import Refresh
from dsbp_optax._filter import Filter
from dsbp_optax._orthogonal import Direction
from dsbp_optax._plan import Choices
from dsbp_optax._residual import Residual
from dsbp_optax._transport import Table


class Rule(NamedTuple):
    """Everything that one projection is told; see `scale_by_spectral_projection`."""

    inner: optax.GradientTransformationExtraArgs
    fallback: optax.GradientTransformationExtraArgs | None
    choices: Choices
    refresh: Refresh
    spectral_filter: Filter | None
    residual: Residual
    direction: Direction | None
    sharpness: optax.ScalarOrSchedule
    project_cold: bool
    transport: Table
    moment_dtype: Any
    basis_dtype: Any
    statistics_in_state: bool
