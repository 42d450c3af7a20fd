"""The paper's comparison: every optimizer on every data set of pictures, one table."""

from collections.abc import Mapping, Sequence

from benchmarks import cells, markdown, minima
from benchmarks.compare import Entry
from benchmarks.experiment import Record
from benchmarks.optimizers import CONTENDERS
from benchmarks.workloads import WORKLOADS

#: The paper's data sets, and the workload of each.
DATA_SETS = {
    "CIFAR-10": "cifar10_resnet",
    "Fashion-MNIST": "fashion_mnist_cnn",
    "PneumoniaMNIST": "pneumonia_cnn",
    "Tiny ImageNet": "tiny_imagenet_resnet",
}

#: Workload -> name of a contender -> its final runs.
Known = Mapping[str, Mapping[str, Entry]]

_HEAD = """## The paper's comparison

Test accuracy in percent, mean ± standard deviation (seeds), rates tuned alike, as many
steps for all; short runs of small networks, so no level is the paper's. Runs are those
of the campaign, else those whose minima were looked at. LoRA and MAML train no network
from its initialisation on one task: they are compared where they mean something, under
"Fine-tuning" and "Few-shot episodes"."""


def known(
    campaign: Mapping[str, Sequence[Entry]], looked_at: Mapping[str, Sequence[Record]]
) -> Known:
    """Final runs of each contender: those of the campaign, else those of `minima`.

    Of the latter the first rate and radius count, as they lie in the records.
    """
    found = {}
    for name in DATA_SETS.values():
        some = minima.entries(WORKLOADS[name], looked_at.get(name, ()))
        some |= {entry.name: entry for entry in campaign.get(name, ())}
        found[name] = {key: some[key] for key in CONTENDERS if key in some}
    return found


def section(found: Known) -> str:
    """The table; a dash where nothing was run."""
    names = [name for name in CONTENDERS if any(name in row for row in found.values())]
    rows = [(name, *(_cell(found[w].get(name)) for w in found)) for name in names]
    return f"{_HEAD}\n\n{markdown.table(('optimizer', *DATA_SETS), rows)}"


def _cell(entry: Entry | None) -> str:
    if entry is None:
        return "-"
    lost = f", {entry.diverged} lost" * (entry.diverged > 0)
    return f"{cells.spread(entry)} ({len(entry.records)}{lost})"
