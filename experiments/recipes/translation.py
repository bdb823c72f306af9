"""A Transformer on WMT-14 English to German, from the S2-SAM rebuttal."""

from collections.abc import Iterator
from typing import Any

from experiments.config import Config
from experiments.recipes.base import BLEU, REBUTTAL, Recipe, cell, lines, recipe
from experiments.recipes.cifar import OPTIMIZERS

# Columns: method, sparsity, SGD (that is, no perturbation) and S2-SAM.
WMT = """
dense   0   27.6 27.9
mest-em 0.8 27.1 27.5
mest-em 0.9 26.4 27.2
"""
LABELS = {"dense": "Dense", "mest-em": "MEST (EM)"}
KNOWN = "Best SacreBLEU on the validation set; the same sparsity in all layers (rebuttal)."
UNKNOWN = (
    "All else: here the base size, 37 000 byte-pair tokens, 12 epochs of 512 sentence pairs (about the 100 000 steps "
    "of the original), Adam with 7e-4 after half an epoch of warm-up, then a cosine to 0, no weight decay, label "
    "smoothing 0.1, rho 0.05, masks every epoch up to three quarters, SacreBLEU of the last epoch. Under the name sgd "
    "is Adam without perturbation. Embeddings are pruned like all matrices."
)


def config(**options: Any) -> Config:
    common = {
        "dataset": "wmt14",
        "model": "transformer-base",
        "base": "adamw",
        "rho": 0.05,
        "epochs": 12,
        "batch_size": 512,
        "learning_rate": 7e-4,
        "warmup_epochs": 0.5,
        "weight_decay": 0.0,
        "label_smoothing": 0.1,
    }
    return Config(**common | options)


def recipes() -> Iterator[Recipe]:
    for key, sparsity, *cells in lines(WMT):
        masks = {"sparsity": float(sparsity), "distribution": "uniform"} if key != "dense" else {}
        for optimizer, text in zip(OPTIMIZERS, cells, strict=True):
            run = config(method=key, optimizer=optimizer, **masks)
            texts = {"known": KNOWN, "unknown": UNKNOWN, "paper": REBUTTAL}
            yield recipe("wmt14", key, LABELS[key], run, cell(text), metric=BLEU, **texts)
