"""Small data sets on disk, written as TFDS writes them, without TensorFlow."""

import io

from PIL import Image


def write_tfds(folder, features, splits):
    """A data set as TFDS prepares it, in array_record, without TensorFlow."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    def serialized(row):
        example = tf_example_pb2.Example()
        for name, value in row.items():
            feature = example.features.feature[name]
            (feature.bytes_list if isinstance(value, bytes) else feature.int64_list).value.append(value)
        return example.SerializeToString()

    folder.mkdir(parents=True)
    for split, rows in splits.items():
        writer = ArrayRecordWriter(str(folder / f"data-{split}.array_record-00000-of-00001"), "group_size:1")
        for row in rows:
            writer.write(serialized(row))
        writer.close()
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        split_infos=[tfds.core.SplitInfo(name=s, shard_lengths=[len(rows)], num_bytes=0) for s, rows in splits.items()],
        filename_template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        check_data=False,
    )


def encoded(pixels, form="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def image_features():
    import tensorflow_datasets as tfds

    return {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=10)}
