"""Streams, ImageNet, corruptions and WMT: on arrays, text, and small TFDS folders written as TFDS writes them."""

import itertools
import json
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from prepared import encoded, image_features, write_tfds

from experiments.datasets import cifar_c, corruptions, imagenet, sources, wmt
from experiments.datasets.stream import Evaluation, Stream
from experiments.tasks import translation


@pytest.fixture(scope="module")
def pictures():
    """Smooth, of several shapes, one of them grey."""
    rng = np.random.default_rng(0)
    shapes = [(40, 60), (60, 40), (50, 50), (33, 90), (70, 45), (48, 48)]
    small = [Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)) for _ in shapes]
    full = [np.asarray(image.resize(shape)) for image, shape in zip(small, shapes, strict=True)]
    return [*full[:-1], full[-1][..., 0]]


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory, pictures):
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("tfds")
    rows = [{"image": encoded(x), "label": i} for i, x in enumerate(pictures)]
    write_tfds(folder / "imagenet2012/5.1.0", image_features(), {"train": rows, "validation": rows})
    for version, text in (("9.0.0", b"old"), ("10.0.0", b"newest"), ("2.0.0", b"oldest")):
        write_tfds(folder / "words" / version, {"text": tfds.features.Text()}, {"train": [{"text": text}]})
    pairs = [{"en": en.encode(), "de": de.encode()} for en, de in PAIRS]
    write_tfds(folder / "wmt14_translate/de-en/1.0.0", tfds.features.Translation(("de", "en")), {"train": pairs})
    return folder


def take(batches, count):
    return list(itertools.islice(batches, count))


def with_draw(record, rng):
    return np.int32(record), rng.random()


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# Streams


@pytest.mark.parametrize("start", [1, 4, 5, 12])
def test_batches_from_a_step_on_are_those_of_the_whole_run(start):
    stream = Stream(range(23), with_draw, batch_size=4)
    assert stream.steps_per_epoch == 5
    whole = take(stream.batches(seed=3), 15)
    assert whole[0][0].shape == whole[0][1].shape == (4,)
    same(take(stream.batches(3, start), 15 - start), whole[start:])
    other = take(stream.batches(4), 15)
    assert any((a[0] != b[0]).any() for a, b in zip(whole, other, strict=True))


def test_every_epoch_is_another_permutation():
    stream = Stream(range(23), with_draw, batch_size=4)
    for seed in range(3):
        rows, draws = (np.stack(x).reshape(3, 20) for x in zip(*take(stream.batches(seed), 15), strict=True))
        assert all(len(set(epoch)) == 20 for epoch in rows)
        assert (rows[0] != rows[1]).any()
        assert (rows[1] != rows[2]).any()
        assert len(np.unique(draws)) == 60
    # One seed's second epoch is not the next one's first.
    first, second = (np.concatenate([b[0] for b in take(stream.batches(seed), 10)]).reshape(2, 20) for seed in (0, 1))
    assert (first[1] != second[0]).any()


def test_processes_share_the_batches_of_one():
    make = partial(Stream, range(24), with_draw, 4)
    whole = take(make(process_index=0, process_count=1).batches(0), 12)
    shares = [take(make(process_index=i, process_count=2).batches(0), 12) for i in range(2)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert [len(rows) for rows, _ in parts] == [2, 2]
        assert set(batch[0]) == set(parts[0][0]) | set(parts[1][0])
        assert set(batch[1]) == set(parts[0][1]) | set(parts[1][1])
    for epoch in (slice(0, 6), slice(6, 12)):
        assert sorted(np.concatenate([rows for share in shares for rows, _ in share[epoch]])) == list(range(24))


@pytest.mark.parametrize(("rows", "processes"), [(23, 1), (24, 1), (23, 2), (3, 2), (9, 4)])
def test_evaluation_counts_every_row_once(rows, processes):
    parts = [
        Evaluation(range(rows), lambda x: {"row": np.int32(x)}, {"row": np.int32(-1)}, 8, i, processes)
        for i in range(processes)
    ]
    for _ in range(2):
        batches = [[batch["row"] for batch in part] for part in parts]
        assert {len(b) for b in batches} == {len(parts[0])} == {-(-rows // 8)}
        assert {len(batch) for part in batches for batch in part} == {8 // processes}
        seen = np.concatenate([batch for part in batches for batch in part])
        assert sorted(seen[seen >= 0]) == list(range(rows))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Stream(iter([1]), with_draw, 1), TypeError, "source must have a length .* got list_iterator"),
        (lambda: Stream(range(3), with_draw, 4), ValueError, "batch_size=4 is more than the 3 rows"),
        (lambda: Stream(range(9), with_draw, 4, 0, 3), ValueError, "multiple of the 3 processes; got 4"),
        (lambda: Stream(range(9), with_draw, 4, 2, 2), ValueError, r"process_index must be in \[0, 2\); got 2"),
        (lambda: Evaluation(range(9), str, "", 0), ValueError, "positive multiple of the 1 processes; got 0"),
        (lambda: Stream(range(9), with_draw, 4).batches(0, -1), ValueError, "start_step must be at least 0; got -1"),
    ],
)
def test_streams_say_what_is_wrong(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_importing_needs_no_optional_library():
    optional = ["grain", "tokenizers", "sacrebleu", "tensorflow_datasets", "matplotlib"]
    check = (
        "import sys; import experiments.tasks, experiments.datasets.corruptions; "
        f"print([name for name in {optional} if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_newest_prepared_version_is_read(tfds_folder):
    assert sources.records("words", "train", tfds_folder)[0]["text"] == b"newest"


# ImageNet


def test_random_boxes_are_in_bounds():
    rng = np.random.default_rng(0)
    areas, ratios, corners, ends = [], [], set(), set()
    for _ in range(2000):
        left, top, right, bottom = imagenet.random_box(80, 70, rng)
        assert 0 <= left < right <= 80
        assert 0 <= top < bottom <= 70
        areas.append((right - left) * (bottom - top) / 5600)
        ratios.append((right - left) / (bottom - top))
        corners.add((left, top))
        ends |= {("across", left, right)} if right - left < 80 else set()
        ends |= {("down", top, bottom)} if bottom - top < 70 else set()
    # Sides are whole pixels.
    assert 0.07 < min(areas) < 0.1
    assert 0.9 < max(areas) <= 1
    assert 0.70 < min(ratios) < 0.8
    assert 1.25 < max(ratios) < 1.42
    # Wide ones fit a little more often.
    assert abs(np.median(np.log(ratios))) < 0.1
    assert len(corners) > 800
    for way, length in (("across", 80), ("down", 70)):  # smaller ones reach either end
        first, last = zip(*((begin, end) for w, begin, end in ends if w == way), strict=True)
        assert (min(first), max(last)) == (0, length)


@pytest.mark.parametrize(
    ("size", "box"), [((400, 10), (193, 0, 206, 10)), ((10, 400), (0, 193, 10, 206)), ((1, 1), (0, 0, 1, 1))]
)
def test_thin_images_fall_back_to_the_middle(size, box):
    """13 is 10 · 4/3, rounded."""

    largest = SimpleNamespace(uniform=lambda low, high: high, integers=lambda high: 0)
    assert imagenet.random_box(*size, largest) == box


def test_train_images_are_a_function_of_seed_and_step(tfds_folder):
    stream = imagenet.train_stream(2, tfds_folder, image_size=24)
    assert stream.steps_per_epoch == 3
    whole = take(stream.batches(0), 9)
    images, labels = whole[0]
    assert images.shape == (2, 24, 24, 3)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int32
    same(take(stream.batches(0, 4), 5), whole[4:])
    by_label = {}
    for images, labels in whole:
        for image, label in zip(images, labels, strict=True):
            by_label.setdefault(int(label), []).append(image)
    assert sorted(by_label) == list(range(6))
    # Each image three times, every time another crop.
    assert all((crops[i] != crops[i - 1]).any() for crops in by_label.values() for i in range(3))


def test_a_train_example_is_its_box_resized_and_half_are_flipped(pictures):
    record, flips = {"image": encoded(pictures[0]), "label": 7}, 0
    for seed in range(40):
        pixels, label = imagenet._train_example(record, np.random.default_rng(seed), image_size=20)
        image = Image.fromarray(pictures[0])
        box = imagenet.random_box(*image.size, np.random.default_rng(seed))
        expected = np.asarray(image.crop(box).resize((20, 20), Image.Resampling.BILINEAR))
        assert np.array_equal(pixels, expected) or np.array_equal(pixels, expected[:, ::-1])
        flips += np.array_equal(pixels, expected[:, ::-1])
        assert label == 7
    assert 10 < flips < 30


def test_central_crops_against_a_computation_by_hand(tfds_folder, pictures):
    """For 21, the shorter side becomes 24; a side of twice the size is then averaged by hand."""
    wide = np.random.default_rng(0).integers(0, 256, (24, 31, 3), np.uint8)
    np.testing.assert_array_equal(imagenet.central_crop(Image.fromarray(wide), 21), wide[1:22, 5:26])
    constant = np.full((48, 62, 3), 9, np.uint8)
    constant[:, :31] = 200
    crop = np.asarray(imagenet.central_crop(Image.fromarray(constant), 21))
    # Column 31 of 62 is 15.5 of 31, less the 5 left of the crop: column 10 is a mean of both colours.
    assert (crop[:, :10] == 200).all()
    assert (crop[:, 11:] == 9).all()
    np.testing.assert_allclose(crop[:, 10], 104.5, atol=1)

    batches = list(imagenet.evaluation(4, tfds_folder, image_size=21))
    assert [images.shape for images, _ in batches] == [(4, 21, 21, 3)] * 2
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in batches]), [0, 1, 2, 3, 4, 5, -1, -1])
    np.testing.assert_array_equal(batches[0][0][0], imagenet.central_crop(Image.fromarray(pictures[0]), 21))
    grey = batches[1][0][1]
    assert (grey == grey[..., :1]).all()


def test_missing_data_says_how_to_prepare_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no prepared imagenet2012 in .*tfds.data_source\('imagenet2012'"):
        imagenet.train_stream(2, tmp_path, image_size=224)


# Corruptions


@pytest.fixture(scope="module")
def clean():
    """Smooth 32x32 images."""
    small = np.random.default_rng(0).integers(0, 256, (12, 6, 6, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(x).resize((32, 32), Image.Resampling.BICUBIC)) for x in small])


@pytest.mark.parametrize("name", cifar_c.CORRUPTIONS)
def test_corruptions_are_deterministic_and_grow(name, clean):
    corrupted = [cifar_c.corrupt(name, severity, clean) for severity in range(1, 6)]
    assert all(x.dtype == np.uint8 and x.shape == clean.shape for x in corrupted)
    np.testing.assert_array_equal(corrupted[2], cifar_c.corrupt(name, 3, clean))
    change = [np.abs(x.astype(float) - clean).mean() for x in corrupted]
    assert change[0] > 0.2
    # The elastic transform becomes finer rather than larger.
    assert name == "elastic_transform" or change[4] > 1.2 * change[0]
    deterministic = np.array_equal(corrupted[2], cifar_c.corrupt(name, 3, clean, seed=1))
    blurs = ("defocus_blur", "zoom_blur")
    assert deterministic == (name in (*blurs, "brightness", "contrast", "pixelate", "jpeg_compression"))


@pytest.mark.parametrize("name", ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "contrast", "pixelate"])
def test_blurs_leave_constant_images_alone(name):
    grey = np.full((2, 32, 32, 3), 100, np.uint8)
    # Pixels are cut to whole numbers, as in the benchmark.
    assert np.abs(cifar_c.corrupt(name, 5, grey).astype(int) - 100).max() <= 1


def test_corruptions_with_known_values():
    grey = np.full((50, 32, 32, 3), 0.5, np.float32)
    rng = np.random.default_rng(0)
    assert abs(cifar_c.gaussian_noise(grey, 0.08, rng).std() - 0.08) < 5e-4
    assert abs(cifar_c.shot_noise(grey, 100, rng).std() - (0.5 / 100) ** 0.5) < 5e-4
    flipped = cifar_c.impulse_noise(grey, 0.05, rng)
    assert abs((flipped == 0).mean() - 0.025) < 2e-3
    assert abs((flipped == 1).mean() - 0.025) < 2e-3
    np.testing.assert_allclose(cifar_c.contrast(np.float32([[[[0.2]], [[0.6]]]]), 0.5, rng).ravel(), [0.3, 0.5])
    np.testing.assert_allclose(cifar_c.brightness(grey, 0.2, rng), 0.7, rtol=1e-6)
    # A point of light becomes weights that fall off to one side along the row.
    point = np.zeros((1, 32, 32, 1))
    point[0, 16, 16] = 1
    weights = np.exp(-(np.arange(13) ** 2) / 8) / np.exp(-(np.arange(13) ** 2) / 8).sum()
    smeared = cifar_c._smear(point, 6, 2.0, np.zeros(1))[0, :, :, 0]
    np.testing.assert_allclose(smeared[16, 4:17], weights[::-1])
    np.testing.assert_allclose(smeared.sum(), 1)


def test_corruption_names_and_arguments_are_checked(clean):
    assert [name for name in corruptions.CORRUPTIONS if name not in cifar_c.CORRUPTIONS] == ["frost"]
    assert list(cifar_c.CORRUPTIONS) == [name for name in corruptions.CORRUPTIONS if name != "frost"]
    with pytest.raises(ValueError, match="Unknown corruption 'frost'; there are gaussian_noise"):
        cifar_c.corrupt("frost", 1, clean)
    with pytest.raises(ValueError, match="severity must be 1 to 5; got 0"):
        cifar_c.corrupt("fog", 0, clean)
    with pytest.raises(ValueError, match=r"must be uint8\[n, 32, 32, 3\]; got float64"):
        cifar_c.corrupt("fog", 1, clean / 255)


def test_released_files_give_rows_and_their_means(tmp_path):
    """Four images, whose first pixel is the prediction, right as often as the file says."""
    labels = np.tile([1, 2, 3, 4], 5)
    np.save(tmp_path / "labels.npy", labels)
    for i, name in enumerate(corruptions.CORRUPTIONS):
        images = np.zeros((20, 32, 32, 3), np.uint8)
        images[:, 0, 0, 0] = labels
        images[19 - i :, 0, 0, 0] = 9  # Wrong from the last row of severity 5 on.
        np.save(tmp_path / f"{name}.npy", images)
    cells = corruptions.from_npy(tmp_path, batch_size=3)
    rows = list(corruptions.accuracy_rows(cells, lambda images: images[:, 0, 0, 0]))
    assert [(row["corruption"], row["severity"]) for row in rows] == list(
        itertools.product(corruptions.CORRUPTIONS, range(1, 6))
    )
    assert {row["examples"] for row in rows} == {4}
    assert [row["accuracy"] for row in rows[5:10]] == [1, 1, 1, 1, 0.5]
    summary = corruptions.summary(rows, clean_accuracy=0.8)
    assert summary["by_corruption"]["frost"] == (20 - 9) / 20
    assert summary["mean_corruption_accuracy"] == pytest.approx(1 - 8 / 20)
    assert summary["by_severity"]["5"] == pytest.approx((3 + 2 + 1) / 60)
    assert summary["relative_accuracy"] == pytest.approx(0.6 / 0.8)
    assert summary["missing"] == []
    json.dumps([rows, summary])
    (tmp_path / "fog.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"is not CIFAR-10-C as released: it lacks fog.npy\."):
        corruptions.from_npy(tmp_path, batch_size=3)


def test_computed_cells_lack_frost(clean, monkeypatch):
    kept = ("gaussian_noise", "contrast")
    monkeypatch.setattr(cifar_c, "CORRUPTIONS", {name: cifar_c.CORRUPTIONS[name] for name in kept})
    labels = np.arange(12) % 10
    rows = list(corruptions.accuracy_rows(corruptions.computed(clean, labels, 5), lambda images: np.zeros(len(images))))
    assert [row["accuracy"] for row in rows] == [2 / 12] * 10
    summary = corruptions.summary(rows, 0.5)
    assert list(summary["by_corruption"]) == list(kept)
    assert "frost" in summary["missing"]
    assert len(summary["missing"]) == 13


@pytest.mark.parametrize(
    ("name", "side", "glass"),
    [("cifar10_corrupted", 32, "frosted_glass_blur"), ("imagenet2012_corrupted", 40, "glass_blur")],
)
def test_corruptions_prepared_by_tfds(name, side, glass, tmp_path, monkeypatch):
    monkeypatch.setattr(corruptions, "CORRUPTIONS", ("glass_blur", "fog"))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, side, 3), np.uint8)
    rows = [{"image": encoded(x), "label": i} for i, x in enumerate(pixels)]
    split = "test" if side == 32 else "validation"
    missing = f"{name}/{glass}_5"
    for config in [f"{glass}_{s}" for s in range(1, 5)] + [f"fog_{s}" for s in range(1, 6)]:
        write_tfds(tmp_path / name / config / "1.0.0", image_features(), {split: rows})
    with pytest.raises(FileNotFoundError, match=rf"Of the 10 .*, 1 are not prepared .*tfds.data_source\('{missing}'"):
        corruptions.from_tfds(name, 4, tmp_path, image_size=32)
    write_tfds(tmp_path / missing / "1.0.0", image_features(), {split: rows})
    cells = list(corruptions.from_tfds(name, 4, tmp_path, image_size=32))
    assert [cell[:2] for cell in cells] == list(itertools.product(("glass_blur", "fog"), range(1, 6)))
    ((images, labels),) = cells[3].batches
    np.testing.assert_array_equal(labels, [0, 1, -1, -1])
    offset = (side - 32) // 2
    np.testing.assert_array_equal(images[:2], pixels[:, 4:36, offset : offset + 32])


# WMT

PAIRS = [
    ("The house is small.", "Das Haus ist klein."),
    ("The garden is large.", "Der Garten ist groß."),
    ("A street\u2028in the\rcity", "Eine Straße in der Stadt"),
    ("Yes", "Ja"),
    ("", "Leer"),
    ("A sentence that is rather longer than the others, by far", "Ein langer Satz"),
]
ODD = ["naïve 漢字 🙂", "tab\tand  two spaces", "<eos> is no token here", "x"]
SIZE = 300


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return wmt.vocabulary(tmp_path_factory.mktemp("bpe") / "bpe.json", PAIRS, SIZE)


@pytest.fixture(scope="module")
def token_pairs(tmp_path_factory, tokenizer):
    return wmt.tokenize(tmp_path_factory.mktemp("tokens") / "train.npz", PAIRS, tokenizer)


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


# Translation


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
