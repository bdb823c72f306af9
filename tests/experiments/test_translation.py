"""Beam search against all translations, and BLEU against sacrebleu."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sentences import ODD, PAIRS

from experiments.datasets import wmt
from experiments.tasks import translation


def copy_or(table):
    """A decoder whose next token is the source's at that place, and which reads logits from a table by the last one."""

    def decode(memory, targets_in):
        return table[targets_in] if memory is None else 9.0 * jax.nn.one_hot(memory, 10)[:, : targets_in.shape[1]]

    return decode


@pytest.mark.parametrize("beams", [1, 3])
def test_search_copies_with_a_decoder_that_copies(beams):
    source = jnp.array([[5, 6, 7, wmt.EOS, 0, 0], [8, wmt.EOS, 0, 0, 0, 0], [9, 9, 9, 9, 9, 9]])
    search = jax.jit(partial(translation.beam_search, lambda x: x, copy_or(None), max_length=6, beams=beams))
    np.testing.assert_array_equal(search(source), source)


def chain_search(logits, **options):
    """Of a first-order chain over tokens 0 to 5, given by probabilities."""
    table = jnp.log(jnp.array(logits) + 1e-9)

    def decode(memory, targets_in):
        return table[targets_in]

    found = translation.beam_search(lambda _: (), decode, jnp.zeros((1, 1), jnp.int32), max_length=4, **options)
    return [int(x) for x in found[0]]


def test_beams_find_what_greedy_search_does_not():
    """4 comes first with 0.6, but then the end only with 0.3; 5 with 0.4, and then the end for sure."""
    chain = np.zeros((6, 6))
    chain[wmt.BOS, [4, 5]] = 0.6, 0.4
    chain[4, [4, 5, wmt.EOS]] = 0.35, 0.35, 0.3
    chain[5, wmt.EOS] = 1
    assert chain_search(chain, beams=1)[0] == 4
    assert chain_search(chain, beams=3, alpha=0.0) == [5, wmt.EOS, 0, 0]


def test_the_length_penalty_prefers_long_translations():
    """0.5 for the end at once, a penalty of 1, against less for three tokens, a penalty of 8/6."""
    chain = np.zeros((6, 6))
    chain[4, 5] = chain[5, wmt.EOS] = 1
    long, short = [4, 5, wmt.EOS, 0], [wmt.EOS, 0, 0, 0]
    # log 0.5 is -0.693; log 0.41 and log 0.38 times 6/8 are -0.669 and -0.726.
    for probability, alpha, best in ((0.41, 0.0, short), (0.41, 1.0, long), (0.38, 1.0, short)):
        chain[wmt.BOS, [wmt.EOS, 4, 3]] = 0.5, probability, 0.5 - probability
        assert chain_search(chain, beams=2, alpha=alpha) == best


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
def test_enough_beams_find_the_best_of_all_translations(alpha):
    chain = np.random.default_rng(0).dirichlet(np.full(4, 0.5), 6)
    chain = np.concatenate([np.zeros((6, 2)), chain], axis=1)

    def score(tokens):
        likelihood = sum(np.log(chain[a, b]) for a, b in itertools.pairwise([wmt.BOS, *tokens]))
        return likelihood / ((5 + len(tokens)) / 6) ** alpha

    words = [list(x) for n in range(5) for x in itertools.product((3, 4, 5), repeat=n)]
    best = max([x if len(x) == 4 else [*x, wmt.EOS] for x in words], key=score)
    assert chain_search(chain, beams=200, alpha=alpha) == best + [0] * (4 - len(best))


def test_search_never_gives_padding_or_a_second_beginning():
    chain = np.zeros((6, 6))
    chain[:, [wmt.PAD, wmt.BOS, 4, wmt.EOS]] = 0.4, 0.4, 0.15, 0.05
    assert chain_search(chain, beams=1) == [4, 4, 4, 4]


def test_translations_come_in_order_and_whole(tokenizer):
    """By a network that says what it hears."""
    search = jax.jit(lambda sources: sources)
    sentences = [text for text in [*ODD, *itertools.chain(*PAIRS)] if text]
    assert translation.translate(search, tokenizer, sentences, batch_size=4, max_length=80) == sentences
    cut = translation.translate(search, tokenizer, sentences, batch_size=4, max_length=3)
    assert all(text.startswith(c.rstrip("\ufffd")) for text, c in zip(sentences, cut, strict=True))
    assert translation.translate(lambda x: jnp.full((2, 3), 40), tokenizer, ["a"], batch_size=2, max_length=3) == [
        tokenizer.decode([40] * 3).strip()
    ]


def test_bleu_is_that_of_sacrebleu():
    """The example of SacreBLEU's documentation has two references, and 48.53; with the first alone, by its API."""
    from sacrebleu.metrics.bleu import BLEU

    hypotheses = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
    references = [
        ["The dog bit the man.", "It was not unexpected.", "The man bit him first."],
        ["The dog had bit the man.", "No one was surprised.", "The man had bitten the dog."],
    ]
    assert round(BLEU().corpus_score(hypotheses, references).score, 2) == 48.53
    row = translation.bleu(hypotheses, references[0])
    assert row["bleu"] == BLEU().corpus_score(hypotheses, references[:1]).score
    assert str(row["signature"]).startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert translation.bleu(references[0], references[0])["bleu"] == pytest.approx(100)
    with pytest.raises(ValueError, match="as many hypotheses as references, and some; got 3 and 2"):
        translation.bleu(hypotheses, references[0][:2])
