"""One computation beside the training."""

import gc
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch

from kronlaplace.optim.background import Background


@pytest.fixture
def background():
    made = Background()
    yield made
    made.close()


def test_a_result_is_taken_once_when_it_is_ready(background):
    go = threading.Event()

    def function(a, b):
        go.wait(10)
        return a + b

    assert background.result() is None and not background.pending
    background.submit(function, torch.ones(2), torch.ones(2))
    assert background.result() is None and background.pending
    go.set()
    assert torch.equal(background.wait(), torch.full((2,), 2.0))
    assert background.result() is None and background.wait() is None and not background.pending


def test_it_runs_in_one_thread_of_its_own_without_gradients(background):
    weight = torch.ones(1, requires_grad=True)
    threads = []
    for _ in range(3):
        background.submit(lambda w: threads.append(threading.current_thread()) or 2 * w, weight)
        assert not background.wait().requires_grad
    assert len({thread.ident for thread in threads}) == 1
    assert threads[0] is not threading.main_thread() and threads[0].daemon


def test_result_comes_without_a_wait(background):
    done = threading.Event()
    background.submit(lambda: done.set() or 3)
    done.wait(10)
    found = None
    for _ in range(100_000):
        if (found := background.result()) is not None:
            break
    assert found == 3


def test_an_error_surfaces_where_the_result_is_taken(background):
    def function():
        raise ValueError("layer '0' is singular")

    background.submit(function)
    with pytest.raises(ValueError, match="layer '0' is singular"):
        background.wait()
    assert not background.pending
    background.submit(lambda: 1)
    assert background.wait() == 1


def test_there_is_one_computation_at_a_time(background):
    background.submit(lambda: 1)
    with pytest.raises(RuntimeError, match=r"result has not been taken; call result\(\) or wait\(\)"):
        background.submit(lambda: 2)
    assert background.wait() == 1


def test_closing_ends_the_thread(background):
    threads = []
    background.submit(lambda: threads.append(threading.current_thread()))
    background.close()
    assert not threads[0].is_alive() and not background.pending and background.result() is None
    background.close()
    with pytest.raises(RuntimeError, match="closed"):
        background.submit(lambda: 1)


def test_what_nobody_uses_any_more_ends_its_thread():
    background, threads = Background(), []
    background.submit(lambda: threads.append(threading.current_thread()) or 1)
    background.wait()
    del background
    gc.collect()
    threads[0].join(10)
    assert not threads[0].is_alive()


def test_it_keeps_no_tensors(background):
    tensor = torch.ones(3)
    reference = weakref.ref(tensor)
    background.submit(lambda t: t.sum(), tensor)
    assert background.wait() == 3
    del tensor
    for _ in range(1000):  # the thread may not be past the job yet
        if reference() is None:
            break
        time.sleep(0.001)
    assert reference() is None


@pytest.mark.grid
def test_a_program_ends_while_something_is_computed():
    program = """
import torch
from kronlaplace.optim.background import Background
background = Background()
background.submit(lambda m: torch.linalg.inv(m), torch.eye(800))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
