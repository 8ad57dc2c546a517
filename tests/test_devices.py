"""Other devices than a CPU, with stand-ins where there is none at hand."""

import json
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import nanoreward as nr
from data import arithmetic
from tests.conftest import ROOT, rough, tiny


class NoFloat64(TorchDispatchMode):
    """Stands in for one of Apple's GPUs, which has no float64: it may be drawn and converted."""

    def __init__(self):
        super().__init__()
        self.drawn = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket.__name__
        self.drawn += name == "rand"
        if name not in ("rand", "_to_copy"):
            for x in tree_leaves((args, kwargs, out)):
                assert not isinstance(x, torch.Tensor) or x.dtype != torch.float64, operation
        return out


def updates(name):
    """The metrics of two updates of a method on random weights, and the policy that they leave."""
    c = tiny(name, updates=2, prompts=4, samples=4)
    c = nr.replace(c, rounds=1) if name == "iterative_dpo" else c
    task = arithmetic.make(c)
    # Random weights are never right, but their responses have several lengths.
    object.__setattr__(task, "grade", lambda prompt, response: float(len(response) % 2))
    policy = rough(nr.replace(c, causal=name != "denoise"))
    start = [p.clone() for p in policy.parameters()]
    state = nr.METHODS[name].start(policy, c)
    metrics = [m | {"samples": 0} for m in nr.METHODS[name].loop(state, task, c)]
    changed = [not torch.equal(p, q) for p, q in zip(start, policy.parameters(), strict=True)]
    assert sum(changed) > 5
    return metrics, policy


@pytest.mark.parametrize("name", ["ppo", "iterative_dpo", "denoise"])
def test_apples_gpus_get_no_float64_and_the_numbers_stay(name, monkeypatch):
    expected, policy = updates(name)
    monkeypatch.setattr(torch.Tensor, "is_mps", True)
    with NoFloat64() as device:
        found, other = updates(name)
    assert device.drawn >= 1 and len(found) == len(expected) == 2
    for x, y in zip(expected, found, strict=True):
        assert x.keys() == y.keys() and len(x) > 5
        for key, value in x.items():
            assert y[key] == pytest.approx(value, abs=1e-4), key
    for p, q in zip(policy.parameters(), other.parameters(), strict=True):
        assert (p - q).abs().max() < 1e-4


def test_without_the_stand_in_there_is_float64():
    with pytest.raises(AssertionError), NoFloat64():
        updates("ppo")


def test_the_script_for_a_gpu_keeps_to_its_time(tmp_path):
    argv = [sys.executable, "tests/bench/gpu.py", "decode", "--config", "smoke", "--limit", "0"]
    argv += ["--out", str(tmp_path / "gpu.json"), "--cache", str(tmp_path / "cache")]
    run = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["decode 1"] == found["operations/s and bytes/s"] == "no time was left"


def test_the_script_for_a_gpu_measures_all_methods_in_a_dry_run(tmp_path):
    argv = [sys.executable, "tests/bench/gpu.py", "loops", "--config", "smoke"]
    argv += ["--out", str(tmp_path / "gpu.json"), "--cache", str(tmp_path / "cache")]
    run = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert run.returncode == 0, found
    for name in nr.METHODS:
        measured = found[f"loops {name}"]
        assert measured["seconds an update"] > 0, name
        assert 0 < measured["of it sampling"] < 1, name
