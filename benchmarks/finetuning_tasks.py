"""The networks that are fine-tuned."""

from pathlib import Path

from benchmarks import data, pretraining
from benchmarks.data import Data
from benchmarks.finetuning import Task, adapted
from benchmarks.workloads import WORKLOADS, vectors


def _load_mail(data_dir: Path | None, weights: Path) -> Data:
    del weights  # Those of the encoder lie beside the mail.
    return data.load_mail(data_dir, length=_TOKENS)


_TOKENS = 32
_GPT = WORKLOADS["shakespeare_gpt"]

TASKS = {
    task.name: task
    for task in (
        Task(
            workload=adapted(
                WORKLOADS["minilm_mail"],
                summary="MiniLM (6 layers) on spam or ham, 32 tokens a message",
                example=vectors(_TOKENS, 384),
                steps=60,
                grid_shift=0,
                curve_samples=16,
            ),
            modules=r"encoder/layer_\d+/(query|key|value|out|up|down)",
            head="^head/",
            lora_rank=8,
            rank=16,
            wide_rank=31,
            grids={
                "lora": (3e-4, 1e-3, 3e-3),
                "projected_adamw": (3e-4, 1e-3, 3e-3),
                "projected_muon": (1e-3, 3e-3, 1e-2),
                "projected_muon_wide": (1e-3, 3e-3, 1e-2),
                "projected_muon_whole": (3e-4, 1e-3, 3e-3),
                "adamw": (3e-5, 1e-4, 3e-4),
            },
            load=_load_mail,
        ),
        Task(
            workload=adapted(
                _GPT,
                name="sotu_gpt",
                summary="GPT of 4 layers, width 128, from Tiny Shakespeare to State of "
                "the Union",
                steps=150,
            ),
            modules=r"block_\d+/(qkv|proj|up|down)",
            head=None,
            lora_rank=8,
            rank=14,
            wide_rank=31,
            grids={
                "lora": (3e-3, 1e-2, 3e-2),
                "projected_adamw": (3e-3, 1e-2, 3e-2),
                "projected_muon": (1e-2, 3e-2, 1e-1),
                "projected_muon_wide": (1e-2, 3e-2, 1e-1),
                "projected_muon_whole": (3e-3, 1e-2, 3e-2),
                "adamw": (1e-3, 3e-3, 1e-2),
            },
            load=pretraining.load_sotu,
            pretrained=True,
        ),
    )
}
