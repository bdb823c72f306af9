"""Translation, WMT-14 English to German: next-token loss, and SacreBLEU at the end."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from experiments import sharding
from experiments.config import Config
from experiments.datasets import sources, wmt
from experiments.datasets.stream import Evaluation, Stream
from experiments.models import Network
from experiments.tasks import translation
from experiments.tasks.base import Losses
from experiments.tasks.streams import Streamed

EVAL_BATCH = 64


class Loaded(NamedTuple):
    train: Stream
    test: Evaluation
    test_pairs: list[tuple[str, str]]
    tokenizer: Any


def load(config: Config) -> Loaded:
    """Trains the vocabulary and tokenizes, where that has not been done yet; the files lie beside the data.

    The folder is one of TFDS, or holds ``train.en``, ``train.de``, ``validation.en`` and ``validation.de``.
    """
    folder = config.data or sources.tfds_folder(None)
    train, test = _pairs(folder, "train"), _pairs(folder, "validation")
    tokenizer = wmt.vocabulary(folder / f"vocabulary-{config.vocabulary}.json", train, config.vocabulary)
    name = f"tokens-{config.vocabulary}"
    train_tokens = wmt.tokenize(folder / f"{name}-train.npz", train, tokenizer)
    test_tokens = wmt.tokenize(folder / f"{name}-validation.npz", test, tokenizer)
    return Loaded(
        wmt.train_stream(train_tokens, config.batch_size, config.max_length),
        wmt.evaluation(test_tokens, EVAL_BATCH, config.max_length),
        list(test),
        tokenizer,
    )


def _pairs(folder: Path, split: str) -> wmt.TextPairs | wmt.TfdsPairs:
    if (folder / f"{split}.en").is_file():
        return wmt.TextPairs(folder / f"{split}.en", folder / f"{split}.de")
    return wmt.TfdsPairs(split, folder)


class Task(Streamed):
    """A :class:`~experiments.tasks.base.Task` of sentence pairs."""

    def __init__(self, config: Config, network: Network, loaded: Loaded, mesh: Mesh):
        super().__init__(config, network, loaded, mesh)
        self.losses = losses(config, network)
        self._score = jax.jit(self._counts)

    def evaluate(self, params: Any, model_state: Any, final: bool = False) -> dict[str, float]:
        """Accuracy of the next token, given the right ones before it; at the end SacreBLEU."""
        right = tokens = 0.0
        for batch in self.tests():
            accuracy, count = self._score(params, model_state, batch)
            right, tokens = right + float(count) * float(accuracy), tokens + float(count)
        figures = {"test_accuracy": right / tokens}
        return figures | {"bleu": self._bleu(params, model_state)} if final else figures

    def examples(self) -> Iterator[tuple[Any, jax.Array, jax.Array]]:
        for batch in self.tests():
            targets = batch["targets"]
            yield (batch["sources"], _before(targets)), targets, targets != wmt.PAD

    def _counts(self, params: Any, model_state: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        """The accuracy on the tokens of a batch, and how many these are."""
        _, (_, metrics) = self.losses.plain_loss_fn(params, model_state, batch, jax.random.key(0))
        return metrics["train_accuracy"], jnp.sum(batch["targets"] != wmt.PAD)

    def _bleu(self, params: Any, model_state: Any) -> float:
        everywhere = sharding.replicated(self.mesh)
        compiled = partial(jax.jit(self._search, out_shardings=everywhere), params, model_state)
        length = self._config.max_length
        english, german = zip(*self._loaded.test_pairs, strict=True)
        found = translation.translate(
            lambda batch: compiled(sharding.put(batch, everywhere)),
            self._loaded.tokenizer,
            english,
            batch_size=EVAL_BATCH,
            max_length=length,
        )
        return float(translation.bleu(found, german)["bleu"])

    def _search(self, params: Any, model_state: Any, batch: jax.Array) -> jax.Array:
        def encode(sentences):
            memory, _ = self.network.apply(params, model_state, (sentences,), False, method="encode")
            return memory, sentences

        def decode(memory, targets):
            return self.network.apply(params, model_state, (*memory, targets), False, method="decode")[0]

        return translation.beam_search(encode, decode, batch, max_length=self._config.max_length)


def _before(targets: jax.Array) -> jax.Array:
    """What is known when each token is predicted: the beginning, and the tokens before it."""
    return jnp.pad(targets[:, :-1], ((0, 0), (1, 0)), constant_values=wmt.BOS)


def losses(config: Config, network: Network) -> Losses:
    """The loss is a mean over tokens, not over examples."""
    return Losses(loss_function(config, network, train=True), loss_function(config, network, train=False), None)


def loss_function(config: Config, network: Network, *, train: bool) -> Any:
    """Cross-entropy of each target token, given the source and the target before it."""

    def loss_fn(params, model_state, batch, key):
        targets = batch["targets"]
        logits, new_state = network.apply(params, model_state, (batch["sources"], _before(targets)), train, key)
        labels = optax.smooth_labels(
            jax.nn.one_hot(targets, logits.shape[-1]), config.label_smoothing if train else 0.0
        )
        weights = (targets != wmt.PAD).astype(jnp.float32)
        total = jnp.maximum(weights.sum(), 1.0)
        loss = (optax.softmax_cross_entropy(logits, labels) * weights).sum() / total
        right = ((jnp.argmax(logits, axis=-1) == targets) * weights).sum() / total
        return loss, (new_state, {"train_accuracy": right})

    return loss_fn
