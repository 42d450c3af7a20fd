"""Fine-tuning: LoRA against gradients in coordinates, as many trained numbers in both.

Both adapt the same kernels of the same pretrained network and hold everything else,
but for a new head, which both train whole. LoRA trains ``A`` (``d x r``) and ``B``
(``r x m``) beside each kernel, `dsbp_optax` the coordinates ``S`` (``k x m``) of an
update ``V S`` in the basis ``V`` of the kernel's inputs, merged after every step. Ranks
are such that the trained numbers are as near as whole ranks allow; one more contender
has the largest rank at which the state is no larger than LoRA's. Fine-tuning of
everything is the reference, by `optax.adamw` and by `projected_muon`.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import optax
import qwix

import dsbp_optax
from benchmarks import kernels
from benchmarks.campaign import Lane
from benchmarks.data import Data
from benchmarks.optimizers import CONTENDERS, OURS, Contender, projected_muon
from benchmarks.train import Program, build
from benchmarks.workloads import Params, Workload

#: Where the records lie, unless told otherwise.
RESULTS = Path(__file__).parent / "results" / "finetune"

#: What ours are held against, and the reference that trains everything.
PEER, WHOLE = "lora", "adamw"

#: Of ours: with as many trained numbers as LoRA, and with as much optimizer state.
ALIKE, WIDE = ("projected_adamw", "projected_muon"), "projected_muon_wide"

#: Of ours: everything, from whole gradients, with its residual.
OURS_WHOLE = "projected_muon_whole"

#: Of LoRA: weight of the adapters over their rank.
SCALE = 2.0

#: What LoRA calls its parameters.
_ADAPTERS = r"_lora_[ab]$"

Factory = Callable[..., optax.GradientTransformation]


@dataclass(frozen=True)
class Adaptation(Workload):
    """A workload that starts from pretrained weights and holds most of them.

    Attributes:
      trained: pattern of the paths of parameters that are trained.
    """

    trained: str = ""

    def loss(self, params: Params, batch: Any) -> jax.Array:
        """Mean cross entropy; what is held has no gradient."""
        held = jax.tree.map(
            lambda leaf, mine: leaf if mine else jax.lax.stop_gradient(leaf),
            params,
            chosen(params, self.trained),
        )
        return super().loss(held, batch)


def adapted(base: Workload, **changes: Any) -> Adaptation:
    """A workload as one that is fine-tuned; without changes all of it is trained."""
    held = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
    return Adaptation(**{**held, **changes})


def chosen(tree: Params, pattern: str) -> Params:
    """For each parameter, or gradient of one, whether `pattern` occurs in its path."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, _: re.search(pattern, kernels.path_of(keys)) is not None,
        tree,
        is_leaf=lambda part: isinstance(part, dsbp_optax.Coordinates),
    )


def holding(factory: Factory, trained: str) -> Factory:
    """The same optimizer for what is trained; the rest gets no state and no update."""

    @functools.wraps(factory)
    def make(
        learning_rate: optax.ScalarOrSchedule, **settings: Any
    ) -> optax.GradientTransformationExtraArgs:
        return optax.partition(
            {True: factory(learning_rate, **settings), False: optax.set_to_zero()},
            lambda tree: chosen(tree, trained),
        )

    return make


def projecting(factory: Factory, pattern: str) -> Factory:
    """The same optimizer; what it projects are the kernels of a pattern, no others."""

    @functools.wraps(factory)
    def make(
        learning_rate: optax.ScalarOrSchedule, rank: int, **settings: Any
    ) -> optax.GradientTransformation:
        def rank_of(path: str, shape: tuple[int, ...]) -> int | None:
            del shape
            return rank if re.search(pattern, path) else None

        return factory(learning_rate, rank=rank_of, **settings)

    return make


def with_lora(model: nn.Module, modules: str, rank: int) -> nn.Module:
    """The model with adapters beside the kernels of some modules, by qwix.

    Args:
      model: what is adapted; its own parameters keep their paths.
      modules: pattern of the whole paths of modules.
      rank: r.
    """
    provider = qwix.LoraProvider(module_path=modules, rank=rank, alpha=SCALE * rank)
    return qwix.apply_lora_to_model(model, provider)


@dataclass(frozen=True)
class Task:
    """One network to fine-tune.

    Attributes:
      workload: the task; its model and what is trained are those of full fine-tuning.
      modules: pattern of the whole paths of the modules whose kernels are adapted.
      head: pattern of what is trained whole beside them; None for nothing.
      lora_rank: r.
      rank: k, so that both train as many numbers.
      wide_rank: k, the largest so that `projected_muon` has no more state than LoRA.
      grids: contender -> learning rates tried first.
      load: ``(data folder, weights=file) -> data``, pretrained weights among it.
      pretrained: whether that file is made by `benchmarks.pretraining`.
    """

    workload: Adaptation
    modules: str
    head: str | None
    lora_rank: int
    rank: int
    wide_rank: int
    grids: Mapping[str, Sequence[float]]
    load: Callable[..., Data]
    pretrained: bool = False

    @property
    def name(self) -> str:
        """As typed on the command line."""
        return self.workload.name

    def with_weights(self, weights: Path) -> Adaptation:
        """The workload of full fine-tuning, its data read with those weights."""
        load = functools.partial(self.load, weights=weights)
        return dataclasses.replace(self.workload, load=load)

    def trained(self, inside: str) -> str:
        """Pattern of the trained paths, `inside` those of the adapted modules."""
        return inside if self.head is None else f"{inside}|{self.head}"


def entrants(task: Task) -> dict[str, tuple[Adaptation, Contender]]:
    """Contender -> what it trains, and how."""
    return {
        PEER: _lora(task),
        **{name: _coordinates(task, name, name, task.rank) for name in ALIKE},
        WIDE: _coordinates(task, WIDE, "projected_muon", task.wide_rank),
        OURS_WHOLE: _everything(
            task, OURS_WHOLE, "projected_muon", projected_muon, **OURS
        ),
        WHOLE: _everything(task, WHOLE, "adamw", optax.adamw),
    }


def _lora(task: Task) -> tuple[Adaptation, Contender]:
    trained = task.trained(_ADAPTERS)
    workload = dataclasses.replace(
        task.workload,
        model=with_lora(task.workload.model, task.modules, task.lora_rank),
        trained=trained,
    )
    summary = f"LoRA of qwix, rank {task.lora_rank}, optax.adamw"
    factory = holding(optax.adamw, trained)
    return workload, _contender(task, PEER, summary, factory)


def _coordinates(
    task: Task, name: str, rule: str, rank: int
) -> tuple[Adaptation, Contender]:
    factory = CONTENDERS[rule].factory
    kernel = f"^{task.modules}/kernel$"
    trained = task.trained(kernel)
    workload = dataclasses.replace(task.workload, trained=trained)
    contender = _contender(
        task,
        name,
        f"coordinates in {rank} directions, {rule}",
        holding(projecting(factory, kernel), trained),
        settings={"rank": rank, "residual": None},
        warm_start=True,
        coordinates=True,
        **OURS,
    )
    return workload, contender


def _everything(
    task: Task, name: str, rule: str, factory: Factory, **rest: Any
) -> tuple[Adaptation, Contender]:
    summary = f"everything, {rule}"
    return task.workload, _contender(task, name, summary, factory, **rest)


def _contender(
    task: Task, name: str, summary: str, factory: Factory, **rest: Any
) -> Contender:
    grid = tuple(task.grids[name])
    return Contender(name, summary, factory, grid, grid[len(grid) // 2], **rest)


def trained_numbers(workload: Adaptation, contender: Contender) -> int:
    """How many numbers a step decides on: coordinates where there are such."""
    params = jax.eval_shape(lambda: workload.init(0))

    def decided(params: Params) -> Any:
        if not contender.coordinates:
            return params
        return dsbp_optax.project_gradients(params, contender.build(0.0).init(params))

    sizes = jax.tree.map(
        lambda mine, part: mine * sum(leaf.size for leaf in jax.tree.leaves(part)),
        chosen(params, workload.trained),
        jax.eval_shape(decided, params),
    )
    return sum(jax.tree.leaves(sizes))


def build_counted(workload: Adaptation, contender: Contender) -> Program:
    """`benchmarks.train.build`; the figures tell the trained numbers too."""
    program = build(workload, contender)
    program.figures["trained_numbers"] = trained_numbers(workload, contender)
    return program


def lanes(
    task: Task, out: Path, weights: Path, seeds: int = 0, names: Sequence[str] = ()
) -> list[Lane]:
    """Everything that is run: tuning, then final runs.

    Args:
      task: what to fine-tune.
      out: folder of the records.
      weights: file of pretrained weights, where the task takes such.
      seeds: number of final runs of each contender.
      names: of the contenders; all without names.
    """
    task = dataclasses.replace(task, workload=task.with_weights(weights))
    return [
        Lane(out, workload, contender, seeds)
        for name, (workload, contender) in entrants(task).items()
        if not names or name in names
    ]
