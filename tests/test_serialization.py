"""Files: whole or refused, whoever writes at the same time and whatever happens to the bits."""

import os
import stat
import threading
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kronlaplace as kl
from kronlaplace._storage import load_tensors, save_tensors
from kronlaplace.likelihoods.base import LIKELIHOODS
from tests.support.networks import mlp

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16), "n": torch.tensor(5)}
VALUES = {"text": "δ", "list": [1, 2.5, None]}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.safetensors"


def test_what_is_written_is_read(path):
    save_tensors(path, "fisher", TENSORS, VALUES)
    tensors, values = load_tensors(path, "fisher", "cpu")
    assert values == VALUES
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], t) and tensors[name].dtype == t.dtype for name, t in TENSORS.items())


# -- many writers --------------------------------------------------------------------------------------------


@pytest.mark.grid
def test_threads_that_save_to_one_path(path):
    """Each is whole for every reader at any time, and nothing else is left in the folder."""
    n, errors = 8, []
    barrier = threading.Barrier(n)

    def work(index):
        try:
            barrier.wait()
            for _ in range(50):
                save_tensors(path, "fisher", {"t": torch.full((300, 100), float(index))}, {"index": index})
                tensors, values = load_tensors(path, "fisher", "cpu")
                assert (tensors["t"] == values["index"]).all()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert list(path.parent.iterdir()) == [path]


def test_every_save_has_a_name_of_its_own_in_the_same_folder(path, monkeypatch):
    """Also processes with the same number, on several machines that share a folder."""
    names = []

    def fail(tensors, file, metadata):
        names.append(file)
        assert file.exists() and file.parent == path.parent
        raise OSError("disk full")

    monkeypatch.setattr("kronlaplace._storage.save_file", fail)
    monkeypatch.setattr("os.getpid", lambda: 7)
    for _ in range(3):
        with pytest.raises(OSError, match="disk full"):
            save_tensors(path, "fisher", TENSORS, VALUES)
    assert len(set(names)) == 3
    assert list(path.parent.iterdir()) == []


# -- permissions and links -----------------------------------------------------------------------------------


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_permissions_are_those_of_any_new_file(path, mask):
    before = os.umask(mask)
    try:
        save_tensors(path, "fisher", TENSORS, VALUES)
        other = path.with_name("other")
        other.write_bytes(b"")
    finally:
        os.umask(before)
    assert mode_of(path) == mode_of(other)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_permissions_of_a_file_that_is_there_stay(path):
    save_tensors(path, "fisher", TENSORS, VALUES)
    path.chmod(0o640)
    save_tensors(path, "fisher", TENSORS, VALUES)
    assert mode_of(path) == 0o640


def test_a_file_that_may_not_be_written(path, monkeypatch):
    save_tensors(path, "fisher", TENSORS, VALUES)
    monkeypatch.setattr("os.access", lambda *args: False)  # as root everything may be written
    with pytest.raises(PermissionError, match="exists and is not writable"):
        save_tensors(path, "fisher", {}, VALUES)
    assert load_tensors(path, "fisher", "cpu")[0].keys() == TENSORS.keys()


@pytest.mark.skipif(os.name != "posix", reason="links need rights elsewhere")
@pytest.mark.parametrize("dangling", [False, True])
def test_links_stay_links(path, dangling):
    target = path.parent / "elsewhere" / "file"
    target.parent.mkdir()
    if not dangling:
        target.write_bytes(b"old")
    path.symlink_to(target)
    save_tensors(path, "fisher", TENSORS, VALUES)
    assert path.is_symlink() and not target.is_symlink()
    assert load_tensors(target, "fisher", "cpu")[1] == load_tensors(path, "fisher", "cpu")[1] == VALUES
    assert list(target.parent.iterdir()) == [target]


def test_a_folder_is_no_file(path):
    path.mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder; pass the name of a file"):
        save_tensors(path, "fisher", TENSORS, VALUES)
    assert list(path.iterdir()) == []


# -- likelihoods of the user's own ---------------------------------------------------------------------------


@pytest.fixture
def registry():
    with LIKELIHOODS.temporary():
        yield


@dataclass(frozen=True)
class Tempered(kl.Categorical):
    """A likelihood of the user's own, with a parameter."""

    power: float = 1.0


class Plain(kl.Categorical):
    """Another, without."""


def posterior_with(likelihood):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    return kl.KronLaplace(model, likelihood).fit([(torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))])


@pytest.mark.parametrize("likelihood", [Tempered(power=0.5), Plain()], ids=str)
def test_a_likelihood_of_the_users_own(likelihood, path, registry):
    """Unknown it is named, with what to do; then file of posterior and Fisher are read."""
    posterior = posterior_with(likelihood)
    posterior.save(path)
    name = type(likelihood).__name__
    with pytest.raises(
        ValueError, match=rf"the likelihood '{name}' is not registered; .* kl\.register_likelihood\({name}\)"
    ):
        kl.KronLaplace.load(path, posterior.model)
    assert kl.register_likelihood(type(likelihood)) is type(likelihood)
    assert kl.register_likelihood(type(likelihood)) is type(likelihood)  # once more, as a notebook does
    loaded = kl.KronLaplace.load(path, posterior.model)
    assert loaded.likelihood == likelihood and type(loaded.likelihood) is type(likelihood)
    posterior.fisher.save(path)
    assert kl.KroneckerFisher.load(path).metadata.likelihood == likelihood


def test_a_likelihood_that_has_other_parameters_now(path, registry):
    posterior = posterior_with(kl.register_likelihood(Tempered)(power=0.5))
    posterior.save(path)

    @dataclass(frozen=True)
    class Other(kl.Categorical):
        pass

    Other.__name__, Other.__qualname__ = Tempered.__name__, Tempered.__qualname__
    kl.register_likelihood(Other)
    with pytest.raises(ValueError, match=r"'Tempered' was saved with \{.*'power': 0.5\}, which it does not accept"):
        kl.KronLaplace.load(path, posterior.model)


def test_what_cannot_be_registered(registry):
    class WithInit(kl.Categorical):
        def __init__(self, power):
            object.__setattr__(self, "power", power)

    class Gaussian(kl.Categorical):
        pass

    for wrong in (kl.Categorical(), int, "Tempered"):
        with pytest.raises(TypeError, match=r"takes a class derived from kl\.Likelihood, got"):
            kl.register_likelihood(wrong)
    with pytest.raises(TypeError, match="WithInit must be a dataclass, since otherwise its parameters would"):
        kl.register_likelihood(WithInit)
    with pytest.raises(ValueError, match=r"there is already a likelihood 'Gaussian': kronlaplace.likelihoods.gaussian"):
        kl.register_likelihood(Gaussian)


def test_a_likelihood_that_json_cannot_hold(path):
    posterior = posterior_with(Tempered(power=torch.ones(2)))
    with pytest.raises(TypeError, match=r"cannot be saved: .*Its fields must be numbers, strings"):
        posterior.save(path)
    assert list(path.parent.iterdir()) == []


def test_another_dtype_than_that_of_the_fit(path):
    posterior = posterior_with("classification")
    posterior.save(path)
    expected = posterior.log_marginal_likelihood()
    with pytest.raises(
        ValueError, match=r"fitted in torch.float32, .* is in torch.float64.* posterior.to\(torch.float64\)"
    ):
        kl.KronLaplace.load(path, posterior.model.double())
    loaded = kl.KronLaplace.load(path, posterior.model.float()).to(torch.float64)
    torch.testing.assert_close(loaded.log_marginal_likelihood(), expected, rtol=1e-5, atol=0)


# -- damage --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A posterior, its file's content, and a place for damaged ones."""
    torch.manual_seed(0)
    case = mlp()
    place = tmp_path_factory.mktemp("saved") / "posterior"
    kl.KronLaplace(case.model, "classification").fit(case.batches()).save(place)
    return case.model, place.read_bytes(), place


REFUSED = (
    "is damaged: its contents do not match the checksum|not a complete safetensors file|kronlaplace did not write it"
)


@given(data=st.data())
def test_flipped_bits_are_noticed(saved, data):
    """Anywhere: in the header, its length, names, shapes, dtypes, padding, the values."""
    model, content, place = saved
    header = int.from_bytes(content[:8], "little")
    part = data.draw(st.sampled_from([(0, 8), (8, 8 + header), (8 + header, len(content))]))
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 2))):
        damaged[data.draw(st.integers(part[0], part[1] - 1))] ^= 1 << data.draw(st.integers(0, 7))
    place.write_bytes(damaged)
    if bytes(damaged) == content:
        return
    with pytest.raises(ValueError, match=REFUSED):
        kl.KronLaplace.load(place, model)


def test_a_changed_value_is_named_as_damage(saved):
    """The last bytes are values of a tensor; safetensors alone takes any."""
    model, content, place = saved
    place.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"is damaged: .* use another copy, or save the object again"):
        kl.KronLaplace.load(place, model)


def test_a_file_without_checksum_is_refused(saved):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    model, content, place = saved
    place.write_bytes(content)
    with safe_open(place, framework="pt") as file:
        header = file.metadata()["kronlaplace"]
    save_file(load_file(place), place, metadata={"kronlaplace": header})
    with pytest.raises(ValueError, match="is damaged"):
        kl.KronLaplace.load(place, model)
