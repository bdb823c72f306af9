"""Pairs of sentences: vocabulary, padding, and the same from TFDS and text."""

import itertools

import jax
import numpy as np
import pytest
from sentences import ODD, PAIRS, SIZE

from experiments.datasets import wmt


def take(batches, count):
    return list(itertools.islice(batches, count))


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_pairs_of_tfds_and_of_text_are_the_same(tfds_folder, tmp_path):
    files = tmp_path / "en", tmp_path / "de"
    for file, side in zip(files, zip(*PAIRS, strict=True), strict=True):
        file.write_text("".join(sentence + "\n" for sentence in side), encoding="utf-8")
    for pairs in (wmt.TextPairs(*files), wmt.TfdsPairs("train", tfds_folder)):
        assert list(pairs) == list(pairs) == PAIRS
    files[1].write_text("one\n")
    with pytest.raises(ValueError, match="must have equally many lines; one ends before line 2"):
        list(wmt.TextPairs(*files))
    with pytest.raises(FileNotFoundError, match=r"There is no file .*nowhere"):
        list(wmt.TextPairs(tmp_path / "nowhere", files[1]))
    with pytest.raises(FileNotFoundError, match=r"no prepared wmt14_translate/de-en .*data_source\('wmt14_translate/"):
        list(wmt.TfdsPairs("train", tmp_path))


def test_text_survives_the_vocabulary(tokenizer):
    assert [tokenizer.token_to_id(token) for token in wmt.SPECIAL] == [wmt.PAD, wmt.BOS, wmt.EOS, wmt.UNK]
    for text in [*ODD, *itertools.chain(*PAIRS)]:
        ids = tokenizer.encode(text).ids
        assert min(ids, default=4) >= 4
        assert tokenizer.decode(ids).strip() == text


def test_vocabulary_is_trained_once(tmp_path):
    file = tmp_path / "new" / "bpe.json"
    first = wmt.vocabulary(file, PAIRS, SIZE)
    stamp = file.stat().st_mtime_ns
    again = wmt.vocabulary(file, [], SIZE)
    assert file.stat().st_mtime_ns == stamp
    assert [file] == list(file.parent.iterdir())
    assert first.to_str() == again.to_str()
    assert again.encode("<eos>").ids != [wmt.EOS]
    with pytest.raises(ValueError, match=r"must hold 301 tokens .*; it has 300"):
        wmt.vocabulary(file, PAIRS, 301)


def test_tokens_are_made_once_per_vocabulary(tmp_path, tokenizer):
    file = tmp_path / "train.npz"
    pairs = wmt.tokenize(file, PAIRS, tokenizer)
    assert len(pairs) == len(PAIRS)
    for (source, target), texts in zip(pairs, PAIRS, strict=True):
        assert tuple(tokenizer.decode(x.tolist()).strip() for x in (source, target)) == texts
    same(wmt.tokenize(file, [], tokenizer).tokens, pairs.tokens)
    other = wmt.vocabulary(tmp_path / "other.json", PAIRS, 290)
    with pytest.raises(ValueError, match="are of another vocabulary; delete it"):
        wmt.tokenize(file, PAIRS, other)


def test_batches_are_padded_and_long_or_empty_pairs_left_out(token_pairs, tokenizer):
    longest = max(len(x) for pair in list(token_pairs)[:4] for x in pair)
    stream = wmt.train_stream(token_pairs, 2, max_length=longest + 1)
    assert len(stream.source) == 4
    assert len(wmt.train_stream(token_pairs, 1, max_length=longest).source) < 4
    (first, second) = batches = take(stream.batches(0), 2)
    assert {(x.shape, str(x.dtype)) for b in batches for x in b.values()} == {((2, longest + 1), "int32")}
    seen = set()
    for source, target in zip(*(np.concatenate([first[k], second[k]]) for k in ("sources", "targets")), strict=True):
        texts = []
        for row in (source, target):
            end = int(np.flatnonzero(row == wmt.EOS)[0])
            assert (row[end + 1 :] == wmt.PAD).all()
            assert (row[:end] > wmt.UNK).all()
            texts.append(tokenizer.decode(row[:end].tolist()).strip())
        seen.add(tuple(texts))
    assert seen == set(PAIRS[:4])
    same(take(stream.batches(0, 3), 2), take(stream.batches(0), 5)[3:])


def test_evaluation_has_every_pair_once_and_cuts_the_long(token_pairs):
    batches = list(wmt.evaluation(token_pairs, 4, max_length=6))
    assert [b["targets"].shape for b in batches] == [(4, 6)] * 2
    rows = np.concatenate([b["targets"] for b in batches])
    assert ((rows == wmt.EOS).sum(axis=1) == [1] * 6 + [0] * 2).all()
    assert (rows[6:] == wmt.PAD).all()
    np.testing.assert_array_equal(wmt.pad([5, 6, 7], 6), [5, 6, 7, wmt.EOS, 0, 0])
    np.testing.assert_array_equal(wmt.pad([5, 6, 7], 3), [5, 6, wmt.EOS])
