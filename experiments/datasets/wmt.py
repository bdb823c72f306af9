"""WMT-14 English to German: sentence pairs, a vocabulary shared by both languages, and batches of tokens."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments.datasets import sources
from experiments.datasets.stream import Evaluation, Stream
from experiments.rows import files

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
PAD, BOS, EOS, UNK = range(4)

_CHUNK = 10_000

Pairs = Iterable[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class TfdsPairs:
    """English and German of a split that TFDS has prepared; to be iterated as often as wanted."""

    split: str
    data_dir: Path | None

    def __iter__(self) -> Iterator[tuple[str, str]]:
        records = sources.records("wmt14_translate/de-en", self.split, self.data_dir)
        for index in range(len(records)):
            record = records[index]
            yield record["en"].decode().strip(), record["de"].decode().strip()


@dataclasses.dataclass(frozen=True)
class TextPairs:
    """Pairs of two files in UTF-8, whose lines belong together; to be iterated as often as wanted."""

    source: Path
    target: Path

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for path in (self.source, self.target):
            if not path.is_file():
                raise FileNotFoundError(f"There is no file {path}; it must hold one sentence a line.")
        # Corpora of the web contain other line separators within sentences.
        lines = partial(Path.open, encoding="utf-8", newline="\n")
        with lines(self.source) as left, lines(self.target) as right:
            for number, (a, b) in enumerate(itertools.zip_longest(left, right), start=1):
                if a is None or b is None:
                    raise ValueError(
                        f"{self.source} and {self.target} must have equally many lines; one ends before line {number}."
                    )
                yield a.strip(), b.strip()


def vocabulary(file: Path, pairs: Pairs, size: int) -> "Tokenizer":
    """The byte-level BPE in ``file``, which is trained on both sides of the pairs and written if it is not there.

    Its first tokens are :data:`SPECIAL`; as it knows every byte, nothing becomes ``<unk>``.

    Raises:
      ValueError: when the vocabulary in the file is not of this kind or size.
    """
    from tokenizers import Tokenizer

    if not file.is_file():
        files.write_whole(file, lambda path: _train(pairs, size).save(str(path)))
    tokenizer = Tokenizer.from_file(str(file))
    first = [tokenizer.id_to_token(i) for i in range(len(SPECIAL))]
    if tokenizer.get_vocab_size() != size or first != list(SPECIAL):
        raise ValueError(
            f"{file} must hold {size} tokens that begin with {', '.join(SPECIAL)}; it has {tokenizer.get_vocab_size()} "
            f"that begin with {', '.join(map(str, first))}. Give its size, or another file and enough text."
        )
    # What looks like a special token in a text is text.
    tokenizer.encode_special_tokens = True
    return tokenizer


@dataclasses.dataclass(frozen=True)
class TokenPairs:
    """Tokenized pairs as a source of ``(source, target)``, without special tokens.

    Attributes:
      tokens: of all sentences, one after the other.
      bounds: sentence i is ``tokens[bounds[i]:bounds[i + 1]]``; sources are even and targets odd.
      rows: the pairs that count.
    """

    tokens: np.ndarray
    bounds: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        first = 2 * self.rows[index]
        start, middle, end = self.bounds[first : first + 3]
        return self.tokens[start:middle], self.tokens[middle:end]

    def of_length(self, max_length: int) -> "TokenPairs":
        """The pairs of two sentences that are not empty, and with ``<eos>`` not longer than this."""
        lengths = np.diff(self.bounds).reshape(-1, 2)[self.rows]
        kept = ((lengths > 0) & (lengths < max_length)).all(axis=1)
        return dataclasses.replace(self, rows=self.rows[kept])


def tokenize(file: Path, pairs: Pairs, tokenizer: "Tokenizer") -> TokenPairs:
    """The tokens in ``file``, which are made of the pairs and written if it is not there.

    Raises:
      ValueError: when the file was made with another vocabulary.
    """
    digest = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
    if not file.is_file():
        tokens, bounds = _encode(pairs, tokenizer)
        files.write_whole(file, partial(_save_arrays, tokens=tokens, bounds=bounds, vocabulary=digest))
    with np.load(file) as stored:
        if str(stored["vocabulary"]) != digest:
            raise ValueError(f"The tokens in {file} are of another vocabulary; delete it, or give another file.")
        tokens, bounds = stored["tokens"], stored["bounds"]
    return TokenPairs(tokens, bounds, np.arange(len(bounds) // 2))


def train_stream(pairs: TokenPairs, batch_size: int, max_length: int) -> Stream:
    """Batches ``{"sources", "targets"}`` of int32[n, max_length], ended by ``<eos>``; longer pairs are left out."""
    return Stream(pairs.of_length(max_length), lambda pair, _: example(pair, max_length), batch_size)


def evaluation(pairs: TokenPairs, batch_size: int, max_length: int) -> Evaluation:
    """As in training, of all pairs, cut to the length; the rows that fill the last batch have padding alone."""
    padding = {name: np.full(max_length, PAD, np.int32) for name in ("sources", "targets")}
    return Evaluation(pairs, partial(example, max_length=max_length), padding, batch_size)


def example(pair: tuple[np.ndarray, np.ndarray], max_length: int) -> dict[str, np.ndarray]:
    return {name: pad(x, max_length) for name, x in zip(("sources", "targets"), pair, strict=True)}


def pad(tokens: Sequence[int] | np.ndarray, max_length: int) -> np.ndarray:
    """int32[max_length]: the tokens, cut where they are too many, ``<eos>`` and padding."""
    padded = np.full(max_length, PAD, np.int32)
    kept = tokens[: max_length - 1]
    padded[: len(kept)] = kept
    padded[len(kept)] = EOS
    return padded


def _train(pairs: Pairs, size: int) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.chain.from_iterable(pairs), trainer)
    return tokenizer


def _encode(pairs: Pairs, tokenizer: "Tokenizer") -> tuple[np.ndarray, np.ndarray]:
    sentences = itertools.chain.from_iterable(pairs)
    dtype = np.min_scalar_type(tokenizer.get_vocab_size())
    tokens, lengths = [np.zeros(0, dtype)], [0]
    while chunk := list(itertools.islice(sentences, _CHUNK)):
        encoded = [encoding.ids for encoding in tokenizer.encode_batch(chunk)]
        tokens.append(np.fromiter(itertools.chain.from_iterable(encoded), dtype))
        lengths += map(len, encoded)
    return np.concatenate(tokens), np.cumsum(lengths)


def _save_arrays(file: Path, tokens: np.ndarray, bounds: np.ndarray, vocabulary: str) -> None:
    with file.open("wb") as stream:
        np.savez(stream, tokens=tokens, bounds=bounds, vocabulary=np.array(vocabulary))
