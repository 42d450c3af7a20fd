"""Training that is killed, and goes on: every bit must be that of an unbroken run.

A child trains and saves; this process kills it with SIGKILL, as often as asked for, and
starts it again until it is through. The child says on its standard output what it does,
so that it is known where it was hit.
"""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import dsbp_optax
from benchmarks import distributed
from benchmarks.checkpoints import Checkpoints, Saved, digests
from benchmarks.data import DataError
from benchmarks.distributed import Place
from benchmarks.optimizers import CONTENDERS, Contender
from benchmarks.train import make_init, make_step
from benchmarks.workloads import WORKLOADS, Workload

#: Holds the fields of a child's `Order`.
VARIABLE = "DSBP_FAULT"
#: Steps from refresh to refresh, and how many of them refresh: windows are frequent.
PERIOD, WINDOW = 8, 3
#: Of one file, in bytes, on the "full" disk: nothing that holds arrays fits.
_ROOM = 512
#: Seconds after which a child is ended in any case.
_PATIENCE = 900.0
#: What becomes of a checkpoint's files.
TEARS = ("truncated", "deleted", "overwritten")


class Order(NamedTuple):
    """What a child is to do.

    Attributes:
      workload: a key of `WORKLOADS`.
      optimizer: a key of `CONTENDERS`; refreshed every `PERIOD` steps.
      data_dir: folder of the data files, or None.
      folder: of the checkpoints.
      steps: length of the run.
      every: steps from one checkpoint to the next.
      rate: learning rate.
      full: steps between which the disk is full.
      address: of the coordinator; empty for a process that is alone.
      processes: how many there are.
      number: which one this is.
      timeout: seconds after which a process that is gone is missed.
    """

    workload: str
    optimizer: str
    data_dir: str | None
    folder: str
    steps: int
    every: int
    rate: float
    full: tuple[int, int] = (0, 0)
    address: str = ""
    processes: int = 1
    number: int = 0
    timeout: int = 10


class Event(NamedTuple):
    """What a child says.

    Attributes:
      kind: "start", "step", "save", "saved", "full" or "end".
      step: steps taken so far.
      refreshes: whether a step that begins refreshes a basis.
      result: at the end.
    """

    kind: str
    step: int
    refreshes: bool = False
    result: dict[str, Any] | None = None

    @property
    def place(self) -> str:
        """Where a child is that has said this last."""
        if self.kind == "step":
            return "refresh window" if self.refreshes else "other step"
        return {"save": "save"}.get(self.kind, "between steps")


Say = Callable[[Event], None]


# ------------------------------------------------------------------------- the child


_CHILD = "from benchmarks import faults; faults.obey()"


def obey() -> None:
    """Be the child."""
    order = Order(*json.loads(os.environ[VARIABLE]))
    place = Place(order.address, order.processes, order.number, 1)
    distributed.join(place, order.timeout)

    def say(event: Event) -> None:
        print(json.dumps(event), flush=True)

    train(order, say)


def contender(name: str) -> Contender:
    """The optimizer, its bases refreshed often."""
    found = CONTENDERS[name]
    basis = dsbp_optax.Basis(power_iterations=WINDOW)
    often = {"update_every": PERIOD, "basis": basis}
    settings = {**found.settings, **(often if found.ours else {})}
    return dataclasses.replace(
        found, settings=settings, period=PERIOD * found.ours, window=WINDOW
    )


class Stream:
    """The batches of a run, and where in them it stands.

    Args:
      workload: whose they are.
      data_dir: folder of the data files.
      seed: of their order.
    """

    def __init__(self, workload: Workload, data_dir: Path | None, seed: int) -> None:
        self._rng, self.position = np.random.default_rng(seed), 0
        train = workload.load(data_dir).train
        self._batches = workload.sampler(train, workload.batch_size, self._rng)

    def __next__(self) -> Any:
        self.position += 1
        return next(self._batches)

    def notes(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"position": self.position, "rng": self._rng.bit_generator.state}

    def resume(self, notes: dict[str, Any]) -> None:
        """Go where another stood; an error if that is not the same place."""
        while self.position < notes["position"]:
            next(self)
        if self.notes() != {key: notes[key] for key in self.notes()}:
            raise DataError(
                f"the batches: got {self.notes()} after {self.position}, expected "
                f"{notes}. Remedy: the data and the seed of the checkpoint."
            )


def train(order: Order, say: Say) -> dict[str, Any]:
    """Train from the last checkpoint, or from the start.

    Args:
      order: what to do.
      say: is told what happens.

    Returns:
      ``digests`` of parameters and state, ``losses`` of every step, ``stream``.
    """
    workload, chosen = WORKLOADS[order.workload], contender(order.optimizer)
    data_dir = None if order.data_dir is None else Path(order.data_dir)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec("data"))
    stream = Stream(workload, data_dir, seed=0)
    rows = workload.batch_size // jax.process_count()
    mine = slice(rows * jax.process_index(), rows * (jax.process_index() + 1))
    params = jax.device_put(workload.init(0), everywhere)
    opt_state = make_init(workload, chosen)(params, None)
    run = Saved(0, (params, jax.device_put(opt_state, everywhere)), {"losses": []})
    step, numbers = make_step(workload, chosen), (order.rate, order.steps)
    with Checkpoints(Path(order.folder)) as checkpoints:
        run = checkpoints.restore(_shapes(run.arrays, everywhere)) or run
        if run.step:
            stream.resume(run.notes)
        say(Event("start", run.step))
        while run.step < order.steps:
            say(Event("step", run.step, chosen.refreshes(run.step)))
            batch = jax.tree.map(
                lambda x: jax.make_array_from_process_local_data(split, x[mine]),
                next(stream),
            )
            *arrays, loss = step(*run.arrays, batch, *map(np.float32, numbers))
            losses = [*run.notes["losses"], float(loss)]
            run = Saved(
                run.step + 1, tuple(arrays), {**stream.notes(), "losses": losses}
            )
            if run.step % order.every == 0 and run.step < order.steps:
                say(Event("save", run.step))
                with _disk(full=order.full[0] <= run.step < order.full[1]):
                    written = checkpoints.save(run)
                say(Event("saved" if written else "full", run.step))
        result = {"digests": digests(run.arrays), **run.notes}
        say(Event("end", run.step, result=result))
    return result


def _shapes(arrays: Any, place: NamedSharding) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arrays
    )


@contextmanager
def _disk(full: bool) -> Iterator[None]:
    """A disk on which no file grows beyond a few bytes, if it is full."""
    import resource  # Not on every system.

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (_ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# ------------------------------------------------------------------------ the parent


class Child:
    """A process that trains; what it says is read as it comes.

    Args:
      order: what it is to do.
      cache: folder of compiled programs, so that it starts quickly.
      seconds: after which it is ended in any case.
    """

    def __init__(self, order: Order, cache: Path, seconds: float) -> None:
        environment = {
            **os.environ,
            VARIABLE: json.dumps(order),
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CHILD],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,  # A file would be full when the disk is.
            text=True,
        )
        self._text: list[str] = []
        self._watch = threading.Timer(seconds, self.process.kill)
        self._watch.start()
        self.last, self.began = Event("start", 0), 0

    def events(self) -> Iterator[Event]:
        """Until it is gone; `last` is the latest."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if not line.startswith('["'):
                self._text.append(line)
            elif line.endswith("\n"):  # Else it died while it spoke.
                self.last = Event(*json.loads(line))
                if self.last.kind == "start":
                    self.began = self.last.step
                yield self.last

    def kill(self) -> Event:
        """End it at once; what it had said last."""
        self.process.send_signal(signal.SIGKILL)
        for _ in self.events():
            pass
        self.finish()
        return self.last

    def finish(self) -> int:
        """Wait for its end; its exit status."""
        status = self.process.wait()
        self._watch.cancel()
        if self.process.stdout is not None:
            self.process.stdout.close()
        return status

    def said(self) -> str:
        """The end of what it wrote beside events."""
        return "".join(self._text).strip()[-2000:]

    def result(self) -> dict[str, Any]:
        """What it came to.

        Raises:
          DataError: when it did not come to an end.
        """
        if self.last.result is None:
            for _ in self.events():
                pass
        self.finish()
        if self.last.result is None:
            raise DataError(f"a child that nobody killed failed: {self.said()}")
        return self.last.result


class Nursery(NamedTuple):
    """Where and how children live.

    Attributes:
      root: folder of everything that they write.
      order: what they do, but for the folder.
      seconds: after which each is ended.
    """

    root: Path
    order: Order
    seconds: float

    def child(self, folder: str, **changes: Any) -> Child:
        """One whose checkpoints are in `folder`."""
        order = self.order._replace(folder=str(self.root / folder), **changes)
        return Child(order, self.root / "compiled", self.seconds)


def difference(result: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Paths of the arrays whose bits differ, and names of other things that do."""
    one, two = result["digests"], expected["digests"]
    paths = [path for path in {**one, **two} if one.get(path) != two.get(path)]
    names = [key for key in {**result, **expected} if key != "digests"]
    return paths + [key for key in names if result.get(key) != expected.get(key)]


def kill_at_random(
    nursery: Nursery,
    expected: dict[str, Any],
    lane: int,
    kills: int,
    seed: int,
    after_kill: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Jobs that are killed again and again, until so many kills are done.

    A kill comes some events into a child's life, up to as long after that event as one
    of its kind takes.

    Args:
      nursery: where children live.
      expected: result of an unbroken run.
      lane: a number, for folders and moments that are its own.
      kills: how many.
      seed: of the moments.
      after_kill: is called after each.

    Returns:
      ``places`` of the kills, ``unfinished`` saves that they left, ``repeated``
      steps that were taken again, ``jobs`` that ended, what was ``different`` in them.
    """
    places: Counter[str] = Counter()
    rng = random.Random(f"{seed} {lane}")
    unfinished, repeated, jobs, different = 0, 0, 0, set()
    while sum(places.values()) < kills:
        folder, reached, ended = f"lane {lane} job {jobs}", 0, False
        while not ended:
            child = nursery.child(folder)
            some = rng.randrange(1, 4 * nursery.order.every)
            wanted = some if sum(places.values()) < kills else None
            hit = _live(child, wanted, rng)
            repeated += max(0, reached - child.began)
            reached = max(reached, child.last.step)
            if hit is None:
                ended = True
                different |= set(difference(child.result(), expected))
                continue
            places[hit.place] += 1
            left = (nursery.root / folder).glob("*orbax-checkpoint-tmp*")
            unfinished += any(left)
            after_kill()
        jobs += 1
        shutil.rmtree(nursery.root / folder)
    return {
        "places": dict(places),
        "unfinished": unfinished,
        "repeated": repeated,
        "jobs": jobs,
        "different": sorted(different),
    }


def _live(child: Child, wanted: int | None, rng: random.Random) -> Event | None:
    """Let a child live until its event of that number and a little longer.

    Returns:
      What it had said last when it was killed; None if it was not, to the end.
    """
    begun, lengths = time.monotonic(), {"step": 0.0, "save": 0.0}
    before, count = child.last, 0
    for event in child.events():
        now = time.monotonic()
        if before.kind in lengths and count > 2:  # The first step compiles.
            lengths[before.kind] = now - begun
        begun, before = now, event
        count += event.kind in lengths
        if event.kind == "end":
            return None
        if event.kind in lengths and count == wanted:
            time.sleep(rng.uniform(0, lengths[event.kind] or 0.05))
            last = child.kill()
            return None if last.kind == "end" else last
    return None


def tear(folder: Path, how: str) -> None:
    """Damage the largest file of a checkpoint, as a disk may."""
    files = sorted(x for x in folder.rglob("*") if x.is_file())
    largest = max(files, key=lambda x: x.stat().st_size)
    whole = largest.read_bytes()
    middle = len(whole) // 2
    match how:
        case "deleted":
            largest.unlink()
        case "truncated":
            largest.write_bytes(whole[:middle])
        case _:
            inverted = bytes(255 - byte for byte in whole[middle : middle + 64])
            largest.write_bytes(whole[:middle] + inverted + whole[middle + 64 :])


def torn(nursery: Nursery, expected: dict[str, Any]) -> list[dict[str, Any]]:
    """Damage the newest checkpoint of a killed job: which is used, and what follows."""
    child, rows = nursery.child("torn"), []
    for event in child.events():
        if event.kind == "save" and event.step >= 3 * nursery.order.every:
            child.kill()
            break
    steps = _whole(nursery.root / "torn")
    for how in TEARS:
        folder = f"torn {how}"
        shutil.copytree(nursery.root / "torn", nursery.root / folder)
        tear(nursery.root / folder / str(steps[-1]), how)
        child = nursery.child(folder)
        result = child.result()
        rows.append(
            {
                "how": how,
                "newest": steps[-1],
                "used": child.began,
                "previous": steps[-2],
                "warned": f"{steps[-1]}: torn" in child.said(),
                "different": difference(result, expected),
            }
        )
    return rows


def _whole(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder."""
    return sorted(int(x.name) for x in folder.iterdir() if x.name.isdigit())


def full_disk(nursery: Nursery, expected: dict[str, Any]) -> dict[str, Any]:
    """A disk that is full for a while; killed then, the job goes on from before."""
    every = nursery.order.every
    full = 2 * every, 4 * every
    child, refused = nursery.child("full", full=full), 0
    for event in child.events():
        refused += event.kind == "full"
        if event.kind == "step" and event.step == full[1] - 1:
            child.kill()
            break
    kept = _whole(nursery.root / "full")
    warned = "not written" in child.said()
    again = nursery.child("full")
    result = again.result()
    through = nursery.child("full through", full=full)
    return {
        "refused": refused,
        "kept": kept,
        "used": again.began,
        "warned": warned,
        "different": difference(result, expected),
        "different_without_kill": difference(through.result(), expected),
    }


def one_of_two(
    nursery: Nursery, expected: list[dict[str, Any]], victim: int, after: int
) -> dict[str, Any]:
    """`lose_one`, and what was ``different`` from an unbroken job's results."""
    row, results = lose_one(nursery, victim, after)
    different: set[str] = set()
    for result, whole in zip(results, expected, strict=True):
        different |= set(difference(result, whole))
    return {**row, "different": sorted(different)}


def lose_one(
    nursery: Nursery, victim: int, after: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Kill one process of two; the other must end by itself, then the job goes on.

    Args:
      nursery: where children live.
      victim: number of the process that is killed.
      after: steps that it takes before.

    Returns:
      ``seconds`` until the other ended, its ``status``, whether it ``ended`` by itself
      within twice the timeout, where the job ``resumed``; and the results of both
      processes of the job that went on.
    """
    pair = _pair(nursery, f"pair {victim}")
    other = pair[1 - victim]
    reader = threading.Thread(target=lambda: list(other.events()))
    reader.start()
    for event in pair[victim].events():
        if event.kind == "step" and event.step == after:
            pair[victim].kill()
            break
    begun, limit = time.monotonic(), 2 * nursery.order.timeout
    try:
        status: int | None = other.process.wait(limit)
    except subprocess.TimeoutExpired:
        status = None
        other.process.kill()
    seconds = time.monotonic() - begun
    reader.join()
    other.finish()
    again = _pair(nursery, f"pair {victim}")
    results = [child.result() for child in again]
    row = {
        "victim": victim,
        "ended": bool(status),
        "status": status,
        "seconds": seconds,
        "timeout": nursery.order.timeout,
        "resumed": again[0].began,
    }
    return row, results


def _pair(nursery: Nursery, folder: str) -> list[Child]:
    address = f"127.0.0.1:{distributed.free_port()}"
    return [
        nursery.child(folder, address=address, processes=2, number=number)
        for number in range(2)
    ]


class Once(NamedTuple):
    """What one optimizer is put through beside kills.

    Attributes:
      torn: rows of `torn`.
      full_disk: of `full_disk`.
      pair: of `one_of_two`, for each process of two.
    """

    torn: list[dict[str, Any]]
    full_disk: dict[str, Any]
    pair: list[dict[str, Any]]

    def passed(self) -> bool:
        """Whether each was survived."""
        full = self.full_disk
        return (
            all(one["used"] == one["previous"] and one["warned"] for one in self.torn)
            and bool(full["refused"] and full["warned"])
            and full["used"] == full["kept"][-1]
            and not full["different_without_kill"]
            and all(one["ended"] for one in self.pair)
            and not any(one["different"] for one in [*self.torn, full, *self.pair])
        )


def unbroken(nursery: Nursery) -> dict[str, Any]:
    """The result of a run that nobody kills; it fills the cache of programs."""
    return nursery.child("unbroken").result()


def other_faults(nursery: Nursery, expected: dict[str, Any]) -> Once:
    """A torn checkpoint, a full disk, and one process of two that is gone."""
    torn_rows, full = torn(nursery, expected), full_disk(nursery, expected)
    third = nursery.order.steps // 3
    together = [child.result() for child in _pair(nursery, "pair unbroken")]
    pair = [one_of_two(nursery, together, victim, third) for victim in (0, 1)]
    return Once(torn_rows, full, pair)


def account(
    orders: list[Order],
    kills: int,
    seed: int,
    lanes: int = 1,
    after_kill: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """What was done to each optimizer, and what came of it.

    Args:
      orders: what children do, one for each optimizer; folders count for nothing.
      kills: in all.
      seed: of their moments.
      lanes: jobs of one optimizer that are killed at the same time.
      after_kill: is called after each.

    Returns:
      ``kills``, rows of `kill_at_random`, the fields of `Once` for the first optimizer,
      and whether all was ``passed``.
    """
    count = lanes * len(orders)
    shares = [kills // count + (i < kills % count) for i in range(count)]
    with (
        tempfile.TemporaryDirectory() as root,
        ThreadPoolExecutor(count + 1 if lanes > 1 else 1) as pool,
    ):
        nurseries = [
            Nursery(Path(root) / order.optimizer, order, _PATIENCE) for order in orders
        ]
        expected = list(pool.map(unbroken, nurseries))
        once = pool.submit(other_faults, nurseries[0], expected[0])
        killing = []
        for number, share in enumerate(shares):
            chosen = number % len(orders)
            lane = nurseries[chosen], expected[chosen], number, share
            killing.append(pool.submit(kill_at_random, *lane, seed, after_kill))
        rows = [
            {"optimizer": orders[number % len(orders)].optimizer, **done.result()}
            for number, done in enumerate(killing)
        ]
        others = once.result()
    passed = others.passed() and not any(row["different"] for row in rows)
    return {"kills": rows, **others._asdict(), "passed": passed}
