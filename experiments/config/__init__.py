"""What a run is: every choice that its result depends on, and the name that follows from them."""

import dataclasses
import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import jax

from experiments.config import structures
from experiments.config.readers import IN_MEMORY, READ_BY
from experiments.config.variants import ROUNDS, method_names

DatasetName = Literal["digits", "cifar10", "cifar100", "imagenet2012", "wmt14"]
ModelName = Literal[
    "resnet8", "resnet20", "resnet32", "wrn28x10", "resnet18-cifar", "resnet34-cifar", "resnet34", "resnet50", "vgg19",
    "mobilenet-v2-cifar", "efficientnet-b0", "vit-small-cifar", "vit-small", "transformer-base",
]  # fmt: skip
OptimizerName = Literal[
    "sgd", "sam", "asam", "ssam-f", "ssam-d", "s2sam", "s2sam-adaptive", "s2sam-released", "s2sam-opposite", "msam",
    "looksam", "gsam", "esam",
]  # fmt: skip
# What tables and figures call them.
LABELS: dict[str, str] = {
    "sgd": "SGD", "sam": "SAM", "asam": "ASAM", "ssam-f": "SSAM-F", "ssam-d": "SSAM-D", "s2sam": "S2-SAM",
    "s2sam-adaptive": "S2-SAM, adaptive", "s2sam-released": "S2-SAM as released", "s2sam-opposite": "S2-SAM, downhill",
    "msam": "MSAM", "looksam": "LookSAM", "gsam": "GSAM", "esam": "ESAM",
}  # fmt: skip
ComputeName = Literal["float32", "tensorfloat32", "bfloat16"]
ScheduleName = Literal["constant", "warmup", "learning-rate"]
DistributionName = Literal["uniform", "er", "erk"]

# What the trained weights do not depend on, and the seed, which the name spells out. (A row's losses and speeds are
# means since the row before it, so that they do depend on eval_every.)
_NOT_HASHED = ("data", "out", "eval_every", "checkpoint_every", "seed")


_RANGES: tuple[tuple[str, Callable[[Any], bool], tuple[str, ...]], ...] = (
    ("at least 1", lambda x: x >= 1, (
        "width", "image_size", "vocabulary", "max_length", "epochs", "batch_size", "accumulate", "sharpness_parts",
        "looksam_every", "eval_every", "checkpoint_every", "rounds", "images_per_class",
    )),
    ("at least 0", lambda x: x >= 0, (
        "rho", "eta", "alpha", "learning_rate", "final_learning_rate", "warmup_epochs", "weight_decay", "rewind_epochs",
        "cutout", "validation",
    )),
    ("above 0 epochs", lambda x: x > 0, ("update_every", "ssam_update_every")),
    ("in [0, 1)", lambda x: 0 <= x < 1, ("sparsity", "ssam_sparsity", "label_smoothing", "label_noise", "momentum")),
    ("in [0, 1]", lambda x: 0 <= x <= 1, (
        "update_end", "drop_fraction", "prune_fraction", "channel_sparsity", "explore",
    )),
    ("in (0, 1]", lambda x: 0 < x <= 1, ("esam_beta", "sharpest_fraction")),
    ("in [0, 2**31)", lambda x: 0 <= x < 2**31, ("seed",)),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """One training run."""

    dataset: DatasetName = "digits"  # digits comes with scikit-learn; the others are read from --data.
    data: Path | None = None  # TFDS folder, or an .npz with {train,test}_{images,labels}; default: the TFDS folder.
    subset: int | None = None  # Train on the first so many rows only.
    label_noise: float = 0.0  # Share of the training labels that are replaced by another class.
    validation: int = 0  # Hold out the last so many of them, and report on these in place of the test set.

    model: ModelName = "resnet8"
    width: int | None = None  # Channels of its first stage, or features; default: the model's own.
    vocabulary: int = 37_000  # Tokens of a text model.
    max_length: int = 128  # Tokens of a sentence; longer ones are not trained on.
    image_size: int | None = None  # Pixels on a side that ImageNet is cropped to; default: the model's own.
    # What products are computed in; parameters are float32. TensorFloat-32 is float32 where a device does not have it.
    compute: ComputeName = "float32"

    optimizer: OptimizerName = "s2sam"  # All of them end in the base optimizer with weight decay.
    base: Literal["sgd", "adamw"] = "sgd"  # SGD with momentum, or Adam with decoupled weight decay.
    rho: float = 0.05  # Radius of the perturbation.
    rho_schedule: ScheduleName = "constant"  # Or a rise over the first third; or as the learning rate.
    sharpness_parts: int = 1  # Parts of a batch that sam and its variants perturb for, each along its own gradient.
    eta: float = 0.01  # The constant of asam and s2sam-adaptive.
    ssam_sparsity: float = 0.5  # Fraction of coordinates that ssam does not perturb.
    ssam_update_every: float = 1.0  # Epochs between two perturbation masks of ssam.
    looksam_every: int = 5  # Steps between two second gradients of looksam.
    alpha: float | None = None  # Weight of the second direction of looksam and gsam; default: the optimizer's own.
    esam_beta: float = 0.6  # Probability that esam perturbs a leaf.
    sharpest_fraction: float = 0.5  # Share of a batch that esam takes its second gradient on.

    method: str = "rigl"  # How the masks are found: dense (none), or a name in s2sam_jax.methods.
    sparsity: float = 0.9  # Fraction of zeros over all kernels.
    distribution: DistributionName | None = None  # How that is shared out among the layers; default: erk, where it may.
    structure: str = "unstructured"  # What lives and dies together: nm:2:4 or nm:2:4:pad, block:4x4, channel.
    mask_grads: bool = True  # Off: pruned weights' gradients enter the momentum, as always with s2sam-released.
    update_every: float | None = None  # Epochs between two mask updates; default: the recipe's on CIFAR, else 1.
    update_end: float | None = None  # Fraction of training after which masks stay; default: the recipe's, else 0.75.
    drop_fraction: float | None = None  # Share of weights that the first mask update replaces; default: the method's.
    prune_fraction: float | None = None  # Of the remaining weights, a round of lottery and lrr; default: 0.2.
    channel_sparsity: float | None = None  # Fraction of channels that chase removes; default: 0.5.
    explore: float | None = None  # Fraction of channels that chex explores at first; default: 0.2.
    images_per_class: int | None = None  # Score grasp on so many before training; default: on its first batch.
    rounds: int | None = None  # Prunings of lottery and lrr; default: as many as the sparsity takes.
    rewind_epochs: float = 0.0  # The point in training that lottery and lrr go back to.

    epochs: int = 30
    batch_size: int = 64
    accumulate: int = 1  # Micro-batches per step.
    learning_rate: float = 0.1  # At the start, or after the warm-up; in each round of lottery and lrr anew.
    schedule: Literal["cosine", "steps"] = "cosine"  # To the final rate; or a tenth at one half and three quarters.
    final_learning_rate: float = 0.0  # Where the cosine ends.
    warmup_epochs: float = 0.0  # A linear rise from zero.
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    cutout: int = 0  # Side of the square that is blanked in half of the training images.
    eval_every: int = 1  # Epochs between two evaluations.
    checkpoint_every: int = 1  # Epochs between two checkpoints; an interrupted run goes on from its last one.

    seed: int = 0  # Of initialisation, data order, augmentation and masks.
    init_from: Path | None = None  # Start from the weights of this run; with --method magnitude, prune and fine-tune.
    out: Path = Path("runs")  # The folder that run folders are made in.

    def __post_init__(self):
        self._check_names()
        self._check_ranges()
        for name in ("accumulate", "sharpness_parts"):
            value = getattr(self, name)
            _check(self.batch_size % value == 0, name, "a divisor of batch_size", value)
        _check(self.subset is None or self.subset >= self.batch_size, "subset", "at least one batch", self.subset)
        if self.method in ROUNDS:
            prune = self.prune_fraction
            _check(prune is None or 0 < prune < 1, "prune_fraction", "in (0, 1)", prune)
        if self.method == "grasp" and self.images_per_class is not None:
            _check(self.dataset in IN_MEMORY, "images_per_class", f"left out for {self.dataset}", self.images_per_class)
            _check(self.structure == "unstructured", "structure", "unstructured with images_per_class", self.structure)
        for name in ("validation", "label_noise"):
            value = getattr(self, name)
            _check(not value or self.dataset in IN_MEMORY, name, f"0 for {self.dataset}", value)
        structures.parse(self.structure)

    def _check_names(self):
        for name, known in _LISTED.items():
            _check_name(name, getattr(self, name), known)
        _check_name("method", self.method, method_names())

    def _check_ranges(self):
        for name, value in dataclasses.asdict(self).items():
            _check(not isinstance(value, float) or math.isfinite(value), name, "finite", value)
        for expected, holds, names in _RANGES:
            for name in names:
                value = getattr(self, name)
                _check(value is None or holds(value), name, expected, value)

    @property
    def name(self) -> str:
        """Readable, and unique by the digest."""
        kind = "dense" if self.method == "dense" else f"{self.method}{self.sparsity:g}"
        width = "" if self.width is None else f"x{self.width}"
        return f"{self.dataset}-{self.model}{width}-{kind}-{self.optimizer}-{self.digest}-seed{self.seed}"

    @property
    def digest(self) -> str:
        """A hash of what the run reads and differs from the defaults, so that a new field renames no old run."""
        changed = {k: v for k, v in choices(self.to_json()).items() if v != _DEFAULTS[k]}
        return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def run_dir(self) -> Path:
        return self.out / self.name

    def key(self, purpose: str) -> jax.Array:
        """A PRNG key of the run's seed for one purpose, independent of those for others."""
        return jax.random.fold_in(jax.random.key(self.seed), zlib.crc32(purpose.encode()))

    def to_json(self) -> dict[str, Any]:
        return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Config":
        if unknown := sorted(values.keys() - _DEFAULTS.keys()):
            raise ValueError(f"The stored config has fields that this version does not know: {unknown}.")
        paths: dict[str, Any] = {k: Path(values[k]) for k in ("data", "init_from", "out") if values.get(k) is not None}
        return cls(**{**values, **paths})


def choices(stored: dict[str, Any]) -> dict[str, Any]:
    """What a result depends on besides the seed, of a config as JSON; fields that it lacks have their defaults."""
    values = _DEFAULTS | stored
    unread = {option for readers, options in READ_BY if not readers.include(values) for option in options}
    chosen = {k: v for k, v in values.items() if k not in unread and k not in _NOT_HASHED}
    if chosen["init_from"] is not None:
        chosen["init_from"] = Path(chosen["init_from"]).resolve().name
    return chosen


def differing(chosen: Sequence[dict[str, Any]]) -> list[str]:
    """The fields of which not all that have them have the same, of what :func:`choices` gives."""
    fields = dict.fromkeys(field for one in chosen for field in one)
    return [f for f in fields if len({json.dumps(one[f]) for one in chosen if f in one}) > 1]


def check_same(stored: dict[str, Any], wanted: Config, what: str, advice: str) -> None:
    """Raises a ValueError that names, a line a field, in what a config as JSON is another run than the one wanted."""
    there = choices(stored) | {"seed": stored.get("seed")}
    here = choices(wanted.to_json()) | {"seed": wanted.seed}
    unknown = [field for field in there if field not in _DEFAULTS]
    lines = [
        f"  {field}: {json.dumps(there.get(field))} there, {json.dumps(here.get(field))} asked for"
        for field in [*differing((here, there)), *unknown]
    ]
    if lines:
        raise ValueError("\n".join([f"{what} another config:", *lines, advice]))


def check_read(configs: Iterable[Config], default: Config) -> None:
    """Raises a ValueError for an option that has another value than by default, and that none of the runs reads."""
    runs, plain = [config.to_json() for config in configs], default.to_json()
    ignored = [(readers, options) for readers, options in READ_BY if not any(map(readers.include, runs))]
    for readers, options in ignored:
        for option in options:
            if (value := runs[0][option]) != plain[option]:
                found = ", ".join(dict.fromkeys(run[readers.field] for run in runs))
                raise ValueError(
                    f"{option}={value} has no effect with {readers.field}={found}: it is for {readers}. Leave it out."
                )


def _check_name(field: str, value: str | None, known: Sequence[str | None]) -> None:
    if value not in known:
        raise ValueError(f"Unknown {field} {value!r}; there are {', '.join(name for name in known if name)}.")


def _check(holds: bool, field: str, expected: str, value: Any) -> None:
    if not holds:
        raise ValueError(f"{field} must be {expected}; got {value}.")


_DEFAULTS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(Config)} | {"out": "runs"}
# The values of every field whose type lists them.
_LISTED: dict[str, list[str | None]] = {
    name: [*get_args(part), *([None] if NoneType in get_args(kind) else [])]
    for name, kind in get_type_hints(Config).items()
    for part in (kind, *get_args(kind))
    if get_origin(part) is Literal
}
