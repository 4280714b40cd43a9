"""The tests' own option --gpu: without it no test sees a GPU, with it each does."""

import os
import sys

import pytest
from conftest import DEVICE, GPUS, devices, run

PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--gpu", __file__)


def test_a_gpu_is_hidden_without_the_option(request):
    """From this process and its programs, and only then."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    assert hidden != request.config.getoption("--gpu") and hidden == (not GPUS)
    assert DEVICE[1] == ("cpu" if hidden else "cuda")
    flags, environment = devices(1)
    assert ("--cpu" in flags) == ("CUDA_VISIBLE_DEVICES" in environment) == hidden
    assert devices(GPUS + 1)[1] == {"CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.cpu("it asserts that there is no GPU")
def test_a_test_for_a_cpu_alone():
    assert not GPUS


def test_without_a_gpu_the_option_is_an_error():
    done = run(*PYTEST, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 4 and not done.stdout
    assert done.stderr == (
        "ERROR: --gpu: PyTorch finds no GPU here; leave it out to test on the CPU\n\n"
    )


def test_with_a_gpu_the_workers_see_it(tmp_path):
    """One is claimed to be there, in pytest and in its worker."""
    (tmp_path / "claim.py").write_text("import torch\ntorch.cuda.device_count = lambda: 1\n")
    words = ("-p", "claim", "-n", "1", "-rs", "-k", "hidden or alone")
    done = run(*PYTEST, *words, PYTHONPATH=tmp_path, CUDA_VISIBLE_DEVICES="0")
    assert "for a CPU alone: it asserts that there is no GPU" in done.stdout, done.stdout
    assert "1 passed, 1 skipped" in done.stdout and done.returncode == 0, done.stdout
