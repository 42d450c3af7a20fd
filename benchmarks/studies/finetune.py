"""Fine-tuning: LoRA against gradients in coordinates, as many trained numbers in both.

Both adapt the same kernels of the same pretrained network and hold everything else,
but for a new head, which both train whole. LoRA trains ``A`` (``d x r``) and ``B``
(``r x m``) beside each kernel, `dsbp_optax` the coordinates ``S`` (``k x m``) of an
update ``V S`` in the basis ``V`` of the kernel's inputs, merged after every step. Ranks
are such that the trained numbers are as near as whole ranks allow; one more contender
has the largest rank at which the state is no larger than LoRA's. Others train
everything: plain optimizers, the recipes that take their place, and the controls of
these. What is no kernel has the rate of kernels, or one three times larger or smaller.
"""

import dataclasses
import functools
import hashlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
import typer
from flax import traverse_util

import dsbp_optax
from benchmarks import cli
from benchmarks.core import campaign, records, tune
from benchmarks.core.kernels import is_kernel, path_of
from benchmarks.core.records import RESULTS
from benchmarks.core.train import Program, build, train
from benchmarks.optimizers import CONTENDERS, OURS, Contender
from benchmarks.report import tables
from benchmarks.report.entries import Entry, campaign_entries
from benchmarks.studies.controls import keep_basis, without_statistics
from benchmarks.studies.speed import in_turns
from benchmarks.tasks import WORKLOADS
from benchmarks.tasks.base import Data, DataError, Params, Workload, reading
from benchmarks.tasks.gpt import load_sotu
from benchmarks.tasks.mail import load_mail, vectors

STUDY = "finetune"
#: What ours are held against, and the reference that trains everything.
PEER, WHOLE = "lora", "adamw"
#: Of ours: with as many trained numbers as LoRA, and with as much optimizer state.
ALIKE, WIDE = ("projected_adamw", "projected_muon"), "projected_muon_wide"
#: End of the name of a control -> settings: no metric; random directions, for good,
#: with the energies that activations have along them; no activations.
CONTROLS: Mapping[str, Any] = {
    "_none": {"exponent": 0.0},
    "_random": {"basis": dsbp_optax.Basis(solver=keep_basis)},
    "_gradient": {},
}
#: End of a name -> rate of what is no kernel, in units of the kernels' rate.
AUXILIARY: Mapping[str, float] = {"_slower_rest": 1 / 3, "_faster_rest": 3.0}
#: Of LoRA: weight of the adapters over their rank.
SCALE = 2.0

Factory = Callable[..., optax.GradientTransformation]


@dataclass(frozen=True)
class Adaptation(Workload):
    """A workload that starts from pretrained weights and holds most of them."""

    trained: str = ""  # pattern of the paths of parameters that are trained

    def loss(self, params: Params, batch: Any) -> jax.Array:
        """Mean cross entropy; what is held has no gradient."""
        held = jax.tree.map(
            lambda leaf, mine: leaf if mine else jax.lax.stop_gradient(leaf),
            params,
            chosen(params, self.trained),
        )
        return super().loss(held, batch)


def chosen(tree: Params, pattern: str) -> Params:
    """For each parameter, or gradient of one, whether `pattern` occurs in its path."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, _: re.search(pattern, path_of(keys)) is not None,
        tree,
        is_leaf=lambda part: isinstance(part, dsbp_optax.Coordinates),
    )


def holding(factory: Factory, trained: str) -> Factory:
    """The same optimizer for what is trained; the rest gets no state and no update."""

    @functools.wraps(factory)
    def make(learning_rate: optax.ScalarOrSchedule, **settings: Any) -> Any:
        return optax.partition(
            {True: factory(learning_rate, **settings), False: optax.set_to_zero()},
            lambda tree: chosen(tree, trained),
        )

    return make


def projecting(factory: Factory, pattern: str) -> Factory:
    """The same optimizer; what it projects are the kernels of a pattern, no others."""

    @functools.wraps(factory)
    def make(learning_rate: optax.ScalarOrSchedule, rank: int, **settings: Any) -> Any:
        def rank_of(path: str, shape: tuple[int, ...]) -> int | None:
            del shape
            return rank if re.search(pattern, path) else None

        return factory(learning_rate, rank=rank_of, **settings)

    return make


def with_auxiliary(factory: Factory, times: float) -> Factory:
    """The same optimizer; what is no kernel moves so many times as fast."""
    if times == 1:
        return factory

    @functools.wraps(factory)
    def make(learning_rate: optax.ScalarOrSchedule, **settings: Any) -> Any:
        tx = optax.with_extra_args_support(factory(learning_rate, **settings))
        return optax.chain(tx, optax.masked(optax.scale(times), _rest))

    return make


def _rest(tree: Params) -> Params:
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: not is_kernel(path_of(keys), leaf), tree
    )


def with_lora(model: nn.Module, modules: str, rank: int) -> nn.Module:
    """The model with adapters beside the kernels of some modules, by qwix.

    Its own parameters keep their paths.
    """
    import qwix

    provider = qwix.LoraProvider(module_path=modules, rank=rank, alpha=SCALE * rank)
    return qwix.apply_lora_to_model(model, provider)


class Start(NamedTuple):
    """Pretrained weights: what they are trained on, and their file."""

    base: Workload
    weights: Path


@dataclass(frozen=True)
class Task:
    """One network to fine-tune."""

    workload: Adaptation  # of full fine-tuning
    modules: str  # pattern of the whole paths of the modules that are adapted
    head: str | None  # pattern of what is trained whole beside them
    lora_rank: int  # r
    rank: int  # k, so that both train as many numbers
    wide_rank: int  # the largest k at which the state is no larger than LoRA's
    rates: Mapping[str, float]  # contender -> the middle one of three tried first
    start: Start | None = None  # of what `pretrain` makes

    @property
    def name(self) -> str:
        """As typed on the command line."""
        return self.workload.name

    def entrants(self) -> dict[str, tuple[Adaptation, Contender]]:
        """Contender -> what it trains, and how."""
        whole = self.workload
        adapters = self._trained(r"_lora_[ab]$")
        model = with_lora(whole.model, self.modules, self.lora_rank)
        lora = dataclasses.replace(whole, model=model, trained=adapters)
        told = f"LoRA of qwix, rank {self.lora_rank}, optax.adamw"
        return {
            PEER: (lora, self._contender(PEER, told, holding(optax.adamw, adapters))),
            **{name: self._coordinates(name, name, self.rank) for name in ALIKE},
            WIDE: self._coordinates(WIDE, "projected_muon", self.wide_rank),
            **{
                name: (whole, self._everything(name))
                for name in self.rates
                if "_whole" in name
            },
            WHOLE: (whole, self._contender(WHOLE, "everything, adamw", optax.adamw)),
        }

    def _everything(self, name: str) -> Contender:
        rule, _, changed = name.partition("_whole")
        own = CONTENDERS[rule]
        factory = with_auxiliary(own.factory, AUXILIARY.get(changed, 1.0))
        if changed == "_gradient":
            factory = without_statistics(factory)
        return self._contender(
            name,
            f"everything, {rule}{changed.replace('_', ', ')}",
            factory,
            settings={**own.settings, **CONTROLS.get(changed, {})},
            ours=own.ours,
            period=own.period,
            window=own.window,
        )

    def _trained(self, inside: str) -> str:
        return inside if self.head is None else f"{inside}|{self.head}"

    def _coordinates(
        self, name: str, rule: str, rank: int
    ) -> tuple[Adaptation, Contender]:
        kernel = f"^{self.modules}/kernel$"
        trained = self._trained(kernel)
        contender = self._contender(
            name,
            f"coordinates in {rank} directions, {rule}",
            holding(projecting(CONTENDERS[rule].factory, kernel), trained),
            settings={"rank": rank, "residual": None},
            warm_start=True,
            coordinates=True,
            **OURS,
        )
        return dataclasses.replace(self.workload, trained=trained), contender

    def _contender(
        self, name: str, summary: str, factory: Factory, **rest: Any
    ) -> Contender:
        rate = self.rates[name]
        grid = tuple(tune.shifted(rate, n) for n in (-1, 0, 1))
        return Contender(name, summary, factory, grid, rate, **rest)

    def lanes(
        self, out: Path, seeds: int = 0, names: Sequence[str] | None = None
    ) -> list[campaign.Lane]:
        """Everything that is run: tuning, then final runs."""
        return [
            campaign.Lane(out, *pair, seeds, study=STUDY, make=build_counted)
            for name, pair in self.entrants().items()
            if not names or name in names
        ]

    def entries(self, out: Path) -> list[Entry]:
        """Final runs at tuned rates."""
        contenders = [contender for _, contender in self.entrants().values()]
        return campaign_entries(self.workload, out, contenders, STUDY)


def build_counted(workload: Workload, contender: Contender) -> Program:
    """`build`; the figures tell how many numbers a step decides on."""
    program = build(workload, contender)
    params = jax.eval_shape(lambda: workload.init(0))

    def decided(params: Params) -> Any:
        if not contender.coordinates:
            return params
        return dsbp_optax.project_gradients(params, contender.build(0.0).init(params))

    sizes = jax.tree.map(
        lambda mine, part: mine * sum(leaf.size for leaf in jax.tree.leaves(part)),
        chosen(params, getattr(workload, "trained", "")),
        jax.eval_shape(decided, params),
    )
    program.figures["trained_numbers"] = sum(jax.tree.leaves(sizes))
    return program


# --------------------------------------------------------------------- pretraining

BASE, OPTIMIZER, RATE = WORKLOADS["shakespeare_gpt"], "muon", 0.03
#: The same network from scratch on the other text.
OTHER = dataclasses.replace(
    BASE,
    name="sotu_from_scratch",
    summary="the same on State of the Union",
    load=load_sotu(BASE.model.context),
)
_GPT = "GPT of 4 layers, width 128"
PLAYS = Start(BASE, Path("runs/sotu_gpt.npz"))


def pretrain(
    data_dir: Path | None, start: Start, after_step: Callable[[], None] = lambda: None
) -> None:
    """The weights after one full run from seed 0, in an .npz, whole or not at all."""
    base, path = start
    texts, program = base.load(data_dir), build(base, CONTENDERS[OPTIMIZER])
    told = {"rate": RATE, "steps": base.steps, "seed": 0, "after_step": after_step}
    run = train(program, texts, texts.test, **told)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        flat = traverse_util.flatten_dict(jax.device_get(run.params), sep="/")
        np.savez(file, **flat)
    part.replace(path)


def read_weights(start: Start) -> Params:
    """Weights that `pretrain` saved."""
    base, path = start
    if not path.is_file():
        raise DataError(
            f"{path}: got no such file, expected pretrained weights. Remedy: "
            "`python -m benchmarks finetune` writes it before its first run."
        )
    shapes = traverse_util.flatten_dict(jax.eval_shape(lambda: base.init(0)), sep="/")
    expected = f"the weights of {base.name}"
    with reading(path, expected), np.load(path, allow_pickle=False) as archive:
        return traverse_util.unflatten_dict({k: archive[k] for k in shapes}, sep="/")


def _gpt(
    name: str, summary: str, start: Start | None, then: Workload, steps: int = 150
) -> Task:
    """The GPT, pretrained on one text or not at all, then trained on another."""

    def load(data_dir: Path | None) -> Data:
        data = then.load(data_dir)
        return data._replace(pretrained=read_weights(start)) if start else data

    everything = {
        f"{rule}_whole{end}": 1e-2
        for rule in ("muon", "dsbp_muon", "dsbp_adamw")
        for end in ("", *AUXILIARY, *CONTROLS)
        if rule != "muon" or end not in CONTROLS
    }
    return Task(
        _adapted(BASE, name=name, summary=summary, load=load, steps=steps),
        r"block_\d+/(qkv|proj|up|down)",
        None,
        *(8, 14, 31),
        {
            "lora": 1e-2,
            "projected_adamw": 1e-2,
            "projected_muon": 3e-2,
            "projected_muon_wide": 3e-2,
            "projected_muon_whole": 1e-2,
            **everything,
            **{f"adamw_whole{end}": 3e-3 for end in AUXILIARY},
            "adamw": 3e-3,
        },
        start,
    )


def _adapted(base: Workload, **changes: Any) -> Adaptation:
    held = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
    return Adaptation(**{**held, **changes})


TASKS = {
    task.name: task
    for task in (
        Task(
            _adapted(
                WORKLOADS["minilm_mail"],
                summary="MiniLM (6 layers) on spam or ham, 32 tokens a message",
                example=vectors(32, 384),
                load=functools.partial(load_mail, length=32),
                steps=60,
                grid_shift=0,
                curve_samples=16,
            ),
            r"encoder/layer_\d+/(query|key|value|out|up|down)",
            "^head/",
            *(8, 16, 31),
            {
                "lora": 1e-3,
                "projected_adamw": 1e-3,
                "projected_muon": 3e-3,
                "projected_muon_wide": 3e-3,
                "projected_muon_whole": 1e-3,
                "adamw": 1e-4,
            },
        ),
        _gpt(
            "sotu_gpt",
            f"{_GPT}, from Tiny Shakespeare to State of the Union",
            PLAYS,
            OTHER,
        ),
        _gpt("sotu_gpt_long", f"{_GPT}, the same texts for longer", PLAYS, OTHER, 600),
        _gpt(
            "sotu_scratch",
            f"{_GPT}, from random weights on State of the Union",
            None,
            OTHER,
        ),
        _gpt(
            "sotu_to_shakespeare",
            f"{_GPT}, from State of the Union to Tiny Shakespeare",
            Start(OTHER, Path("runs/sotu_to_shakespeare.npz")),
            BASE,
        ),
    )
}


@cli.app.command("finetune")
def command(
    workload: Annotated[str, typer.Argument(help=" or ".join(TASKS))],
    optimizer: cli.OptimizerNames = None,
    data_dir: cli.DataDir = None,
    out: cli.Out = RESULTS,
    hours: cli.Hours = 1.0,
    seeds: cli.Seeds = 3,
    rounds: Annotated[int, typer.Option(help="steps in turns; 0: none")] = 10,
) -> None:
    """LoRA against gradients in coordinates, as many trained numbers; resumable."""
    deadline = time.monotonic() + 3600 * hours
    task = cli.lookup(TASKS, workload, "WORKLOAD")
    start = task.start
    cli.several(task.entrants(), optimizer, "--optimizer")
    lanes = task.lanes(out, seeds, optimizer)
    file = lanes[0].file
    with cli.bars() as progress:
        if start and not start.weights.is_file():
            advance = cli.bar(progress, "pretraining", start.base.steps)
            pretrain(data_dir, start, advance)
        if start and not records.read(file, study="pretraining"):
            params = read_weights(start)
            measured = {
                key: one.measure(params, one.load(data_dir).test, None)
                for key, one in (("there", start.base), ("here", task.workload))
            }
            digest = hashlib.sha256(start.weights.read_bytes()).hexdigest()
            told = {"workload": start.base.name, "optimizer": OPTIMIZER, "rate": RATE}
            told |= {"steps": start.base.steps, "sha256": digest}
            records.append(file, "pretraining", [{**told, **measured}])
        done = campaign.run(lanes, data_dir, deadline, progress)
        if done and rounds and not optimizer and not records.read(file, study="speed"):
            advance = cli.bar(progress, "steps in turns", rounds)
            pairs = {one.contender.name: (one.workload, one.contender) for one in lanes}
            rows = in_turns(pairs, dict.fromkeys(pairs, PEER), rounds, advance)
            records.append(file, "speed", [{"workload": workload, "rows": rows}])
    entries = task.entries(out)
    cli.show(*[(workload, tables.finetuning(entries))] * bool(entries))
    cli.show_remaining(lanes)
