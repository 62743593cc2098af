"""Small data sets in the published layouts, written by hand."""

import gzip
import struct

import numpy as np


def idx(array):
    """The bytes of an IDX file of unsigned bytes."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write(path, content, packed):
    if packed:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


def made_up_digits():
    """Images and labels by part, uniform noise in the layout of MNIST."""
    rng = np.random.default_rng(0)
    images = {"train": rng.integers(0, 256, (30, 28, 28)), "t10k": rng.integers(0, 256, (12, 28, 28))}
    labels = {part: np.arange(len(x)) % 10 for part, x in images.items()}
    return images, labels


def write_mnist(root, images, labels, packed=False):
    folder = root / "mnist"
    folder.mkdir()
    for part in ("train", "t10k"):
        write(folder / f"{part}-images-idx3-ubyte", idx(images[part]), packed)
        write(folder / f"{part}-labels-idx1-ubyte", idx(labels[part]), packed)
    return folder


def made_up_table():
    """A table `(25, 4)` whose target is column 1, and 20 splits."""
    rng = np.random.default_rng(1)
    rows = rng.normal(3.0, 2.0, size=(25, 4))
    order = [rng.permutation(25) for _ in range(20)]
    return rows, [(o[5:], o[:5]) for o in order]


def write_uci(root, rows, splits, packed=False, name="boston"):
    folder = root / "uci" / name
    folder.mkdir(parents=True)
    texts = {
        "data.txt": "\n".join("  ".join(map(repr, row.tolist())) for row in rows) + "\n\n",
        "index_features.txt": "0\n2\n3\n",
        "index_target.txt": "1\n",
    }
    for k, (train, test) in enumerate(splits):
        # Two of the published forms: whole numbers, and numbers with a decimal point.
        texts[f"index_train_{k}.txt"] = "".join(f"{i}\n" for i in train)
        texts[f"index_test_{k}.txt"] = "".join(f"{i}.0\n" for i in test)
    for file, text in texts.items():
        write(folder / file, text.encode(), packed)
    return folder
