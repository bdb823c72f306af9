"""Translation with a trained network, by beam search, and its quality as SacreBLEU."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.datasets.wmt import BOS, EOS, PAD, pad

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def beam_search(
    encode: Callable[[jax.Array], Any],
    decode: Callable[[Any, jax.Array], jax.Array],
    sources: jax.Array,
    *,
    max_length: int,
    beams: int = 4,
    alpha: float = 0.6,
) -> jax.Array:
    """The likeliest translations found: int32[batch, max_length], ended by ``<eos>`` and padded.

    Every step decodes all positions anew, so nothing is asked of the decoder but its logits. With one beam, the search
    is greedy.

    Args:
      encode: ``sources -> memory``, a tree of arrays with the batch as first axis.
      decode: ``(memory, targets_in) -> logits[batch, length, vocabulary]`` of the tokens that come next.
      sources: int32[batch, length].
      max_length: where translations without an end are cut.
      beams: hypotheses that are kept for each source.
      alpha: of the length penalty ``((5 + length) / 6) ** alpha``, by which log-likelihoods are divided.
    """
    batch = sources.shape[0]
    memory = jax.tree.map(lambda x: jnp.repeat(x, beams, axis=0), encode(sources))
    tokens = jnp.full((batch, beams, max_length + 1), PAD, jnp.int32).at[:, :, 0].set(BOS)
    # The beams begin alike, so only the first counts.
    scores = jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf) * jnp.ones((batch, 1))
    lengths = jnp.zeros((batch, beams), jnp.int32)
    ended = jnp.zeros((batch, beams), bool)

    def going_on(state):
        step, *_, ended = state
        return (step < max_length) & ~ended.all()

    def extend(state):
        step, tokens, scores, lengths, ended = state
        logits = decode(memory, tokens[:, :, :-1].reshape(batch * beams, max_length))[:, step]
        logits = logits.astype(jnp.float32).reshape(batch, beams, -1).at[:, :, jnp.array([PAD, BOS])].set(-jnp.inf)
        size = logits.shape[-1]
        # A hypothesis that has ended goes on with padding, at no cost.
        only_padding = jnp.where(jnp.arange(size) == PAD, 0.0, -jnp.inf)
        gains = jnp.where(ended[:, :, None], only_padding, jax.nn.log_softmax(logits))
        lengths = jnp.where(ended, lengths, step + 1)
        totals = scores[:, :, None] + gains
        penalised = totals / (((5 + lengths) / 6) ** alpha)[:, :, None]
        _, best = jax.lax.top_k(penalised.reshape(batch, -1), beams)
        parents, chosen = best // size, best % size
        scores = jnp.take_along_axis(totals.reshape(batch, -1), best, axis=1)
        tokens = jnp.take_along_axis(tokens, parents[:, :, None], axis=1).at[:, :, step + 1].set(chosen)
        lengths, ended = (jnp.take_along_axis(x, parents, axis=1) for x in (lengths, ended))
        return step + 1, tokens, scores, lengths, ended | (chosen == EOS)

    # After each step, the beams are in the order of their penalised scores.
    _, tokens, *_ = jax.lax.while_loop(going_on, extend, (0, tokens, scores, lengths, ended))
    return tokens[:, 0, 1:]


def translate(
    search: Callable[[jax.Array], jax.Array],
    tokenizer: "Tokenizer",
    sentences: Sequence[str],
    *,
    batch_size: int,
    max_length: int,
) -> list[str]:
    """One translation for each sentence, in their order.

    Args:
      search: int32[batch_size, max_length] to the same or another length, as a compiled :func:`beam_search` does.
      tokenizer: of :func:`experiments.datasets.wmt.vocabulary`.
      sentences: texts; what goes beyond the length is cut.
      batch_size: sentences at a time.
      max_length: of the sources.
    """
    sources = np.stack([pad(encoding.ids, max_length) for encoding in tokenizer.encode_batch(list(sentences))])
    missing = -len(sources) % batch_size
    sources = np.concatenate([sources, np.tile(pad([], max_length), (missing, 1))])
    batches = sources.reshape(-1, batch_size, max_length)
    targets = np.concatenate([np.asarray(search(jnp.asarray(batch))) for batch in batches])
    return [_text(tokenizer, row) for row in targets[: len(sentences)]]


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float | str]:
    """``{"bleu", "signature"}``: the corpus score of SacreBLEU against one reference each, and how it was computed."""
    from sacrebleu.metrics.bleu import BLEU

    if len(hypotheses) != len(references) or not hypotheses:
        raise ValueError(
            f"There must be as many hypotheses as references, and some; got {len(hypotheses)} and {len(references)}."
        )
    metric = BLEU()
    score = metric.corpus_score(list(hypotheses), [list(references)]).score
    return {"bleu": score, "signature": str(metric.get_signature())}


def _text(tokenizer: "Tokenizer", row: np.ndarray) -> str:
    ends = np.flatnonzero(row == EOS)
    return tokenizer.decode(row[: ends[0] if len(ends) else len(row)].tolist()).strip()
