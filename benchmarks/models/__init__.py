"""The Flax Linen models of the workloads."""

from benchmarks.models.drawings import DrawingsMlp
from benchmarks.models.gpt import Gpt
from benchmarks.models.minilm import MailClassifier
from benchmarks.models.vision import DigitsCnn, FashionCnn, Mlp, ResNet

__all__ = [
    "DigitsCnn",
    "DrawingsMlp",
    "FashionCnn",
    "Gpt",
    "MailClassifier",
    "Mlp",
    "ResNet",
]
