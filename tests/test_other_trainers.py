"""Taking a run elsewhere: transformers loads its folder, and TRL trains it with our grader."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

import nanoreward as nr
import train_small as front
from data import sums
from tests.conftest import ROOT
from tests.test_sums import write_chat_folder

if find_spec("trl") is None:  # it is used by other processes, and to import it takes long
    pytest.skip("trl is not installed", allow_module_level=True)
# The two examples of data/README.md: a script for TRL, and a reward for verl.
EXAMPLES = re.findall(r"```python\n(.+?)```", (ROOT / "data" / "README.md").read_text(), re.S)
# A step of TRL is compared with what our grader says of the ids that TRL has sampled. Its groups
# are larger than in the example, because so weak a model is rarely right.
WATCHED = """
seen = []
def watched(prompts, completion_ids, **rest):
    seen.append((prompts, completion_ids, reward(prompts, completion_ids, **rest)))
    return seen[-1][-1]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run of ppo, runs/x. Its tiny model answers with some digit."""
    path = tmp_path_factory.mktemp("other")
    model = write_chat_folder(path / "tiny")
    numbers = {"task": "sums", "model": str(model), "max_ops": 1, "largest": 9, "response": 32}
    policy = nr.Transformer.load(model)
    c = nr.PPOConfig(**vars(policy.config), **numbers)
    task = sums.make(c)
    prompts = task.prompts(64, nr.rng(0, "prompts"))
    responses = [f"{i % 10}<eos>" for i in range(64)]
    demos = nr.encode_demos(task, list(zip(prompts, responses, strict=True)), c)
    x = nr.left_pad([x for x, _ in demos], c.pad_id)
    y = nr.right_pad([y for _, y in demos], c.pad_id, 2)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    for _ in range(40):
        loss = nr.nll_loss(nr.token_logprobs(policy, x, y, 1.0), torch.ones_like(y), y.numel())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1.3  # ln(10) / 2 for a digit that cannot be known and an end that can
    policy.save(path / "taught")
    shutil.copy(model / "tokenizer_config.json", path / "taught")
    shutil.copy(model / "tokenizer.json", path / "taught")
    flags = "--config smoke --task sums --max-ops 1 --largest 9 --response 32 --updates 1".split()
    flags += ["--model", str(path / "taught"), "--out", str(path / "runs" / "x")]
    assert front.main(["ppo", *flags, "--cache", str(path / "cache")]) == 0
    return path


def test_transformers_reads_the_folder_of_a_run(place):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = place / "runs" / "x" / "models" / "ppo-0"
    ours, theirs = nr.Transformer.load(folder), AutoModelForCausalLM.from_pretrained(folder)
    task = front.make_task(front.open_run(place / "runs" / "x").configs["ppo"])
    words = AutoTokenizer.from_pretrained(folder)
    prompts = task.prompts(8, nr.rng(0, "prompts"), "test")
    for prompt in prompts:
        ids = nr.encode_prompts(task, [prompt], ours.config)
        assert words(prompt, return_tensors="pt").input_ids.tolist() == ids.tolist()
        with torch.no_grad():
            torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)


def test_trl_takes_a_step_with_our_grader(place):
    script = EXAMPLES[0]
    assert "max_steps=1," in script and '"runs/x/models/ppo-0", reward,' in script
    script = script.replace("max_steps=1,", "max_steps=1, per_device_train_batch_size=64,")
    script = script.replace('ppo-0", reward,', 'ppo-0", watched,')
    script = script.replace("args = GRPOConfig", WATCHED + "\nargs = GRPOConfig")
    script += "\nimport json; json.dump(seen, open('seen.json', 'w'))\n"
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    argv = [sys.executable, "-c", script]
    run = subprocess.run(argv, cwd=place, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    task = front.make_task(front.open_run(place / "runs" / "x").configs["ppo"])
    [(prompts, ids, rewards)] = json.loads((place / "seen.json").read_text())
    assert len(prompts) == len(ids) == len(rewards) == 64
    for prompt, response, reward in zip(prompts, ids, rewards, strict=True):
        assert reward == task.grade(prompt, task.decode(response))
    assert 0 < sum(rewards) < 64
    before = nr.Transformer.load(place / "runs" / "x" / "models" / "ppo-0").state_dict()
    after = nr.Transformer.load(place / "runs" / "trl").state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    for name in before:
        torch.testing.assert_close(before[name], after[name], atol=1e-3, rtol=0)


def test_a_reward_for_verl_is_the_grader_on_text(place, monkeypatch):
    monkeypatch.chdir(place)
    told = {}
    exec(EXAMPLES[1], told)
    score = told["compute_score"]
    task = told["task"]
    for prompt in task.prompts(20, nr.rng(0, "prompts")):
        right = task.solution(prompt).removesuffix("<eos>")
        row = {"prompt": prompt}
        assert score("sums", right, task.truth(prompt), row) == 1
        assert score("sums", right + "1", task.truth(prompt), row) == 0
        assert score("sums", "", task.truth(prompt), row) == 0
