"""The command line from end to end, on short recipes; errors are one line and exit code 2."""

import csv
import io
import os
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import kronlaplace as kl
from kronlaplace.cli import main
from kronlaplace.demo import classification, fitting, regression
from kronlaplace.demo.datasets import EMBEDDED
from tests.support.demo_files import made_up_digits, made_up_table, write_mnist, write_uci

REAL_DATA = os.environ.get("KRONLAPLACE_DATA")


@pytest.fixture(autouse=True)
def no_data_variable(monkeypatch):
    monkeypatch.delenv("KRONLAPLACE_DATA", raising=False)


@pytest.fixture
def short(monkeypatch):
    """A hundredth of the training."""
    shorten(monkeypatch)


def shorten(monkeypatch):
    networks = {
        name: (network, replace(recipe, steps=20), title)
        for name, (network, recipe, title) in classification._NETWORKS.items()
    }
    monkeypatch.setattr(classification, "_NETWORKS", networks)
    monkeypatch.setattr(regression, "RECIPE", replace(regression.RECIPE, steps=50))
    recipes = {name: replace(recipe, steps=50) for name, recipe in regression.EMBEDDED_RECIPES.items()}
    monkeypatch.setattr(regression, "EMBEDDED_RECIPES", recipes)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The exit code, folder, and what a short run on digits prints, for tests that only read them."""
    out, printed, errors = tmp_path_factory.mktemp("out"), io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), redirect_stderr(errors):
        shorten(patch)
        code = main(["demo", "--dataset", "digits", "--out", str(out)])
    return code, out / "digits", printed.getvalue(), errors.getvalue()


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


METHODS = ["MAP", "Laplace, last layer", "Laplace, all layers"]


def numbers(row):
    return np.array([float(value) for key, value in row.items() if key != "method"])


def listed(printed):
    """The files that a run says it wrote."""
    return next(line for line in printed.splitlines() if "; wrote " in line).rpartition(": ")[2]


def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


class TestDemo:
    @pytest.mark.grid
    def test_classification_writes_what_it_prints(self, digits):
        code, folder, printed, errors = digits
        assert code == 0
        rows = read(folder / "table.csv")
        assert [row["method"] for row in rows] == METHODS
        assert list(rows[0]) == ["method", "accuracy", "nll", "brier", "ece", "ood_auroc"]
        markdown = (folder / "table.md").read_text()
        for row in rows:
            for text in (printed, markdown):
                line = next(line for line in text.splitlines() if line.strip("| ").startswith(row["method"]))
                written = [float(word) for word in line.replace("|", " ").removeprefix(" ").split()[-5:]]
                np.testing.assert_allclose(written, numbers(row), atol=6e-5)
        assert "turned by 90 degrees" in printed
        assert "predictive entropy" in printed
        assert errors == ""
        assert is_png(folder / "reliability.png")
        assert is_png(folder / "turned.png")
        assert sorted(file.name for file in folder.iterdir()) == sorted(re.findall(r"[\w.]+\.\w+", listed(printed)))

    @pytest.mark.grid
    def test_posterior_files_hold_all_layers_and_the_last(self, digits):
        _, folder, _, _ = digits
        everything = load_file(folder / "posterior.safetensors")
        last = load_file(folder / "posterior_last_layer.safetensors")
        assert {name.split("/")[1] for name in everything if name.startswith("mean/")} == {"0", "3", "7", "9"}
        assert {name.split("/")[1] for name in last if name.startswith("mean/")} == {"9"}

    @pytest.mark.grid
    def test_scores_are_those_of_the_saved_posterior(self, digits):
        """The Laplace row again, from the file, the network rebuilt from its weights."""
        from kronlaplace.demo.datasets import load

        data = load("digits")
        _, folder, _, _ = digits
        path = folder / "posterior.safetensors"
        model = classification._NETWORKS["digits"][0]().eval()
        tensors = load_file(path)
        with torch.no_grad():
            for name in ("0", "3", "7", "9"):
                matrix = tensors[f"mean/{name}"]
                layer = model[int(name)]
                layer.weight.copy_(matrix[:, :-1].reshape(layer.weight.shape))
                layer.bias.copy_(matrix[:, -1])
            posterior = kl.KronLaplace.load(path, model)
            probabilities = posterior.predict(data.test_x).numpy()
            map_probabilities = model(data.test_x).softmax(1).numpy()
        rows = {row["method"]: row for row in read(folder / "table.csv")}
        labels = data.test_y.numpy()
        for p, method in ((map_probabilities, "MAP"), (probabilities, "Laplace, all layers")):
            assert kl.metrics.negative_log_likelihood(p, labels) == pytest.approx(float(rows[method]["nll"]), rel=1e-4)

    @pytest.mark.grid
    def test_one_dimensional_regression_draws_its_band(self, short, tmp_path, capsys):
        assert main(["demo", "--dataset", "sine", "--out", str(tmp_path)]) == 0
        folder = tmp_path / "sine"
        assert [row["method"] for row in read(folder / "table.csv")] == METHODS
        assert list(read(folder / "table.csv")[0]) == [
            *("method", "rmse", "log_likelihood", "coverage_50", "coverage_90", "coverage_95")
        ]
        assert (folder / "posterior.safetensors").is_file()
        assert is_png(folder / "reliability.png")
        assert is_png(folder / "predictive_band.png")
        out = capsys.readouterr().out
        assert "maximum likelihood on the training residuals" in out
        assert "log marginal likelihood" in out

    @pytest.mark.grid
    def test_two_classes_have_one_output(self, short, tmp_path):
        assert main(["demo", "--dataset", "moons", "breast-cancer", "--out", str(tmp_path)]) == 0
        for name, picture in (("moons", "plane.png"), ("breast-cancer", "reliability.png")):
            assert [row["method"] for row in read(tmp_path / name / "table.csv")] == METHODS
            assert load_file(tmp_path / name / "posterior.safetensors")["mean/2"].shape == (1, 51)
            assert is_png(tmp_path / name / picture)
        assert not (tmp_path / "breast-cancer" / "plane.png").exists()

    @pytest.mark.grid
    def test_default_is_all_that_need_no_file(self, short, tmp_path, capsys):
        assert main(["demo", "--out", str(tmp_path)]) == 0
        out = capsys.readouterr().out
        assert [line.partition(":")[0] for line in out.splitlines() if "; default estimator on " in line] == [*EMBEDDED]
        assert sorted(folder.name for folder in tmp_path.iterdir()) == sorted(EMBEDDED)

    @pytest.mark.grid
    def test_the_library_s_defaults_are_used(self, short, tmp_path, monkeypatch):
        """No option reaches the posterior but the layers, and the estimator if it is asked for."""
        calls = []

        class Recorder(kl.KronLaplace):
            def __init__(self, model, likelihood, *args, **kwargs):
                calls.append((args, kwargs))
                super().__init__(model, likelihood, *args, **kwargs)

            def tune(self, *args, **kwargs):
                calls.append((args, kwargs))
                return super().tune(*args, **kwargs)

            def predict(self, x, *args, **kwargs):
                calls.append((args, kwargs))
                return super().predict(x, *args, **kwargs)

        monkeypatch.setattr(fitting, "KronLaplace", Recorder)
        main(["demo", "--dataset", "wine", "sine", "--out", str(tmp_path)])
        assert all(call in [((), {}), ((), {"layers": "last"})] for call in calls)
        calls.clear()
        main(["demo", "--dataset", "wine", "--estimator", "ekfac", "--out", str(tmp_path)])
        assert [args for args, _ in calls if args] == [("ekfac",), ("ekfac",)]

    @pytest.mark.grid
    def test_same_seed_same_table(self, short, tmp_path):
        tables = []
        for out, seed in (("a", 0), ("b", 0), ("c", 1)):
            arguments = [
                "--dataset",
                "diabetes",
                "--dataset",
                "wine",
                "--seed",
                str(seed),
                "--out",
                str(tmp_path / out),
            ]
            main(["demo", *arguments])
            tables.append([(tmp_path / out / name / "table.md").read_text() for name in ("diabetes", "wine")])
        assert tables[0] == tables[1]
        assert tables[0][0] != tables[2][0]
        assert tables[0][1] != tables[2][1]

    @pytest.mark.grid
    def test_the_seed_decides_the_initial_weights(self, short, tmp_path, monkeypatch):
        network, recipe, title = classification._NETWORKS["wine"]
        whole = replace(recipe, steps=1, batch_size=10_000)  # one batch: its order is of no matter
        monkeypatch.setattr(classification, "_NETWORKS", {"wine": (network, whole, title)})
        nll = []
        for seed in ("0", "1"):
            main(["demo", "--dataset", "wine", "--seed", seed, "--out", str(tmp_path / seed)])
            nll.append(float(read(tmp_path / seed / "wine" / "table.csv")[0]["nll"]))
        assert abs(nll[0] - nll[1]) > 1e-3

    @pytest.mark.grid
    def test_global_state_is_left_alone(self, short, tmp_path):
        states = torch.get_rng_state(), np.random.get_state()[1].tolist(), torch.get_num_threads()  # noqa: NPY002
        main(["demo", "--dataset", "diabetes", "wine", "--out", str(tmp_path)])
        assert torch.equal(torch.get_rng_state(), states[0])
        assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
        assert torch.get_num_threads() == states[2]

    @pytest.mark.grid
    def test_mnist_from_a_directory(self, short, tmp_path):
        write_mnist(tmp_path, *made_up_digits(), packed=True)
        arguments = ["--dataset", "mnist", "--data-dir", str(tmp_path), "--out", str(tmp_path / "out")]
        assert main(["demo", *arguments]) == 0
        assert len(read(tmp_path / "out" / "mnist" / "table.csv")) == 3

    @pytest.mark.grid
    def test_uci_cells_are_mean_and_standard_error_over_splits(self, short, tmp_path, capsys):
        write_uci(tmp_path, *made_up_table())
        arguments = [
            "--dataset",
            "boston",
            "--splits",
            "3",
            "--data-dir",
            str(tmp_path),
            "--out",
            str(tmp_path / "out"),
        ]
        assert main(["demo", *arguments]) == 0
        folder = tmp_path / "out" / "boston"
        by_split = read(folder / "splits.csv")
        for row in read(folder / "table.csv"):
            values = [float(r["rmse"]) for r in by_split if r["method"] == row["method"]]
            assert len(values) == 3
            assert float(row["rmse"]) == pytest.approx(np.mean(values), rel=1e-5)
            error = np.std(values, ddof=1) / np.sqrt(3)
            assert float(row["rmse_standard_error"]) == pytest.approx(error, rel=1e-4)
            assert f"{np.mean(values):.3f} ± {error:.3f}" in (folder / "table.md").read_text()
        assert sorted(file.name for file in folder.glob("posterior*")) == [
            f"posterior_split_0{k}.safetensors" for k in range(3)
        ]
        assert "posterior_split_00.safetensors to posterior_split_02.safetensors" in capsys.readouterr().out

    @pytest.mark.grid
    def test_regression_map_row_by_hand(self, short, tmp_path):
        """RMSE, log-likelihood and coverage of the MAP in original units, from the saved weights."""
        from scipy import stats

        rows, splits = made_up_table()
        write_uci(tmp_path, rows, splits)
        arguments = [
            "--dataset",
            "boston",
            "--splits",
            "1",
            "--data-dir",
            str(tmp_path),
            "--out",
            str(tmp_path / "out"),
        ]
        main(["demo", *arguments])
        tensors = load_file(tmp_path / "out" / "boston" / "posterior.safetensors")
        first, second = (tensors[f"mean/{name}"].double().numpy() for name in ("0", "2"))
        (train, test), x, y = splits[0], rows[:, [0, 2, 3]], rows[:, 1]
        z = (x - x[train].mean(0)) / x[train].std(0)
        hidden = np.maximum(z @ first[:, :-1].T + first[:, -1], 0)
        prediction = y[train].mean() + y[train].std() * (hidden @ second[0, :-1] + second[0, -1])
        noise = np.sqrt(np.mean((prediction - y)[train] ** 2))
        row = read(tmp_path / "out" / "boston" / "table.csv")[0]
        assert float(row["rmse"]) == pytest.approx(np.sqrt(np.mean((prediction - y)[test] ** 2)), rel=1e-4)
        density = stats.norm(prediction[test], noise).logpdf(y[test]).mean()
        assert float(row["log_likelihood"]) == pytest.approx(density, rel=1e-4)
        low, high = stats.norm(prediction[test], noise).interval(0.5)
        assert float(row["coverage_50"]) == pytest.approx(np.mean((low <= y[test]) & (y[test] <= high)))

    def test_without_matplotlib_only_the_pictures_are_missing(self, short, tmp_path, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        assert main(["demo", "--dataset", "sine", "--out", str(tmp_path)]) == 0
        out = capsys.readouterr().out
        assert out.splitlines()[0] == (
            "No pictures are drawn: matplotlib is not installed (pip install 'kronlaplace[experiments]')."
        )
        assert sorted(file.name for file in (tmp_path / "sine").iterdir()) == [
            *("posterior.safetensors", "table.csv", "table.md")
        ]

    @pytest.mark.grid
    def test_pyplot_is_never_imported(self, tmp_path):
        """In a process of its own: pyplot would bring global state and a choice of window system."""
        code = (
            "import sys; from kronlaplace.demo import pictures; import numpy as np, pathlib;"
            "g = np.linspace(.1, .9, 5); pictures.draw_coverage(pathlib.Path(sys.argv[1]), 't', g, {'MAP': g[None]});"
            "sys.exit('matplotlib.pyplot' in sys.modules)"
        )
        picture = tmp_path / "coverage.png"
        assert subprocess.run([sys.executable, "-c", code, str(picture)], check=False).returncode == 0
        assert is_png(picture)


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--dataset", "digit"], "unknown data set 'digit'. Did you mean 'digits'? Known: digits, moons,"),
            (["--dataset", "digits", "mnist"], "'mnist' is not embedded: give --data-dir DIR"),
            (["--dataset", "boston", "--data-dir", "nowhere"], "no data directory nowhere; 'boston' needs a folder"),
            (["--estimator", "kfak"], "unknown estimator 'kfak'. Did you mean 'kfac'? Known: kfac"),
            (["--seed", "-1"], "argument --seed: '-1' is not a whole number from 0 to 4294967295"),
            (["--seed", "one"], "'one' is not a whole number"),
            (["--splits", "21"], "argument --splits: '21' is not a whole number from 1 to 20"),
            (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
            (["--datasets-of-all-kinds"], "unrecognized arguments: --datasets-of-all-kinds"),
        ],
    )
    def test_one_line_and_exit_code_2(self, short, tmp_path, monkeypatch, capsys, arguments, message):
        monkeypatch.chdir(tmp_path)
        assert main(["demo", *arguments]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert message in printed.err
        assert printed.err.count("\n") == 1
        assert printed.err.startswith("kronlaplace")
        assert list(tmp_path.iterdir()) == []  # found before any folder was made or network trained

    def test_output_folder_that_cannot_be_made(self, tmp_path, capsys):
        (tmp_path / "file").write_text("in the way")
        assert main(["demo", "--out", str(tmp_path / "file")]) == 2
        assert "cannot make the output folder" in capsys.readouterr().err

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
    def test_cuda_that_is_not_there(self, tmp_path, capsys):
        assert main(["demo", "--device", "cuda", "--out", str(tmp_path)]) == 2
        assert "no CUDA device is available" in capsys.readouterr().err

    def test_interrupted(self, tmp_path, monkeypatch, capsys):
        def interrupt(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr("kronlaplace.cli.run_demo", interrupt)
        assert main(["demo", "--out", str(tmp_path)]) == 130
        assert capsys.readouterr().err == "kronlaplace demo: interrupted\n"


class TestProgram:
    def test_version(self, capsys):
        assert main(["--version"]) == 0
        assert capsys.readouterr().out == f"kronlaplace {kl.__version__}\n"

    def test_without_a_command_it_shows_the_help(self, capsys):
        assert main([]) == 2
        assert "demo" in capsys.readouterr().err

    def test_help_names_the_data_sets(self, capsys):
        assert main(["demo", "--help"]) == 0
        out = capsys.readouterr().out
        assert "sine" in out
        assert "wine-quality-red" in out

    @pytest.mark.grid
    def test_python_m(self, tmp_path):
        run = subprocess.run(
            [sys.executable, "-m", "kronlaplace", "demo", "--dataset", "digit"],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
        assert run.returncode == 2
        assert run.stdout == ""
        assert run.stderr.count("\n") == 1


class TestQuality:
    """The full recipes reach what the README says."""

    @pytest.mark.grid
    def test_the_posterior_of_digits_helps(self, tmp_path):
        """Without an option, over all layers: as certain as the network on digits, less on digits that are turned."""
        main(["demo", "--dataset", "digits", "--out", str(tmp_path)])
        at_map, _, laplace = read(tmp_path / "digits" / "table.csv")
        assert float(at_map["accuracy"]) > 0.96
        assert float(laplace["nll"]) < 1.05 * float(at_map["nll"])
        assert float(laplace["ece"]) < float(at_map["ece"]) + 0.01
        assert float(laplace["ood_auroc"]) > float(at_map["ood_auroc"])

    @pytest.mark.grid
    @pytest.mark.parametrize("name", ["moons", "breast-cancer", "wine"])
    def test_inputs_far_from_the_data_are_told_apart(self, tmp_path, name):
        main(["demo", "--dataset", name, "--out", str(tmp_path)])
        at_map, _, laplace = read(tmp_path / name / "table.csv")
        assert float(at_map["accuracy"]) > 0.95
        assert float(laplace["ood_auroc"]) > float(at_map["ood_auroc"]) + 0.2
        assert float(laplace["nll"]) < float(at_map["nll"]) + 0.02

    @pytest.mark.grid
    def test_laplace_covers_the_gap_of_the_sine(self, tmp_path):
        main(["demo", "--dataset", "sine", "--out", str(tmp_path)])
        at_map, _, laplace = (numbers(row) for row in read(tmp_path / "sine" / "table.csv"))
        assert laplace[1] > at_map[1] + 0.05  # test log-likelihood
        assert at_map[4] < 0.9 < laplace[4]  # coverage of the 95 % interval

    @pytest.mark.slow
    @pytest.mark.skipif(not REAL_DATA, reason="set KRONLAPLACE_DATA to a folder with mnist/")
    def test_mnist(self, tmp_path):
        assert main(["demo", "--dataset", "mnist", "--data-dir", REAL_DATA, "--out", str(tmp_path)]) == 0
        scores = {row["method"]: row for row in read(tmp_path / "mnist" / "table.csv")}
        at_map, laplace = scores["MAP"], scores["Laplace, all layers"]
        assert float(at_map["accuracy"]) >= 0.985
        assert float(laplace["accuracy"]) >= 0.985
        assert float(laplace["ood_auroc"]) >= float(at_map["ood_auroc"])
        assert float(laplace["nll"]) < 1.05 * float(at_map["nll"])
        assert float(laplace["ece"]) < float(at_map["ece"]) + 0.01

    @pytest.mark.skipif(not REAL_DATA, reason="set KRONLAPLACE_DATA to a folder with uci/")
    def test_boston(self, tmp_path):
        arguments = ["--dataset", "boston", "--splits", "3", "--data-dir", REAL_DATA, "--out", str(tmp_path)]
        assert main(["demo", *arguments]) == 0
        at_map, _, laplace = (float(row["log_likelihood"]) for row in read(tmp_path / "boston" / "table.csv"))
        assert laplace > at_map
        assert laplace > -2.7  # MC dropout on all splits: -2.40 ± 0.04
