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
# Optimizers as tables and figures call them.
LABELS: dict[str, str] = {
    "sgd": "SGD", "sam": "SAM", "asam": "ASAM", "ssam-f": "SSAM-F", "ssam-d": "SSAM-D", "s2sam": "S2-SAM",
    "s2sam-adaptive": "S2-SAM, adaptive", "s2sam-released": "S2-SAM as released", "s2sam-opposite": "S2-SAM, downhill",
    "msam": "MSAM", "looksam": "LookSAM", "gsam": "GSAM", "esam": "ESAM", "adamw": "AdamW",
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
        "looksam_every", "fisher_examples", "eval_every", "checkpoint_every", "rounds", "images_per_class",
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


# The comment of each field is its help text on the command line.
@dataclasses.dataclass(frozen=True)
class Config:
    """One training run."""

    dataset: DatasetName = "digits"  # digits comes with scikit-learn; the others are read from --data.
    # A folder prepared by TFDS; for CIFAR also FILE.npz with {train,test}_{images,labels}, for wmt14 also a folder with
    # {train,validation}.{en,de}. Default: TFDS's own folder.
    data: Path | None = None
    subset: int | None = None  # Train on only the first so many images.
    label_noise: float = 0.0  # Share of the training images whose label is replaced by another class.
    validation: int = 0  # Hold out the last so many training images, and evaluate on these instead of the test set.

    model: ModelName = "resnet8"
    width: int | None = None  # Channels of the first stage, or features of a Transformer; default: the model's own.
    vocabulary: int = 37_000  # Size of the vocabulary of wmt14.
    max_length: int = 128  # Tokens per sentence of wmt14; longer ones are left out of training.
    image_size: int | None = None  # Side in pixels of the crops of ImageNet; default: the model's own.
    # Number format of convolutions and matrix products; parameters are always float32. A device without TensorFloat-32
    # computes in float32 instead.
    compute: ComputeName = "float32"

    optimizer: OptimizerName = "s2sam"  # How sharpness is minimised (sgd: not at all); --base then takes the step.
    base: Literal["sgd", "adamw"] = "sgd"  # SGD with momentum, or Adam with decoupled weight decay (momentum is b1).
    rho: float = 0.05  # Radius of the perturbation.
    # Constant; warmup: rising over the first third of training; learning-rate: in proportion to it.
    rho_schedule: ScheduleName = "constant"
    # m-sharpness: cut each batch into so many parts, and perturb for each along its own gradient; for sam and variants.
    sharpness_parts: int = 1
    eta: float = 0.01  # Added to the size of each weight, by which asam and s2sam-adaptive scale the perturbation.
    ssam_sparsity: float = 0.5  # Fraction of coordinates that ssam does not perturb.
    ssam_update_every: float = 1.0  # Epochs between two updates of ssam's mask.
    fisher_examples: int = 16  # Training samples of the batch that ssam-f takes its mask from.
    looksam_every: int = 5  # Steps between two second gradients of looksam.
    # looksam: weight of the direction that it reuses; gsam: of the component that narrows the gap. Default: 0.7; 0.2.
    alpha: float | None = None
    esam_beta: float = 0.6  # Probability with which esam perturbs a parameter array.
    sharpest_fraction: float = 0.5  # Share of each batch that esam takes its second gradient on.

    method: str = "rigl"  # Sparse method, such as rigl, set, mest-em, or dense for none; another word lists them all.
    sparsity: float = 0.9  # Fraction of zeros over all kernels.
    # How the zeros are spread over layers; default: erk, but uniform for nm and where weights of all layers compete.
    distribution: DistributionName | None = None
    # Weights that are pruned together: unstructured, nm:N:M (nm:2:4), block:RxC (block:4x4) or channel; nm and block
    # with :pad at the end for layers that they do not divide.
    structure: str = "unstructured"
    # --no-mask-grads lets the gradients of pruned weights into the momentum, as s2sam-released always does.
    mask_grads: bool = True
    # Epochs between two mask updates; default: on CIFAR that of the method's paper, else 1.
    update_every: float | None = None
    # Fraction of training after which masks stay as they are; default: on CIFAR that of the method's paper, else 0.75.
    update_end: float | None = None
    # Share of the live weights that the first mask update of set, rigl, itop and chase replaces; default: the method's.
    drop_fraction: float | None = None
    # Share of the remaining weights that lottery and lrr prune each time; default: 0.2.
    prune_fraction: float | None = None
    channel_sparsity: float | None = None  # Fraction of channels that chase removes; default: 0.5.
    explore: float | None = None  # Fraction of channels that chex explores at first; default: 0.2.
    # Score grasp on so many images of each class before training; default: on the first batch, in its first step.
    images_per_class: int | None = None
    rounds: int | None = None  # How often lottery and lrr prune; default: as often as the sparsity takes.
    rewind_epochs: float = 0.0  # The epoch that lottery and lrr rewind to after each pruning.

    epochs: int = 30
    batch_size: int = 64
    accumulate: int = 1  # Micro-batches per batch, whose gradients are averaged.
    learning_rate: float = 0.1  # Its peak: at the start or after the warm-up; lottery and lrr start anew each round.
    # cosine: down to the final learning rate; steps: a tenth at one half and again at three quarters of training.
    schedule: Literal["cosine", "steps"] = "cosine"
    final_learning_rate: float = 0.0  # Where the cosine ends.
    warmup_epochs: float = 0.0  # Epochs in which the learning rate rises linearly from zero.
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    cutout: int = 0  # Side of the square that is blanked in half of the training images.
    eval_every: int = 1  # Epochs between two evaluations.
    checkpoint_every: int = 1  # Epochs between two checkpoints; an interrupted run continues from its last one.

    seed: int = 0  # Of initialisation, data order, augmentation and masks.
    # Start from the weights of this finished run (its folder); with --method magnitude, prune and fine-tune them.
    init_from: Path | None = None
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
