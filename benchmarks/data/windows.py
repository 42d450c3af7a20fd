"""Windows of tokens, and the tokens after each."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.data.files import damaged
from benchmarks.data.split import Data, Samples

_WINDOWS, _WINDOW_SEED = 960, 1234


def cut_windows(path: Path, parts: Sequence[np.ndarray], context: int) -> Data:
    """Training windows that start anywhere; 960 fixed ones to tune and to test.

    Args:
      path: where the tokens come from, for the message.
      parts: tokens ``(n,)``, int32, to train on, to tune on, to test on.
      context: tokens a window.

    Raises:
      DataError: when a part is shorter than two windows.
    """
    if min(map(len, parts)) < context + 2:
        total = sum(map(len, parts))
        raise damaged(path, f"{total} characters", f"at least {20 * (context + 2)}")
    train, validation, test = (_windows(part, context) for part in parts)
    return Data(train, _fixed(validation), _fixed(test))


def _windows(tokens: np.ndarray, context: int) -> Samples:
    views = np.lib.stride_tricks.sliding_window_view(tokens, context + 1)[:-1]
    return Samples(views[:, :-1], views[:, 1:])


def _fixed(samples: Samples) -> Samples:
    rng = np.random.default_rng(_WINDOW_SEED)
    return Samples(*samples.take(rng.integers(0, len(samples), _WINDOWS)))
