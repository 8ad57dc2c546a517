"""NaN, infinity and flipped bits: one line that names where, and the last good state stays."""

import random
import shutil

import pytest
import torch

import nanoreward as nr
import train_small as front
from data.arithmetic import Arithmetic
from tests.conftest import rough, tiny

TASK = Arithmetic(1, 1)


class Judge(Arithmetic):
    """A grader that gives one response of the second update a number that is none."""

    def __init__(self, number, after):
        super().__init__(1, 1)
        object.__setattr__(self, "number", number)
        object.__setattr__(self, "left", [after])

    def grade(self, prompt, response):
        self.left[0] -= 1
        return self.number if self.left[0] == 0 else float(len(response) % 2 == 0)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["ppo", "iterative_dpo", "refine", "denoise"])
def test_a_grade_that_is_no_number_is_one_line_that_names_the_response(name, number):
    c = tiny(name)
    state = nr.METHODS[name].start(rough(nr.replace(c, causal=name != "denoise")), c)
    before = [p.clone() for p in state.policy.parameters()]
    with pytest.raises(nr.UserError, match=f"reward of the response .* is {number}") as error:
        list(nr.METHODS[name].loop(state, Judge(number, after=7), c))
    assert "learning rate" not in str(error.value) and "\n" not in str(error.value)
    assert all(torch.equal(x, p) for x, p in zip(before, state.policy.parameters(), strict=True))


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_a_token_reward_that_is_no_number_is_one_line_that_names_the_response(number):
    c = tiny("ppo")
    state = nr.start_ppo(rough(c), c)
    seen = []

    def signal(state, task, b, truth, c):
        reward = nr.at_end(truth, b, c)
        reward[5, 0] = number
        seen.append(task.decode(b.response[5].tolist()))
        return reward

    with pytest.raises(nr.UserError) as error:
        next(nr.ppo(state, TASK, c, signal))
    assert repr(seen[0][:80]) in str(error.value) and f"is {number}" in str(error.value)


def test_an_infinite_score_of_a_judge_is_refused_and_a_missing_one_is_not():
    c = tiny("iterative_dpo")

    def rounds(number):
        def judge(state, task, b, c, u):
            score = (b.mask.sum(1) % 2).float()
            score[3] = number
            return score, {}

        state = nr.start_rounds(rough(c), c)
        return next(nr.iterative_dpo(state, TASK, c, judge=judge))

    assert rounds(float("nan"))["pairs"] > 0
    with pytest.raises(nr.UserError, match="reward of the response"):
        rounds(float("inf"))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("causal", [True, False])
def test_logits_that_are_no_numbers_are_one_line(causal, temperature):
    c = nr.replace(tiny("denoise"), causal=causal, temperature=temperature)
    model = rough(c)
    with torch.no_grad():
        model.lm_head.weight[9, 0] = torch.nan
    prompt = nr.encode_prompts(TASK, ["3+4="], c)
    with pytest.raises(nr.UserError, match="logits are not finite"):
        nr.sample(model, prompt, c, generator=nr.rng(0, "s"))


# ---- group advantages and whitening --------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mean", "grpo", "rloo"])
@pytest.mark.parametrize("reward", [1e-30, 0.35, 13.7, 1000.1, -1000.3, 100000.3, -3e30])
@pytest.mark.parametrize("n", [3, 8, 12, 61])
def test_equal_rewards_give_exactly_zero_at_any_scale(reward, n, kind):
    group = torch.arange(2).repeat(n)
    other = torch.randn(n, generator=nr.rng(n, "other"))
    both = torch.stack([torch.full((n,), reward), other], dim=1).flatten()
    adv = nr.group_advantage(both, group, kind)
    assert (adv[group == 0] == 0).all()
    assert torch.allclose(adv[group == 1], nr.group_advantage(other, 0 * group[:n], kind))
    mask = torch.ones(4, n)
    mask[1:, 1:] = 0
    assert (nr.whiten(torch.full((4, n), reward), mask) == 0).all()


@pytest.mark.parametrize("kind", ["mean", "grpo", "rloo"])
def test_a_reward_that_was_not_given_counts_for_nothing(kind):
    nan = torch.nan
    reward = torch.tensor([1.0, 0.0, nan, 1.0, nan, nan])
    group = torch.tensor([0, 0, 0, 0, 1, 1])
    adv = nr.group_advantage(reward, group, kind)
    alone = nr.group_advantage(reward[[0, 1, 3]], group[[0, 1, 3]], kind)
    assert torch.equal(adv[[0, 1, 3]], alone) and adv[[2, 4, 5]].tolist() == [0, 0, 0]


def test_whitening_nothing_gives_nothing_and_what_is_off_the_mask_does_not_matter():
    x = torch.tensor([[1.0, 2.0, torch.nan], [3.0, 4.0, torch.inf]])
    assert torch.equal(nr.whiten(x[:, :2], torch.zeros(2, 2)), torch.zeros(2, 2))
    mask = torch.tensor([[1.0, 1, 0], [1, 1, 0]])
    white = nr.whiten(x, mask)
    assert torch.equal(white[:, :2], nr.whiten(x[:, :2], mask[:, :2]))
    assert white[:, 2].tolist() == [0, 0]


@pytest.mark.parametrize("arm", nr.PPO_ARMS)
def test_a_huge_ratio_off_the_mask_is_never_computed(arm):
    c = tiny("ppo", arm=arm, beta=0.1, samples=2)
    mask = torch.tensor([[1.0, 1, 0], [1, 1, 0]])
    zeros = torch.zeros(2, 3)
    far = zeros.masked_fill(mask == 0, 100.0)  # exp(100) is infinite
    b = nr.Rollout(None, None, mask, None, torch.tensor([0, 0]), zeros, zeros, zeros)
    b.adv, b.ret = mask, mask
    objective = nr.PPO_ARMS[arm].objective
    logp = far.clone().requires_grad_()
    loss = objective(logp, zeros, b, mask.sum(), c)
    loss.backward()
    assert torch.equal(loss.detach(), objective(zeros, zeros, b, mask.sum(), c))
    assert logp.grad.isfinite().all() and (logp.grad[:, 2] == 0).all()
    b.ref_logp = far - 200
    assert objective(far, zeros, b, mask.sum(), c).isfinite()


# ---- states ---------------------------------------------------------------------------------------


def saved_run(folder):
    """A state after one update of ppo, on disk."""
    c = tiny("ppo")
    state = nr.start_ppo(rough(c), c)
    next(nr.ppo(state, TASK, c))
    nr.save_state(folder, state)
    return c, state


def test_a_state_with_bad_weights_is_not_written_and_the_good_one_stays(tmp_path):
    c, state = saved_run(tmp_path)
    good = (tmp_path / "state.pt").read_bytes()
    with torch.no_grad():
        state.policy.layers[0].mlp.up_proj.weight[1, 2] = torch.nan
    with pytest.raises(nr.UserError, match=r"policy\.layers\.0\.mlp\.up_proj\.weight") as error:
        nr.save_state(tmp_path, state)
    assert "\n" not in str(error.value)
    assert (tmp_path / "state.pt").read_bytes() == good
    assert [x.name for x in tmp_path.iterdir()] == ["state.pt"]


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_a_state_that_holds_bad_numbers_is_refused_by_name(tmp_path, number):
    c, state = saved_run(tmp_path)
    plain = nr.as_plain(state)
    plain["optimizers"][0]["state"][0]["exp_avg"][0, 0] = number
    torch.save(plain, tmp_path / "state.pt")
    with pytest.raises(nr.UserError, match=r"optimizers\.0\.state\.0\.exp_avg"):
        nr.load_state(tmp_path, into=nr.start_ppo(rough(c), c))


def damaged(content, draw):
    """The bytes of a file after one of the accidents that happen to files."""
    i = draw.randrange(len(content))
    j = min(len(content), i + draw.choice([1, 7, 64, 4096]))
    way = draw.randrange(5)
    if way == 0:
        flipped = content[i] ^ (1 << draw.randrange(8))
        return content[:i] + bytes([flipped]) + content[i + 1 :]
    if way == 1:
        return content[:i]
    if way == 2:
        return content[:i] + bytes(j - i) + content[j:]
    if way == 3:
        return content[:i] + content[j:]
    return content[:i] + draw.randbytes(j - i) + content[j:]


def same_state(a, b):
    """Whether two plain states are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same_state, a, b))
    return a == b


def test_two_hundred_damaged_states_are_one_line_each_or_the_same_numbers(tmp_path):
    c, state = saved_run(tmp_path / "good")
    content = (tmp_path / "good" / "state.pt").read_bytes()
    plain = nr.as_plain(state)
    draw = random.Random(0)
    refused = 0
    for _ in range(200):
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        (tmp_path / "bad").mkdir()
        (tmp_path / "bad" / "state.pt").write_bytes(damaged(content, draw))
        try:
            found = nr.load_state(tmp_path / "bad")
        except nr.UserError as error:
            assert "\n" not in str(error) and "state.pt" in str(error)
            refused += 1
        else:
            assert same_state(found, plain)
    assert 150 < refused < 200  # some bytes are only padding between the parts of the file


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old")

    def no_space(temporary):
        temporary.write_text("half of the n")
        raise OSError(28, "No space left on device")

    with pytest.raises(nr.UserError, match="x.json cannot be written .* disk full"):
        nr.write_whole(path, no_space)
    assert path.read_text() == "old" and [x.name for x in tmp_path.iterdir()] == ["x.json"]


def test_two_hundred_damaged_configs_of_a_run_are_one_line_each_or_the_same_numbers(tmp_path):
    configs = {name: tiny(name) for name in ("ppo", "refine")}
    run = front.Run(tmp_path, configs, "smoke", 2, {"ppo": 0.5}, {})
    path = tmp_path / "config.json"
    front.write_json(path, run.about())
    content = path.read_bytes()
    assert front.open_run(tmp_path).about() == run.about()
    draw = random.Random(0)
    refused = 0
    for _ in range(200):
        path.write_bytes(damaged(content, draw))
        try:
            found = front.open_run(tmp_path)
        except nr.UserError as error:
            assert "\n" not in str(error) and "config.json" in str(error)
            refused += 1
        else:
            assert found.about() == run.about()
    assert refused > 150
