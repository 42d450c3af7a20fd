"""Contenders of the scoreboard: textbook forms of peers, and rules of this package.

Each is one `Contender` in `CONTENDERS`. All have the same auxiliary Adam, with a rate
of its own, for what is no kernel, and decoupled weight decay on kernels.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import dsbp_optax
from benchmarks import optimizers
from benchmarks.core.kernels import is_kernel, path_of
from dsbp_optax.core import transform
from dsbp_optax.rules import metric, moments

#: Decays of every Adam: the auxiliary one, AdamW and those in few bits.
_B1, _B2 = 0.9, 0.95
_MOMENTUM = 0.95

#: Rates tried first, each twice the one before; and weight decays.
_MUON, _FINE = (0.01, 0.02, 0.04, 0.08), (0.0015, 0.003, 0.006, 0.012)
_WIDE_FINE = (0.003, 0.006, 0.012, 0.024)
_AUX = (0.003, 0.006, 0.012, 0.024)
_MUON_DECAYS, _FINE_DECAYS = (0.0, 0.03, 0.1, 0.3), (0.0, 0.1, 0.3, 1.0)

Build = Callable[[Any, Any, Any, Any], optax.GradientTransformation]


@dataclass(frozen=True)
class Contender:
    """One optimizer of the scoreboard."""

    name: str  # as typed on the command line
    summary: str  # one line for people
    # rate of kernels, rate of the rest, weight decay, variant -> optimizer
    build: Build
    # what its update takes beside gradients: "none"; "package", the statistics of
    # `dsbp_optax.linen`; "inputs", ``second_moments=``, the mean of ``a a^T`` over each
    # dense layer's inputs
    statistics: str = "none"
    rates: tuple[float, ...] = _MUON  # of kernels, tried first
    aux_rates: tuple[float, ...] = _AUX  # of the rest, tried first
    decays: tuple[float, ...] = _MUON_DECAYS  # weight decays, 0 first
    # name of the contender whose compiled program serves this one too
    program: str | None = None
    variant: int = 0  # what tells it from that one
    rule: str | None = None  # name of the contender that it is a control of
    # the optimizer whose place it takes, and whose state its own is a share of
    plain: str = "muon"
    ours: bool = False  # whether it is a rule of this package, or a control of one


def assemble(
    kernels: optax.GradientTransformation, rate: Any, aux_rate: Any, decay: Any
) -> optax.GradientTransformationExtraArgs:
    """`kernels` gives the ascent direction of kernels; Adam moves the rest."""

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda keys, x: "kernels" if is_kernel(path_of(keys), x) else "rest", params
        )

    return optax.partition(
        {
            "kernels": optax.chain(
                kernels,
                optax.add_decayed_weights(decay),
                optax.scale_by_learning_rate(rate),
            ),
            "rest": optax.chain(
                optax.scale_by_adam(_B1, _B2), optax.scale_by_learning_rate(aux_rate)
            ),
        },
        labels,
    )


def kernel_rule(make: Callable[[], optax.GradientTransformation]) -> Build:
    """The contender whose kernels follow a rule of their own."""
    return lambda rate, aux_rate, decay, variant: assemble(
        make(), rate, aux_rate, decay
    )


def _muon() -> optax.GradientTransformation:
    return optimizers.CONTENDERS["muon"].factory(-1.0, beta=_MOMENTUM)


class Seen(NamedTuple):
    """What a rule sees of one kernel in one step."""

    gradient: jax.Array  # as a matrix ``(d, m)``, inputs first
    step: jax.Array  # number of steps before this one, int32
    # ``A^T A / n (d, d)`` of the layer's inputs, or None
    second_moment: jax.Array | None


class Rule(NamedTuple):
    """How one kernel, as a matrix, is optimized."""

    init: Callable[[jax.Array], Any]  # zeros ``(d, m)`` -> state
    # `Seen`, state -> ascent direction ``(d, m)``, state
    update: Callable[[Seen, Any], tuple[jax.Array, Any]]
    # `Seen`, state -> state, every `period` steps after the update of a step, the first
    # one included
    refresh: Callable[[Seen, Any], Any] | None = None
    period: int = 1  # steps between refreshes


class RuleState(NamedTuple):
    """State of `by_matrix`: steps taken, and path -> state of the kernel's rule."""

    step: jax.Array
    kernels: dict[str, Any]


def by_matrix(rule: Rule) -> optax.GradientTransformationExtraArgs:
    """A rule on every kernel; all refreshes of a step are in one branch."""

    def flat(tree: Any) -> dict[str, jax.Array]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {path_of(k): x.reshape(-1, x.shape[-1]) for k, x in leaves}

    def init(params: Any) -> RuleState:
        zeros = {path: jnp.zeros_like(x) for path, x in flat(params).items()}
        states = {path: rule.init(x) for path, x in zeros.items()}
        return RuleState(jnp.zeros([], jnp.int32), states)

    def update(
        updates: Any,
        state: RuleState,
        params: Any = None,
        *,
        second_moments: Mapping[str, jax.Array] | None = None,
        **extra: Any,
    ) -> tuple[Any, RuleState]:
        del params, extra
        found = second_moments or {}
        seen = {
            path: Seen(gradient, state.step, found.get(path))
            for path, gradient in flat(updates).items()
        }
        done = {path: rule.update(seen[path], state.kernels[path]) for path in seen}
        kernels = {path: new for path, (_, new) in done.items()}

        def refreshed(kernels: dict[str, Any]) -> dict[str, Any]:
            return {path: rule.refresh(seen[path], kernels[path]) for path in seen}

        if rule.refresh is not None:
            turn = state.step % rule.period == 0
            kernels = jax.lax.cond(turn, refreshed, lambda kernels: kernels, kernels)
        leaves, treedef = jax.tree.flatten(updates)
        pairs = zip(done.values(), leaves, strict=True)
        changes = [x.reshape(leaf.shape) for (x, _), leaf in pairs]
        return treedef.unflatten(changes), RuleState(state.step + 1, kernels)

    return optax.GradientTransformationExtraArgs(init, update)


def muon_direction(matrix: jax.Array) -> jax.Array:
    """Muon's: orthogonalised, times ``sqrt(max(1, m / d))``."""
    return dsbp_optax.orthogonalize()(matrix, *matrix.shape)


def _coarse_muon(bits: int) -> optax.GradientTransformation:
    """Muon whose momentum is kept in a few bits, with no basis."""

    def direct(updates: Any, params: Any = None) -> Any:
        del params
        return jax.tree.map(
            lambda x: muon_direction(x.reshape(-1, x.shape[-1])).reshape(x.shape),
            updates,
        )

    momentum = dsbp_optax.scale_by_quantized_momentum(_MOMENTUM, bits)
    return optax.chain(momentum, optax.stateless(direct))


#: Variants of a contender in the metric of activations: itself and its controls.
NO_BASIS, OWN_ENERGIES, TRUE_ENERGIES = 1, 2, 3


def _muon_in_metric(bits: int = 5, rank: Any = metric.SHARE) -> Build:
    """`dsbp_optax.dsbp_muon`; a variant takes one part of the metric away."""

    def build(rate: Any, aux_rate: Any, decay: Any, variant: Any) -> Any:
        momentum = moments.quantized_momentum(_MOMENTUM, bits, nesterov=True)
        kernels = control(
            *(rank, variant, dsbp_optax.orthogonalize(), 0.5, "both"), before=momentum
        )
        return assemble(kernels, rate, aux_rate, decay)

    return build


def _adam_in_metric(rate: Any, aux_rate: Any, decay: Any, variant: Any) -> Any:
    """`dsbp_optax.dsbp_adamw`, likewise."""
    rank = metric.LARGE_SHARE
    kernels = control(rank, variant, None, 0.5, "both", between=_adam_in_bits())
    return assemble(kernels, rate, aux_rate, decay)


def _adam_in_bits() -> transform.Rule:
    return moments.quantized_adam(_B1, _B2, eps=1e-8, bits=5, nesterov=False)


def _adam_before_metric(rate: Any, aux_rate: Any, decay: Any, variant: Any) -> Any:
    """The metric behind Adam alone, its whole exponent there."""
    rank = metric.LARGE_SHARE
    kernels = control(rank, variant, None, 1.0, "after", before=_adam_in_bits())
    return assemble(kernels, rate, aux_rate, decay)


def control(
    rank: Any, variant: Any, direction: Any, exponent: float, where: Any, **stages: Any
) -> optax.GradientTransformationExtraArgs:
    """A rule in the metric and its controls, chosen by a traced integer.

    0 is the rule itself. `NO_BASIS`: its exponent is 0. `OWN_ENERGIES`: the directions
    are random, the eigenvalues what the activations have along them. `TRUE_ENERGIES`:
    directions are random, the eigenvalues those of the activations. `stages` are the
    moments before and inside of the metric, as `metric.metric_rule` takes them.
    """

    def solver(operator: Any, basis: jax.Array, iterations: Any) -> Any:
        found = dsbp_optax.power_iteration(operator, basis, iterations)
        basis = jnp.linalg.qr(basis)[0]  # It comes rounded from the state.
        energies = jnp.sum(basis * operator.matmul(basis), axis=0)
        kept = dsbp_optax.Eigenpairs(basis, energies, jnp.zeros_like(found.residual))
        stays = variant == OWN_ENERGIES
        return jax.tree.map(lambda a, b: jnp.where(stays, a, b), kept, found)

    def directions(seed: jax.Array, basis: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(1), seed)
        random = jnp.linalg.qr(jax.random.normal(key, basis.shape, basis.dtype))[0]
        return jnp.where(variant == TRUE_ENERGIES, random, basis)

    rule = metric.metric_rule(
        direction,
        jnp.where(variant == NO_BASIS, 0.0, exponent),
        where=where,
        directions=directions,
        **stages,
    )
    basis = dsbp_optax.Basis(solver=solver)
    rest = optax.with_extra_args_support(optax.identity())
    asked = metric.metric_choices(rank, metric.EVERY, basis)
    return transform.transformation("metric", rule, rest, asked)


def _with_controls(contender: Contender) -> list[Contender]:
    """A contender and its controls, which share its program."""
    told = {
        "none": (NO_BASIS, "without the metric"),
        "random": (OWN_ENERGIES, "random directions with their own energies"),
        "random_true": (TRUE_ENERGIES, "random directions, the true eigenvalues"),
    }
    return [
        contender,
        *(
            replace(
                contender,
                name=f"{contender.name}_{name}",
                summary=f"control: {summary}",
                program=contender.name,
                rule=contender.name,
                variant=variant,
            )
            for name, (variant, summary) in told.items()
        ),
    ]


class Soap(NamedTuple):
    """Momentum; second moment, bases and covariances of both sides."""

    momentum: jax.Array
    second: jax.Array
    bases: tuple[jax.Array, jax.Array]
    covariances: tuple[jax.Array, jax.Array]


def soap(period: int = 20, b1: float = 0.95, b2: float = 0.95) -> Rule:
    """SOAP (arXiv 2409.11321): Adam in the eigenbases of the gradient's covariances.

    The bases begin with an eigendecomposition and go on by one QR power step every
    `period` steps; the first step, which has no basis, moves nothing.
    """

    def init(matrix: jax.Array) -> Soap:
        sides = tuple(jnp.eye(n) for n in matrix.shape)
        return Soap(matrix, matrix, sides, tuple(0 * side for side in sides))

    def update(seen: Seen, held: Soap) -> tuple[jax.Array, Soap]:
        gradient, (left, right) = seen.gradient, held.bases
        first = seen.step == 0
        outer = gradient @ gradient.T, gradient.T @ gradient
        covariances = tuple(
            map(functools.partial(_average, b2), held.covariances, outer)
        )
        momentum = jnp.where(first, 0, _average(b1, held.momentum, gradient))
        inside = left.T @ gradient @ right
        second = jnp.where(first, 0, _average(b2, held.second, inside**2))
        count = jnp.maximum(seen.step, 1)
        root = jnp.sqrt(second / (1 - b2**count)) + 1e-8
        direction = left @ (left.T @ momentum @ right / root) @ right.T
        direction = direction / (1 - b1**count)
        return direction, Soap(momentum, second, held.bases, covariances)

    def refresh(seen: Seen, held: Soap) -> Soap:
        def begin(held: Soap) -> Soap:
            pairs = map(jnp.linalg.eigh, held.covariances)
            return held._replace(bases=tuple(vectors for _, vectors in pairs))

        def go_on(held: Soap) -> Soap:
            second, bases = held.second, []
            for axis, (basis, c) in enumerate(
                zip(held.bases, held.covariances, strict=True)
            ):
                product = c @ basis
                order = jnp.argsort(-jnp.sum(basis * product, 0))
                second = jnp.take(second, order, axis)
                bases.append(jnp.linalg.qr(product[:, order])[0])
            return held._replace(second=second, bases=tuple(bases))

        return jax.lax.cond(seen.step == 0, begin, go_on, held)

    return Rule(init, update, refresh, period)


class Cosmos(NamedTuple):
    """Momentum; basis, its product with the covariance, second moment inside."""

    momentum: jax.Array
    basis: jax.Array
    sketch: jax.Array
    second: jax.Array


def cosmos(rank: int = 32, period: int = 10, share: float = 0.2) -> Rule:
    """After COSMOS (arXiv 2502.17410): Adam in the top directions of the gradient.

    Outside of them Newton-Schulz, at a share; the whole has Muon's size.
    """

    def init(matrix: jax.Array) -> Cosmos:
        d, m = matrix.shape
        basis = jnp.eye(d, min(rank, d))
        return Cosmos(matrix, basis, 0 * basis, jnp.zeros((min(rank, d), m)))

    def update(seen: Seen, held: Cosmos) -> tuple[jax.Array, Cosmos]:
        gradient, basis = seen.gradient, held.basis
        inside = basis.T @ gradient
        momentum = _average(_MOMENTUM, held.momentum, gradient)
        second = _average(_MOMENTUM, held.second, inside**2)
        sketch = _average(_MOMENTUM, held.sketch, gradient @ inside.T)
        used = _average(_MOMENTUM, momentum, gradient)
        top = basis.T @ used
        root = jnp.sqrt(second / (1 - _MOMENTUM ** (seen.step + 1))) + 1e-8
        rest = dsbp_optax.orthogonalize()(used - basis @ top, 1, 1)
        d, m = gradient.shape
        whole = basis @ (top / root) / jnp.sqrt(m) + share * rest
        size = jnp.sqrt(min(d, m) * max(1, m / d))
        whole = size * whole / (jnp.linalg.norm(whole) + 1e-12)
        return whole, Cosmos(momentum, basis, sketch, second)

    def refresh(seen: Seen, held: Cosmos) -> Cosmos:
        del seen
        basis, _ = jnp.linalg.qr(held.sketch)
        turn = basis.T @ held.basis
        sketch = basis @ (basis.T @ held.sketch @ turn.T)
        return Cosmos(held.momentum, basis, sketch, turn**2 @ held.second)

    return Rule(init, update, refresh, period)


class NewtonMuon(NamedTuple):
    """Momentum, second moment of the inputs and its damped inverse."""

    momentum: jax.Array
    second_moment: jax.Array
    inverse: jax.Array


def newton_muon(period: int = 20, decay: float = 0.95, damping: float = 0.2) -> Rule:
    """Newton-Muon (arXiv 2604.01472): ``(C + g I)^-1 G``, momentum, Newton-Schulz.

    C is the second moment of the layer's inputs, averaged over steps, and ``g = damping
    tr C / d``; the inverse is taken in units of ``tr C / d``, whose changes would weigh
    the past of the momentum. A kernel whose inputs nobody tells is Muon's.
    """

    def init(matrix: jax.Array) -> NewtonMuon:
        one = jnp.eye(len(matrix))
        return NewtonMuon(matrix, 0 * one, one)

    def update(seen: Seen, held: NewtonMuon) -> tuple[jax.Array, NewtonMuon]:
        second_moment = held.second_moment
        if seen.second_moment is not None:
            second_moment = _average(decay, second_moment, seen.second_moment)
        gradient = held.inverse @ seen.gradient
        momentum = _average(_MOMENTUM, held.momentum, gradient)
        used = _average(_MOMENTUM, momentum, gradient)
        return muon_direction(used), NewtonMuon(momentum, second_moment, held.inverse)

    def refresh(seen: Seen, held: NewtonMuon) -> NewtonMuon:
        if seen.second_moment is None:
            return held
        c, one = held.second_moment, jnp.eye(len(held.second_moment))
        mean = jnp.trace(c) / len(c)
        factor = jax.scipy.linalg.cho_factor(c / mean + damping * one)
        return held._replace(inverse=jax.scipy.linalg.cho_solve(factor, one))

    return Rule(init, update, refresh, period)


def _average(decay: float, past: jax.Array, fresh: jax.Array) -> jax.Array:
    return decay * past + (1 - decay) * fresh


def _matrix(make: Callable[..., Rule], *args: Any) -> Build:
    return kernel_rule(lambda: by_matrix(make(*args)))


def _adafactor() -> optax.GradientTransformation:
    return optax.chain(optax.adafactor(), optax.scale(-1.0))


_ADAM: Any = {"rates": _FINE, "decays": _FINE_DECAYS, "plain": "adamw"}
_METRIC: Any = {**_ADAM, "statistics": "package", "rates": _WIDE_FINE, "ours": True}

CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("muon", "optax.contrib.muon on kernels", kernel_rule(_muon)),
        Contender(
            "muon_6bit",
            "Muon, its momentum in 6 bits a number",
            kernel_rule(lambda: _coarse_muon(6)),
            rule="muon",
        ),
        *_with_controls(
            Contender(
                "dsbp_muon",
                "Muon in the metric of the activations, momentum in 5 bits",
                _muon_in_metric(),
                statistics="package",
                ours=True,
            )
        ),
        Contender(
            "dsbp_muon_gradient",
            "the same in the metric of its momentum: no statistics",
            _muon_in_metric(),
            ours=True,
            rule="dsbp_muon",
        ),
        Contender(
            "dsbp_muon_rank1",
            "the same with one direction a kernel",
            _muon_in_metric(rank=1),
            statistics="package",
            ours=True,
            rule="dsbp_muon",
        ),
        *(
            Contender(
                f"muon_{bits}bit",
                f"Muon, its momentum in {bits} bits a number",
                kernel_rule(functools.partial(_coarse_muon, bits)),
                rule="muon",
            )
            for bits in (8, 4)
        ),
        Contender(
            "newton_muon",
            "the inverse second moment of activations before Muon",
            _matrix(newton_muon),
            statistics="inputs",
        ),
        Contender(
            "cosmos", "Adam in top gradient directions, Muon outside", _matrix(cosmos)
        ),
        Contender(
            "soap",
            "Adam in the gradient's two eigenbases",
            _matrix(soap),
            **{**_ADAM, "rates": _WIDE_FINE},
        ),
        Contender(
            "adamw",
            "optax.scale_by_adam with decoupled decay",
            kernel_rule(lambda: optax.scale_by_adam(_B1, _B2)),
            **_ADAM,
        ),
        Contender(
            "adamw_5bit",
            "AdamW, first moment in 5 bits, second factored",
            kernel_rule(lambda: dsbp_optax.scale_by_quantized_adam(_B1, _B2, bits=5)),
            **_ADAM,
        ),
        *_with_controls(
            Contender(
                "dsbp_adamw",
                "AdamW in the metric of the activations, in few bits and factored",
                _adam_in_metric,
                **_METRIC,
            )
        ),
        Contender(
            "dsbp_adamw_gradient",
            "the same in the metric of its gradient: no statistics",
            _adam_in_metric,
            # The rule's best settings and their neighbours, since it was run on a CPU.
            **{
                **_METRIC,
                "statistics": "none",
                "rates": (0.006, 0.012, 0.024),
                "aux_rates": (0.012, 0.024, 0.048),
                "decays": (0.1, 0.3),
            },
            rule="dsbp_adamw",
        ),
        Contender(
            "dsbp_adamw_after",
            "the same with the metric behind Adam alone",
            _adam_before_metric,
            **_METRIC,
        ),
        Contender(
            "adafactor",
            "optax.adafactor, without momentum, relative to the parameters' size",
            kernel_rule(_adafactor),
            **{**_ADAM, "rates": (0.01, 0.02, 0.04, 0.08)},
        ),
    )
}
