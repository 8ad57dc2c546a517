"""ORM, SORM and refiners (GLoRe): labels, positions, marks, and worlds with a known answer."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import nanoreward as nr
from data.arithmetic import Arithmetic
from notebooks import inside
from tests.conftest import rough, tiny

TASK = Arithmetic(1, 3)
SMALL = tiny("refine")
WIDE = nr.replace(SMALL, max_ops=3, response=28)
(SEP,), (BAD,) = TASK.encode(["<sep>", "<bad>"])


def rollout_of(prompts, texts, config=WIDE):
    prompt = nr.encode_prompts(TASK, prompts, config)
    response = nr.right_pad(TASK.encode(texts), config.pad_id, config.response)
    mask = nr.up_to_eos(response, config)
    return nr.Rollout(prompt, response, mask, response, torch.arange(len(texts)))


# ---- labels ------------------------------------------------------------------------------------


@given(seed=st.integers(0, 999))
def test_binary_loss_is_torchs_and_never_sees_what_is_masked(seed):
    g = nr.rng(seed, "bce")
    score = torch.randn(2, 4, 3, generator=g) * 5
    label = torch.rand(2, 4, 3, generator=g).round()
    mask = torch.rand(2, 4, 3, generator=g).round()
    theirs = (F.binary_cross_entropy_with_logits(score, label, reduction="none") * mask).sum() / 7
    ours = nr.binary_loss(score, label, mask, 7)
    assert ours == pytest.approx(float(theirs), abs=1e-5)
    changed = torch.where(mask > 0, score, score + 99)
    assert torch.equal(nr.binary_loss(changed, label, mask, 7), ours)


@pytest.mark.parametrize("v, K", [(0.083, 8), (0.5, 1), (0.2, 4), (0.02, 16)])
def test_a_coin_flipping_student_gives_the_label_of_any_of_k(v, K):
    success = torch.rand(20_000, 1, K, generator=nr.rng(0, "coins")) < v
    expected = 1 - (1 - v) ** K
    error = (expected * (1 - expected) / 20_000) ** 0.5
    assert abs(float(nr.rollout_labels(success).float().mean()) - expected) < 4 * error


@given(seed=st.integers(0, 999))
def test_propagation_is_monotone_and_idempotent(seed):
    g = nr.rng(seed, "labels")
    success, uses = torch.rand(2, 9, 5, 3, generator=g) < 0.3
    labels = nr.rollout_labels(success & uses)
    assert (labels[:, 1:] <= labels[:, :-1]).all()
    assert torch.equal(nr.rollout_labels(labels[..., None]), labels)
    # good until the last prefix with a trace
    for row, both in zip(labels, success & uses, strict=True):
        some = both.any(1).nonzero()
        assert int(row.sum()) == (int(some[-1]) + 1 if len(some) else 0)
    assert (labels <= nr.rollout_labels(success)).all()


@given(seed=st.integers(0, 999), lean=st.floats(0.05, 0.95))
def test_balance_keeps_equally_many_good_and_bad_at_each_position(seed, lean):
    g = nr.rng(seed, "balance")
    labels = torch.rand(60, generator=g) < lean
    position = torch.randint(4, (60,), generator=g)
    keep = nr.balance(labels, position, nr.rng(seed, "keep"))
    for p in range(4):
        good = labels & (position == p)
        bad = ~labels & (position == p)
        assert (keep & good).sum() == (keep & bad).sum() == min(good.sum(), bad.sum())
    assert torch.equal(keep, nr.balance(labels, position, nr.rng(seed, "keep")))


def test_the_first_error_is_the_first_step_below_the_threshold():
    assert nr.first_error(torch.tensor([0.9, 0.4, 0.1, 0.8]), 0.5) == 1
    assert nr.first_error(torch.tensor([0.9, 0.5, 0.7]), 0.5) == 3  # at the threshold is not below
    assert nr.first_error(torch.tensor([]), 0.5) == 0


# ---- prefixes and continuations ----------------------------------------------------------------


def test_prefixes_end_behind_each_step_and_at_the_end():
    texts = ["37+5=42;42*3=26;#26<eos>", "#37<eos>", "37+5=42;42*3=26;"]
    draft = rollout_of(["37+5*3="] * 3, texts)
    assert nr.prefix_ends(TASK, draft).tolist() == [[0, 8, 16, 20], [0, 4, -1, -1], [0, 8, 16, -1]]


def test_continuations_keep_their_prefix_and_leave_whole_drafts_alone(monkeypatch):
    monkeypatch.setattr(nr, "SAMPLED_AT_ONCE", 4)
    student, K = rough(WIDE), 3
    texts = ["37+5=32;32*3=96;#96<eos>", "8+1=9;#9<eos>", "#7<eos>"]
    draft = rollout_of(["37+5*3=", "8+1=", "8+1="], texts)
    whole = torch.tensor([False, True, False])
    ends = nr.prefix_ends(TASK, draft).masked_fill(whole[:, None], -1)
    config = nr.replace(WIDE, continuations=K)
    which, traces = nr.continuations_of(student, draft, ends, config)
    assert which.tolist() == [[0, 0], [2, 0], [0, 1], [0, 2]]  # short ones first
    assert traces.shape == (4, K, 28)
    for (row, s), several in zip(which.tolist(), traces, strict=True):
        n = int(ends[row, s])
        assert (several[:, :n] == draft.response[row, :n]).all()
        assert (several[:, n] != WIDE.pad_id).all()  # each goes on
        # and not with the draft's next token
        assert (several[:, n] != draft.response[row, n]).any()
    assert len({tuple(y) for y in traces[0].tolist()}) == K  # fresh ones


def test_consistency_rejects_a_trace_that_ignores_the_step():
    draft = rollout_of(["37+5*3="], ["37+5=32;32*3=96;#96<eos>"])
    ends = nr.prefix_ends(TASK, draft)
    texts = ["37+5=32;42*3=26;#26<eos>", "37+5=32;32*3=96;#96<eos>", "37+5=32;132*3=2;#26<eos>"]
    traces = nr.right_pad(TASK.encode(texts), 0, 28)[None]
    right, uses = nr.check_traces(TASK, draft, ends, torch.tensor([[0, 1]]), traces)
    assert right.tolist() == [[True, False, True]] and uses.tolist() == [[False, True, False]]
    # the empty prefix claims nothing, so nothing has to be used
    right, uses = nr.check_traces(TASK, draft, ends, torch.tensor([[0, 0]]), traces)
    assert uses.all()


def test_with_few_answers_an_answer_that_follows_at_once_uses_the_last_step():
    four = Arithmetic(1, 3, answers=4)
    draft = rollout_of(["37+5="], ["37+5=42;#2<eos>"])
    ends = nr.prefix_ends(four, draft)
    texts = ["37+5=42;#2<eos>", "37+5=42;#3<eos>", "37+5=42;37+5=46;#2<eos>", "37+5=42;42;#1<eos>"]
    traces = nr.right_pad(TASK.encode(texts), 0, 28)[None]
    right, uses = nr.check_traces(four, draft, ends, torch.tensor([[0, 1]]), traces)
    assert right.tolist() == [[True, False, True, False]]
    # The third one starts again, and its answer only happens to be 42 modulo 4.
    assert uses.tolist() == [[True, False, False, True]]
    assert four.uses("no step", "#1<eos>") and not TASK.uses("37+5=42;", "#2<eos>")


def test_what_the_student_drew_before_the_loop_counts_as_samples():
    c = tiny("refine", start_data=7, samples=3, prompts=10, updates=1)
    state = nr.start_refine(rough(c), c)
    (line,) = nr.refine(state, TASK, c)
    drafts = nr.label_drafts(rough(c), TASK, c.prompts, c)
    assert drafts.samples > 10 and line["samples"] == 7 * 3 + drafts.samples


def labelled():
    """Three drafts: right; wrong in its second step, mended by a trace; wrong, never solved."""
    texts = ["37+5=42;42*3=26;#26<eos>", "37+5=42;42*3=22;#22<eos>", "37+5=32;32*3=96;#96<eos>"]
    draft = rollout_of(["37+5*3="] * 3, texts)
    ends = nr.prefix_ends(TASK, draft)
    which = torch.tensor([[1, 0], [1, 1], [1, 2], [2, 0], [2, 1], [2, 2]])
    good, bad = "37+5=42;42*3=26;#26<eos>", "37+5=42;42*3=22;#22<eos>"
    traces = [[bad, good], [bad, good], [bad, bad], [texts[2]] * 2, [texts[2]] * 2, [texts[2]] * 2]
    traces = torch.stack([nr.right_pad(TASK.encode(t), 0, 28) for t in traces])
    success, uses = nr.check_traces(TASK, draft, ends, which, traces)
    right = nr.grades(TASK, draft) > 0.5
    examples = nr.step_labels(right, ends, which, success & uses, WIDE)
    examples |= {"prompt": draft.prompt, "response": draft.response}
    return nr.LabelledDrafts(examples, which, traces, success & uses, truth=1 / 3, samples=15)


def test_labels_of_steps_are_the_outcome_for_the_orm_and_the_rollouts_for_the_sorm():
    b = labelled().examples
    assert b["label"][0].tolist() == [[1.0] * 4, [0.0] * 4, [0.0] * 4]
    assert b["label"][1].tolist() == [[1.0] * 4, [1.0, 1.0, 0.0, 0.0], [0.0] * 4]
    # three positions, one good and one bad each
    assert b["keep"][1].sum() == b["keep"][0].sum() == 6
    assert (b["keep"][:, :, 0] == 0).all()  # the problem alone is no step
    for s in (1, 2, 3):
        kept = b["label"][1][:, s][b["keep"][1][:, s] > 0]
        assert kept.sum() * 2 == len(kept)


def test_the_solvers_beside_the_refiners_learn_the_same_traces_and_see_no_draft():
    drafts = labelled()
    whole = nr.global_demos(TASK, drafts, WIDE)
    rest = nr.local_demos(TASK, drafts, WIDE)
    problem = [WIDE.bos_id, *TASK.encode(["37+5*3="])[0]]
    draft = TASK.encode(["37+5=42;42*3=22;#22"])[0]
    step = TASK.encode(["37+5=42;"])[0]
    assert draft[len(step) :] == whole[0][0][len(problem) + 1 + len(step) : -1]
    assert inside.without_draft(TASK, whole) == [(problem, whole[0][1])]
    assert inside.without_draft(TASK, rest) == [(problem + step, rest[0][1])]


def test_refiners_learn_from_right_traces_and_the_local_one_only_what_follows_the_mark():
    drafts = labelled()
    whole = nr.global_demos(TASK, drafts, WIDE)
    rest = nr.local_demos(TASK, drafts, WIDE)
    assert len(whole) == len(rest) == 1  # the third draft has no right trace to learn from
    problem, answer = "37+5*3=", "37+5=42;42*3=26;#26<eos>"
    ids = TASK.encode([problem, "37+5=42;42*3=22;#22", "42*3=22;#22", "37+5=42;"])
    assert whole[0] == ([1, *ids[0], SEP, *ids[1], SEP], TASK.encode([answer])[0])
    assert rest[0][0] == [1, *ids[0], SEP, *ids[3], BAD, *ids[2], SEP]
    # it goes on, it never repeats the good prefix
    assert ids[3] + rest[0][1] == TASK.encode([answer])[0]
    # The global one learns from the trace that began with nothing, whatever follows a prefix.
    at_once = TASK.encode(["#26<eos>"])
    drafts.traces[0, 1] = nr.right_pad(at_once, 0, 28)[0]
    assert nr.global_demos(TASK, drafts, WIDE)[0][1] == at_once[0]
    assert nr.local_demos(TASK, drafts, WIDE) == rest


def test_drafts_are_drawn_continued_and_labelled_in_one_go():
    """`label_drafts` is made of the parts above, and the loop learns from what it returns."""
    student = rough(SMALL)
    drafts = nr.label_drafts(student, TASK, 12, SMALL)
    steps = drafts.examples
    texts = TASK.prompts(12, nr.rng(SMALL.seed, "draft prompts"))
    prompt = nr.encode_prompts(TASK, texts, SMALL)
    draft = nr.sample(student, prompt, SMALL, generator=nr.rng(SMALL.seed, "drafts"))
    assert torch.equal(steps["prompt"], prompt) and torch.equal(steps["response"], draft.response)
    ends = nr.prefix_ends(TASK, draft)
    right = nr.grades(TASK, draft) > 0.5
    assert drafts.truth == pytest.approx(float(right.float().mean()))
    wrong = [(i, s) for i in range(12) for s in range(int(ends[i].argmax())) if not right[i]]
    assert sorted(map(tuple, drafts.origin.tolist())) == wrong
    success, uses = nr.check_traces(TASK, draft, ends, drafts.origin, drafts.traces)
    assert torch.equal(drafts.good, success & uses)
    labels = nr.step_labels(right, ends, drafts.origin, drafts.good, SMALL)
    assert all(torch.equal(steps[name], x) for name, x in labels.items())
    assert drafts.samples == 12 + len(wrong) * SMALL.continuations


# ---- heads -------------------------------------------------------------------------------------


@pytest.fixture
def heads():
    state = nr.start_refine(rough(WIDE), WIDE)
    for name in ("orm", "sorm"):
        weight = vars(state)[name].head.linear.weight
        torch.nn.init.normal_(weight, generator=nr.rng(1, name))
    return state


def scores_of(state, prompts, texts):
    b = rollout_of(prompts, texts)
    with torch.no_grad():
        ends = nr.prefix_ends(TASK, b)
        return torch.stack(
            [judge.at(b.prompt, b.response, ends) for judge in (state.orm, state.sorm)]
        )


def test_step_scores_read_the_prefix_unshifted_and_nothing_behind_it(heads):
    a = scores_of(heads, ["37+5*3="], ["37+5=42;42*3=26;#26<eos>"])
    b = scores_of(heads, ["37+5*3="], ["37+5=42;42*3=22;#22<eos>"])
    # the question, and the step both have
    assert torch.allclose(a[:, 0, :2], b[:, 0, :2], atol=1e-5)
    assert (a[:, 0, 2:] - b[:, 0, 2:]).abs().min() > 1e-4
    prompt = nr.encode_prompts(TASK, ["37+5*3="], WIDE)
    step = torch.tensor(TASK.encode(["37+5=42;"]))
    trunk = heads.sorm.trunk
    hidden = trunk.hidden(torch.cat([prompt, step], 1))
    logp = nr.token_logprobs(trunk, prompt, step, 1.0).sum(1)
    # the very token that ends the step
    score = heads.sorm.head(hidden[:, -1]) + heads.sorm.logp_weight * logp
    assert torch.allclose(score, a[1, :, 1], atol=1e-4)
    assert not torch.allclose(a[0], a[1])


def test_micro_batches_of_labelled_drafts_change_nothing(heads):
    b = labelled().examples
    for h, (name, judge) in enumerate((("orm", heads.orm), ("sorm", heads.sorm))):
        rows, loss = nr.step_batches(name, judge, b, 12, WIDE)(0)
        whole, seen = loss(rows)
        parts = [loss(part) for part in rows.split(5)]
        assert len(rows) == 12 and len(parts) == 3
        in_parts = sum(float(p.detach()) for p, _ in parts)
        assert float(whole.detach()) == pytest.approx(in_parts, abs=1e-5)
        known = sum(float(m[name]) for _, m in parts)
        assert set(seen) == {name} and float(seen[name]) == pytest.approx(known, abs=1e-5)
        score = judge.at(b["prompt"][rows], b["response"][rows], b["ends"][rows]).detach()
        label, keep = b["label"][h, rows], b["keep"][h, rows] > 0
        each = F.binary_cross_entropy_with_logits(score, label, reduction="none")
        assert float(whole.detach()) == pytest.approx(float(each[keep].mean()), abs=1e-5)


# ---- refinement --------------------------------------------------------------------------------


def test_a_refinement_keeps_what_stands_before_the_blamed_step(heads):
    prompts = TASK.prompts(40, nr.rng(0, "p"))
    found = nr.refinements(heads, TASK, prompts, WIDE, nr.rng(0, "refine"))
    draft, _, local = found.response
    assert found.response.shape == (3, 40, 28) and found.score.shape == (3, 40)
    prompt = nr.encode_prompts(TASK, prompts, WIDE)
    b = nr.Rollout(prompt, draft, nr.up_to_eos(draft, WIDE), draft, draft[:, 0])
    ends = nr.prefix_ends(TASK, b)
    with torch.no_grad():
        sorm = heads.sorm.at(b.prompt, draft, ends).sigmoid()
        whole = heads.orm(b.prompt, draft)
    assert {at is None for at in found.blamed} == {True, False}
    for i, at in enumerate(found.blamed):
        n = int((ends[i] >= 0).sum())
        below = (sorm[i, 1:n] < nr.THRESHOLD).nonzero()[:, 0].tolist()
        assert at == (int(ends[i, below[0]]) if below else None)
        keep = 28 if at is None else at
        assert torch.equal(local[i, :keep], draft[i, :keep])
        assert found.score[0, i] == pytest.approx(float(whole[i]), abs=1e-4)
    texts = nr.answer_refined(heads, TASK, prompts, WIDE, nr.rng(0, "refine"))
    best = found.score.argmax(0)
    assert texts == [TASK.decode(found.response[best[i], i].tolist()) for i in range(40)]


class Ones(Arithmetic):
    """A world of digits: a response is bad from the first 9 on."""

    def grade(self, prompt, response):
        return float("9" not in response)

    def steps(self, response):
        return [(self.decode([i]), k) for k, i in enumerate(response) if i > 5]

    def result(self, step):
        return None


@pytest.mark.parametrize("grade", [0.0, 1.0])
def test_where_nothing_is_wrong_nothing_is_mended(grade):
    class Same(Arithmetic):
        def grade(self, prompt, response):
            return grade

    state = nr.start_refine(rough(SMALL), SMALL)
    before = [x.clone() for x in state.local_refiner.parameters()]
    logs = list(nr.refine(state, Same(1, 1), SMALL))
    assert len(logs) == SMALL.updates and logs[0]["truth"] == grade and logs[0]["pairs"] == 0
    after = list(state.local_refiner.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert nr.answer_refined(state, Same(1, 1), ["3+4="], SMALL)


def test_probe_heads_learn_which_prefix_is_bad_and_refiners_what_follows():
    """The whole loop in a world where a 9 is the error: heads and refiners find it in seconds."""
    task = Ones(1, 1)
    numbers = {"prompts": 400, "continuations": 6, "minibatch": 64, "updates": 120, "lr": 0.01}
    config = nr.replace(SMALL, response=5, seed=0, **numbers)
    student = nr.Transformer(config, nr.rng(0, "init"))
    with torch.no_grad():  # it writes 1, 2 and 9 and the end
        student.lm_head.weight.zero_()
    digits = task.encode(["1", "2", "9"])
    never = [i for i in range(config.vocab) if [i] not in digits and i != config.eos_id]
    bias = torch.zeros(config.vocab).index_fill_(0, torch.tensor(never), -30.0)
    student.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)
    state = nr.start_refine(student, config)
    logs = list(nr.refine(state, task, config))
    assert logs[-1]["pairs"] > 50 and state.update == 120 and logs[-1]["samples"] > 300
    orm, sorm = (sum(m[head] for m in logs[-10:]) / 10 for head in ("orm", "sorm"))
    assert sorm > 0.9 and orm > logs[0]["orm"]
    b = state.examples
    nine = (b["response"] == digits[2][0]).cumsum(1) > 0
    step = b["ends"] > 0
    clean = ~nine.gather(1, (b["ends"] - 1).clamp(min=0))[step]  # the truth: no 9 yet
    label = b["label"][1][step] > 0
    assert not label[~clean].any()
    assert label[clean].float().mean() > 0.9  # four traces may all be unlucky
    prompts = task.prompts(200, nr.rng(1, "held out"))
    found = nr.refinements(state, task, prompts, config, nr.rng(2, "refine"))
    good = (found.response != digits[2][0]).all(2).float().mean(1)
    assert good[1] > good[0] + 0.15 and good[2] > good[0] + 0.15
    texts = nr.answer_refined(state, task, prompts, config, nr.rng(2, "refine"))
    chosen = [task.grade(x, y) for x, y in zip(prompts, texts, strict=True)]
    assert sum(chosen) / 200 >= float(good.max()) - 0.02
