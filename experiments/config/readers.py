"""Who reads the options of a config that not all runs read."""

from typing import Any, NamedTuple

from experiments.config.variants import ONE_SHOT, ROUNDS, in_library

IN_MEMORY = ("digits", "cifar10", "cifar100")  # The other data sets are streamed from disk.


class Readers(NamedTuple):
    """Runs whose field has one of these names, or with ``others`` none of them; a method stands for its variants."""

    field: str
    names: tuple[str, ...]
    others: bool = False

    def include(self, values: dict[str, Any]) -> bool:
        name = in_library(values["method"])[0] if self.field == "method" else values[self.field]
        return (name in self.names) != self.others

    def __str__(self) -> str:
        *most, last = self.names
        names = f"{', '.join(most)} or {last}" if most else last
        return f"any {self.field} but {names}" if self.others else f"{self.field} {names}"


# Options, and the runs that read them: what a run does not read does not tell it from another one.
READ_BY: tuple[tuple[Readers, tuple[str, ...]], ...] = (
    (Readers("dataset", ("digits",), others=True), ("data",)),
    (Readers("dataset", IN_MEMORY), ("subset",)),
    (Readers("dataset", ("wmt14",)), ("vocabulary", "max_length")),
    (Readers("dataset", ("wmt14",), others=True), ("cutout",)),
    (Readers("dataset", ("imagenet2012",)), ("image_size",)),
    (Readers("optimizer", ("sgd",), others=True), ("rho", "rho_schedule")),
    (Readers("optimizer", ("sam", "asam", "ssam-f", "ssam-d", "looksam", "gsam", "esam")), ("sharpness_parts",)),
    (Readers("optimizer", ("asam", "s2sam-adaptive")), ("eta",)),
    (Readers("optimizer", ("ssam-f", "ssam-d")), ("ssam_sparsity", "ssam_update_every")),
    (Readers("optimizer", ("ssam-f",)), ("fisher_examples",)),
    (Readers("optimizer", ("looksam",)), ("looksam_every",)),
    (Readers("optimizer", ("looksam", "gsam")), ("alpha",)),
    (Readers("optimizer", ("esam",)), ("esam_beta", "sharpest_fraction")),
    (Readers("method", ("dense",), others=True), ("sparsity", "distribution", "structure", "mask_grads")),
    (Readers("optimizer", ("s2sam-released",), others=True), ("mask_grads",)),
    (Readers("method", ("dense", *ONE_SHOT, *ROUNDS), others=True), ("update_every", "update_end")),
    (Readers("method", ("set", "rigl", "itop", "chase")), ("drop_fraction",)),
    (Readers("method", ROUNDS), ("prune_fraction", "rounds", "rewind_epochs")),
    (Readers("method", ("chase",)), ("channel_sparsity",)),
    (Readers("method", ("chex",)), ("explore",)),
    (Readers("method", ("grasp",)), ("images_per_class",)),
    (Readers("schedule", ("cosine",)), ("final_learning_rate",)),
    (Readers("base", ("sgd",)), ("nesterov",)),
)
