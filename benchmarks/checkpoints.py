"""The last few checkpoints of a training run, by orbax; each is checked when read.

orbax writes into a folder of another name and renames it when all is there, so that a
process that dies leaves no half checkpoint under a checkpoint's name. What happens to
the files later (a disk that loses the end of one) the digests betray.
"""

import hashlib
import logging
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import orbax.checkpoint as ocp

import dsbp_optax
from benchmarks.data import DataError
from benchmarks.kernels import path_of

_ARRAYS, _NOTES, _DIGESTS = "arrays", "notes", "digests"


class Saved(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      step: steps taken before it.
      arrays: parameters and optimizer state.
      notes: everything else, as JSON has it.
    """

    step: int
    arrays: Any
    notes: dict[str, Any]


class Checkpoints:
    """The checkpoints in one folder; a context that closes them.

    Args:
      folder: theirs alone; made if there is none.
      keep: how many are kept.
    """

    def __init__(self, folder: Path, keep: int = 3) -> None:
        logging.getLogger("absl").setLevel(logging.ERROR)
        self.folder, self._keep = folder.resolve(), keep
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep,
            create=True,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=False,
        )
        handlers = {
            _ARRAYS: ocp.StandardCheckpointHandler(),
            _NOTES: ocp.JsonCheckpointHandler(),
        }
        return ocp.CheckpointManager(
            self.folder, options=options, item_handlers=handlers
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:  # Else another process may be gone, and wait for nobody.
            self._manager.close()

    def steps(self) -> list[int]:
        """Of the checkpoints that there are, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, saved: Saved) -> bool:
        """Write one; where that fails, warn, and keep what there was.

        Returns:
          Whether it was written.
        """
        notes = {**saved.notes, _DIGESTS: digests(saved.arrays)}
        what = {
            _ARRAYS: ocp.args.StandardSave(saved.arrays),
            _NOTES: ocp.args.JsonSave(notes),
        }
        try:
            return bool(self._manager.save(saved.step, args=ocp.args.Composite(**what)))
        except (OSError, ValueError) as error:  # A full disk is either of them.
            if jax.process_count() > 1:
                raise
            warnings.warn(
                f"{self.folder / str(saved.step)}: not written ({_first_line(error)}); "
                f"the last checkpoint is still {_named(self.steps())}.",
                stacklevel=2,
            )
            self._manager = self._open()
            return False

    def restore(self, like: Any) -> Saved | None:
        """The newest that is whole; a warning names those that are not, and go.

        Args:
          like: the tree of arrays to restore into, or its shapes with shardings.

        Raises:
          DataError: for a checkpoint of another model or optimizer.
        """
        for step in reversed(self.steps()):
            try:
                return self._read(step, like)
            except DataError:
                raise
            except Exception as error:  # Whatever a torn file makes a reader say.
                warnings.warn(
                    f"{self.folder / str(step)}: torn ({_first_line(error)}); the one "
                    "before it is used.",
                    stacklevel=2,
                )
                self._manager.delete(step)
        return None

    def _read(self, step: int, like: Any) -> Saved:
        found = self._manager.item_metadata(step)[_ARRAYS]
        tree = getattr(found, "tree", found)
        if not jax.tree.leaves(tree):
            raise ValueError("it lists no arrays")
        try:
            dsbp_optax.check_checkpoint(tree, like)
        except ValueError as error:
            raise DataError(f"{self.folder / str(step)}: {error}") from error
        read = self._manager.restore(
            step,
            args=ocp.args.Composite(
                **{
                    _ARRAYS: ocp.args.StandardRestore(like),
                    _NOTES: ocp.args.JsonRestore(),
                }
            ),
        )
        notes = dict(read[_NOTES])
        written, now = notes.pop(_DIGESTS), digests(read[_ARRAYS])
        wrong = [path for path in written if written[path] != now[path]]
        if wrong:
            raise ValueError(f"{len(wrong)} arrays changed, '{wrong[0]}' among them")
        return Saved(step, read[_ARRAYS], notes)


def digests(arrays: Any) -> dict[str, str]:
    """Path -> hash of shape, dtype and every bit of an array."""
    found = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        array = np.asarray(leaf)
        head = f"{array.dtype}{array.shape}".encode()
        found[path_of(keys)] = hashlib.sha256(head + array.tobytes()).hexdigest()
    return found


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:200]


def _named(steps: list[int]) -> str:
    return f"that of step {steps[-1]}" if steps else "none"
