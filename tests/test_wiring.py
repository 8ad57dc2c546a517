"""Which number, seed, split and model reaches what: whole runs by the front door, listened to.

In the numbers below none equals its neighbour, and few divide another one. So a number that goes to
the wrong place is seen there, and so is a mean that is taken over the wrong things.
"""

import json
import random
import re
import sys
import zlib
from collections import Counter
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from math import isnan, log
from statistics import fmean, pstdev, stdev
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

import nanoreward as nr
import train_small as front
from data.arithmetic import Arithmetic
from data.gsm8k import GSM8K
from data.sudoku import Sudoku, in_order
from tests.conftest import CHOICES, needed_by, tiny
from tests.test_gsm8k import row

ODD = {
    "threads": 1,
    "seed": 7,
    "eval_every": 2,
    "eval_problems": 11,
    "max_ops": 1,
    "response": 13,
    "width": 16,
    "layers": 2,
    "heads": 2,
    "kv_heads": 1,
    "head_dim": 8,
    "mlp_width": 24,
    "demos": 53,
    "base_updates": 6,
    "base_batch": 19,
    "base_lr": 0.0031,
    "muon_lr": 0.0037,
    "micro": 5,
    "prompts": 10,
    "samples": 3,
    "temperature": 0.83,
    "updates": 3,
    "lr": 0.0053,
    "minibatch": 12,
    "epochs": 2,
    "clip": 0.011,
    "value_coef": 0.29,
    "lam": 0.71,
    "beta": 0.37,
    "reward_data": 41,
    "reward_updates": 4,
    "c_pos": 0.23,
    "c_neg": 0.31,
    "continuations": 6,
    "rounds": 2,
    "alpha": 1.3,
    "judgements": 4,
    "start_data": 370,
    "start_updates": 161,
    "start_lr": 0.0059,
    "start_muon_lr": 0.0067,
    "branches": 5,
    "tail": 6,
    "process_weight": 0.61,
    "look_ahead": 0.57,
    "t_min": 0.13,
}


def all_plays():
    """Every method, and each of its choices that is not the default, with the numbers for it."""
    found = {}
    for name, method in nr.METHODS.items():
        usual = vars(method.config())
        found[name] = (name, {})
        for number, values in CHOICES[name].items():
            for value in values:
                if value != usual[number]:
                    numbers = {number: value} | needed_by(name, number)
                    found[f"{name} {value}"] = (name, numbers)
    for name, numbers in found.values():
        if name != "self_rewarding":  # its judge has to have learned what a judgement is
            numbers["start_updates"] = 23
    return found


PLAYS = all_plays()
POLICY_GRADIENT = [name for name in PLAYS if name.split()[0] in ("ppo", "seq2seq", "denoise")]
ROUNDS = [name for name in PLAYS if name.split()[0] in ("iterative_dpo", "self_rewarding")]


def hashed(*texts):
    """A whole number that looks random and depends on the texts alone."""
    return zlib.crc32(" ".join(texts).encode())


class Dice(Arithmetic):
    """Whatever is written may be right, may be a problem, and has steps of three tokens."""

    def grade(self, prompt, response):
        return float(hashed(prompt, response) % 2 == 0)

    def problem(self, text):
        return None if hashed(text) % 3 else f"{hashed(text) % 30}+1="

    def steps(self, response):
        return [(self.decode(response[k - 2 : k + 1]), k) for k in range(2, len(response), 3)]

    def uses(self, step, rest):
        return hashed(step, rest) % 4 > 0


TASK = Dice(1, 1)


def any_score(text):
    """A score for whatever a judge writes, and none for a quarter of it."""
    score = hashed(text) % 8
    return score / 2 if score < 6 else None


# The functions of nanoreward that a watch listens to, and those of torch that draw.
LISTENED = """rng write_forward unmask fit optimizer_step policy_update label_drafts
labelled_pairs m1_demos diffusion_loss gather_logprobs""".split()
DRAWING = "rand randn randint randperm multinomial normal bernoulli".split()


class Watch:
    """What a run asks for, in its order.

    A method that has the name of a function of nanoreward stands in its place. It calls the
    function, which it is given first, and notes what it was asked and what it found.
    phase: the name of a training, `loop`, or `between` for what happens outside of both.
    """

    def __init__(self, patch):
        self.phase = "between"
        self.now = None  # what counts the updates of this phase
        self.modules = {}  # what each training trains
        self.streams = []
        self.problems = []
        self.draws = []
        self.steps = []
        self.batches = []
        self.drafts = []
        self.temperatures = []
        self.unseeded = []
        self.labelled = []
        self.seed_data = []
        self.masked = []
        for name in LISTENED:
            patch.setattr(nr, name, partial(getattr(self, name), getattr(nr, name)))
        clip = partial(self.clip_grad_norm, nr.nn.utils.clip_grad_norm_)
        patch.setattr(nr.nn.utils, "clip_grad_norm_", clip)
        for name in DRAWING:
            patch.setattr(torch, name, partial(self.drawn, getattr(torch, name)))

    def note(self, records, **what):
        """One record more, with the phase and the update it belongs to."""
        update = None if self.now is None else self.now.update
        records.append(SimpleNamespace(phase=self.phase, update=update, **what))

    @contextmanager
    def during(self, phase, now=None):
        """What is noted in here belongs to this phase."""
        before = self.phase, self.now
        self.phase, self.now = phase, now
        yield
        self.phase, self.now = before

    def loop(self, inner, state, task, c):
        """The loop of a method. Between two updates the front door is at work."""
        self.state = state
        updates = inner(state, task, c)
        while True:
            with self.during("loop", state):
                metrics = next(updates, None)
            if metrics is None:
                return
            yield metrics

    def models(self, inner, *args):
        """What the models of a reward need beside their training."""
        with self.during("models"):
            return inner(*args)

    def train(self, inner, trainer, name, modules, *args, **kwargs):
        """The training of a model before the loop."""
        phase = trainer.prefix + name
        with self.during(phase):
            inner(trainer, name, modules, *args, **kwargs)
        if of(self.steps, phase):  # it was not in the cache
            self.modules[phase] = modules

    def fit(self, inner, state, *args, **kwargs):
        if self.phase != "loop":
            self.now = state
        return inner(state, *args, **kwargs)

    def drawn(self, inner, *args, **kwargs):
        if kwargs.get("generator") is None:
            self.note(self.unseeded, name=inner.__name__)
        return inner(*args, **kwargs)

    def rng(self, inner, seed, purpose, index=0):
        generator = inner(seed, purpose, index)
        code = sys._getframe(1).f_code
        self.note(
            self.streams,
            seed=seed,
            purpose=purpose,
            index=index,
            caller=(code.co_filename, code.co_firstlineno),
            generator=generator,
            unused=generator.get_state(),
        )
        return generator

    def write_forward(self, inner, model, prompt, canvas, c, uniform):
        start = canvas.clone()
        response, order, logp = inner(model, prompt, canvas, c, uniform)
        self.note(
            self.draws,
            model=model,
            prompt=prompt,
            start=start,
            response=response.clone(),
            order=order,
            temperature=c.temperature,
        )
        return response, order, logp

    unmask = write_forward

    def clip_grad_norm(self, inner, params, longest):
        self.clipped = ({id(p) for p in params}, longest)
        return inner(params, longest)

    def optimizer_step(self, inner, optimizers, loss, rows, c, lr_share=1.0):
        parts = []

        def counted(part):
            parts.append(len(part))
            return loss(part)

        before = deepcopy(vars(self.state)) if self.phase == "loop" else None
        metrics = inner(optimizers, counted, rows, c, lr_share)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self.note(
            self.steps,
            optimizers=optimizers,
            rates=[group["lr"] for group in groups],
            rows=rows,
            parts=parts,
            before=before,
            metrics=metrics,
            clipped=self.clipped,
        )
        return metrics

    def policy_update(self, inner, state, b, *args, **kwargs):
        self.note(self.batches, b=b)
        return inner(state, b, *args, **kwargs)

    def label_drafts(self, inner, *args):
        drafts = inner(*args)
        self.note(self.drafts, drafts=drafts)
        return drafts

    def labelled_pairs(self, inner, *args):
        self.labelled = inner(*args)
        return self.labelled

    def m1_demos(self, inner, *args):
        self.seed_data = inner(*args)
        return self.seed_data

    def diffusion_loss(self, inner, model, prompt, response, generator, t_min, rows):
        self.note(self.masked, t_min=t_min, weight=model.future_weight)
        return inner(model, prompt, response, generator, t_min, rows)

    def gather_logprobs(self, inner, model, hidden, response, temperature):
        self.note(self.temperatures, temperature=temperature)
        return inner(model, hidden, response, temperature)


def of(records, phase="loop", update=None):
    """The records of a phase, or of one of its updates."""
    return [r for r in records if r.phase == phase and update in (None, r.update)]


@pytest.fixture(scope="module")
def play(tmp_path_factory):
    """Name of a play -> what its run has asked for, and what came out. Each one is run once."""
    played = {}
    m1 = tmp_path_factory.mktemp("m1")  # it is the same in all plays of self_rewarding, and slow

    def run(name):
        if name not in played:
            folder = tmp_path_factory.mktemp("play")
            cache = m1 if name.startswith("self_rewarding") else folder / "cache"
            played[name] = listen(*PLAYS[name], folder / "run", cache)
        return played[name]

    return run


def listen(method, numbers, out, cache):
    """Run a method by the front door with the odd numbers."""
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(patch)

        class Heard(Dice):
            def prompts(self, n, generator, split="train"):
                found = super().prompts(n, generator, split)
                watch.note(watch.problems, n=n, split=split, texts=found)
                return found

        def make_task(c, careful=False):
            return Heard(c.min_ops, c.max_ops, careful=careful)

        entry = nr.METHODS[method]
        loop = partial(watch.loop, entry.loop)
        models = partial(watch.models, entry.reward_models)
        train = front.CachedTrainer.__call__
        patch.setitem(nr.METHODS, method, nr.replace(entry, loop=loop, reward_models=models))
        patch.setitem(front.PRESETS, "odd", {"all": ODD | numbers})
        patch.setattr(front, "make_task", make_task)
        patch.setattr(front.CachedTrainer, "__call__", lambda *a, **k: watch.train(train, *a, **k))
        patch.setattr(front, "draw_picture", lambda *_: None)
        patch.setattr(nr, "parse_score", any_score)
        argv = [method, "--config", "odd", "--out", str(out), "--cache", str(cache)]
        assert front.main([*argv, "--ceiling"]) == 0
    lines = (out / "metrics.jsonl").read_text().splitlines()
    watch.logs = [json.loads(line) for line in lines]
    about = json.loads((out / "config.json").read_text())
    watch.c = entry.config(**about["configs"][method])
    return watch


# ---- seeds ---------------------------------------------------------------------------------------

# The diffusion LM starts from the weights of the GPT, and all models are asked the same questions
# in the same way.
ASKED_TWICE = {"init", "evaluate"}
# Parts of a batch share their open places, two refiners the places of their rows, and ORM and SORM
# read the same drafts.
AGAIN = {"hidden", "batch", "step batch"}


@pytest.mark.parametrize("name", PLAYS)
def test_every_random_number_comes_from_the_seed_and_from_a_stream_of_its_own(play, name):
    watch = play(name)
    # The transcripts of denoise are written greedily, whatever is drawn for them.
    greedy = "between" if name.startswith("denoise") else None
    assert {drawn.phase for drawn in watch.unseeded} <= {greedy}
    callers = {}
    asked = {}
    for stream in watch.streams:
        held_out = stream.purpose in ("dev", "test")
        assert stream.seed == (0 if held_out else ODD["seed"]), stream.purpose
        assert not torch.equal(stream.generator.get_state(), stream.unused), stream.purpose
        callers.setdefault(stream.purpose, set()).add(stream.caller)
        if stream.phase != "between":
            key = (stream.phase, stream.purpose, stream.index)
            asked.setdefault(key, []).append(stream.update)
    assert {purpose for purpose, places in callers.items() if len(places) > 1} <= ASKED_TWICE
    for key, updates in asked.items():
        assert len(set(updates)) == 1, key  # another update, another index
        assert len(updates) == 1 or key[1] in AGAIN, key


def test_seed_purpose_and_index_each_make_another_stream_and_nothing_else_does():
    first = {}
    for seed in (0, 1, 7, 11):
        for purpose in ("sample", "prompts", "1/sample"):
            for index in (0, 1, 11):
                numbers = torch.rand(2, generator=nr.rng(seed, purpose, index)).tolist()
                assert numbers == torch.rand(2, generator=nr.rng(seed, purpose, index)).tolist()
                first[tuple(numbers)] = (seed, purpose, index)
    assert len(first) == 4 * 3 * 3


# ---- numbers -------------------------------------------------------------------------------------

# The updates of each training, the rates of AdamW and Muon, and the updates in which they rise.
TRAININGS = {
    "gpt": ("base_updates", "base_lr", "muon_lr", 20),
    "careful-gpt": ("base_updates", "base_lr", "muon_lr", 20),
    "m1": ("start_updates", "start_lr", "start_muon_lr", 20),
    "student": ("start_updates", "start_lr", None, 5),
    "diffusion": ("start_updates", "start_lr", "start_muon_lr", 20),
    "scorer": ("reward_updates", "base_lr", None, 20),
    "rewriter": ("reward_updates", "base_lr", "muon_lr", 20),
    "sorm": ("reward_updates", "base_lr", "muon_lr", 20),
}
MATRICES = re.compile(r"layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj\.weight$")


def share_of_peak(update, updates, warmup):
    """A rise in so many updates, times a fall to zero."""
    return min(1, (update + 1) / warmup) * (1 - update / updates)


def parts_of(n, size):
    """How many rows each part has, if n rows are cut after every `size`."""
    return [min(size, n - k) for k in range(0, n, size)]


def check_step(step, modules, rows, share, lr, muon_lr, c):
    """One optimizer step: which weights it moves, how, at which rates and in which parts."""
    assert len(step.rows) == rows and step.parts == parts_of(rows, c.micro)
    names = {id(p): name for module in modules for name, p in module.named_parameters()}
    assert step.clipped == (set(names), 1.0)
    held = {}
    rates = iter(step.rates)
    for optimizer in step.optimizers:
        for group in optimizer.param_groups:
            kind = type(optimizer)
            held.setdefault(kind, []).extend(names[id(p)] for p in group["params"])
            peak = muon_lr if kind is nr.Muon else lr
            assert group["peak_lr"] == peak
            assert next(rates) == pytest.approx(peak * share)
            if kind is nr.Muon:
                assert group["momentum"] == 0.95
            else:
                assert kind is torch.optim.AdamW and group["weight_decay"] == 0
                assert group["betas"] == (0.9, 0.95) and group["eps"] == 1e-5
    matrices = [name for name in names.values() if muon_lr and MATRICES.search(name)]
    rest = [name for name in names.values() if name not in matrices]
    assert sorted(held.pop(nr.Muon, [])) == sorted(matrices)
    assert sorted(held.pop(torch.optim.AdamW)) == sorted(rest) and not held
    assert step.metrics["lr"] == pytest.approx(lr * share)


@pytest.mark.parametrize("name", PLAYS)
def test_every_training_before_the_loop_has_its_own_rates_and_updates(play, name):
    watch = play(name)
    assert set(watch.modules) <= set(TRAININGS)
    for phase, modules in watch.modules.items():
        updates, lr, muon_lr, warmup = TRAININGS[phase]
        updates = (ODD | PLAYS[name][1])[updates]
        lr = ODD[lr] / 10 if phase == "scorer" else ODD[lr]
        steps = of(watch.steps, phase)
        assert [step.update for step in steps] == list(range(updates))
        for step in steps:
            share = share_of_peak(step.update, updates, warmup)
            muon = ODD[muon_lr] if muon_lr else None
            check_step(step, modules, ODD["base_batch"], share, lr, muon, watch.c)
        # What is imitated is read at temperature 1.
        assert {t.temperature for t in of(watch.temperatures, phase)} <= {1.0}
    # A learned score is a sum of log-probs too: here of the responses that it is normalized on.
    asked = {1.0} if name == "ppo learned" else set()
    assert {t.temperature for t in of(watch.temperatures, "models")} == asked


@pytest.mark.parametrize("name", PLAYS)
def test_every_training_before_the_loop_draws_what_its_numbers_say(play, name):
    watch = play(name)
    c = watch.c
    for phase in [*watch.modules, "models"]:
        problems = of(watch.problems, phase)
        draws = of(watch.draws, phase)
        rows = [len(draw.start) for draw in draws]
        assert {p.split for p in problems} <= {"train"}
        assert {draw.temperature for draw in draws} <= {c.temperature}
        counts = [p.n for p in problems]
        if phase in ("gpt", "careful-gpt", "diffusion"):
            assert counts == [1] * c.demos and not rows
        elif phase == "student":
            assert counts == [c.start_data] and rows == [c.start_data * c.samples]
            same = draws[0].prompt.view(c.start_data, c.samples, -1)
            assert (same == same[:, :1]).all()
        elif phase == "sorm":
            assert counts == [c.reward_data] and rows[0] == c.reward_data
            assert len(rows) > 1 and all(n % c.continuations == 0 for n in rows[1:])
        elif phase in ("scorer", "rewriter"):
            assert set(counts) == {1} and len(counts) >= c.reward_data and not rows
            assert len(watch.labelled) == c.reward_data
        elif phase == "models":
            assert counts == rows == ([512] if name == "ppo learned" else [])
        else:
            assert phase == "m1" and len(watch.seed_data) == c.start_data and not rows


def test_the_diffusion_lm_fades_in_and_rehearses(play):
    watch = play("denoise")
    c = watch.c
    seen = {}
    for masked in of(watch.masked, "diffusion"):
        assert masked.t_min == c.t_min
        seen[masked.update] = masked.weight
    last = c.start_updates - 1
    for u in range(last, -1, -2):  # between them it is the GPT that it was
        faded = (u + 1) / (c.look_ahead * c.start_updates)
        assert seen.pop(u) == pytest.approx(min(1, faded) ** 2)
    assert not seen


def test_every_training_is_heard_in_some_play(play):
    assert {phase for name in PLAYS for phase in play(name).modules} == set(TRAININGS)


@pytest.mark.parametrize("name", PLAYS)
def test_every_loop_makes_its_own_optimizer_steps(play, name):
    watch = play(name)
    c = watch.c
    steps = iter(of(watch.steps))
    state = watch.state
    if name in POLICY_GRADIENT:
        trained = [state.policy, state.head] if c.arm == "gae" else [state.policy]
        for u in range(c.updates):
            for _ in range(c.epochs):
                for rows in parts_of(c.prompts * c.samples, c.minibatch):
                    share = share_of_peak(u, c.updates, 5)
                    check_step(next(steps), trained, rows, share, c.lr, None, c)
    elif name in ROUNDS:
        for u in range(c.rounds * c.updates):
            share = share_of_peak(u % c.updates, c.updates, 5)
            check_step(next(steps), [state.policy], c.minibatch, share, c.lr, None, c)
    else:
        assert name == "refine"
        trained = {"orm": 1, "sorm": 1, "global_refiner": 2, "local_refiner": 2}
        for u in range(c.updates):
            share = share_of_peak(u, c.updates, 20)
            for part, divisor in trained.items():
                model = vars(state)[part]
                rows = c.minibatch // divisor
                check_step(next(steps), [model], rows, share, c.lr, c.muon_lr, c)
    assert next(steps, None) is None
    at = {c.temperature if name in POLICY_GRADIENT else 1.0}
    if name in ("ppo learned", "ppo sorm", "ppo shaped"):
        at |= {1.0}  # the log-probs of a learned score
    if not name.startswith("denoise"):  # which reads its log-probs off other canvases
        assert {t.temperature for t in of(watch.temperatures)} == at


@pytest.mark.parametrize("name", PLAYS)
def test_every_loop_draws_what_its_numbers_say(play, name):
    watch = play(name)
    c = watch.c
    state = watch.state
    N, G = c.prompts, c.samples
    updates = sorted({draw.update for draw in of(watch.draws)})
    for u in updates:
        draws = of(watch.draws, update=u)
        asked = of(watch.problems, update=u)
        assert {p.split for p in asked} <= {"train"}
        assert all(draw.temperature == c.temperature for draw in draws)
        assert draws[0].start.shape[1] == c.response
        short = name.startswith("denoise") and c.arm == "process" and c.prover == "short_tail"
        length = c.tail if short else c.response
        assert {draw.start.shape[1] for draw in draws[1:]} <= {length}
        rows = [len(draw.start) for draw in draws]
        judging = name.startswith("self_rewarding")
        assert all(draw.model is state.policy for draw in draws[: 2 if judging else None])
        if name == "refine":
            assert asked[0].n == rows[0] == N
            continue
        if judging:
            assert [p.n for p in asked[: 2 * N]] == [4] * 2 * N
            assert rows == [2 * N, N * G, N * G * c.judgements]
            _, draw, judgements = draws
            assert judgements.model is state.judge
            asked_of_judge = judgements.prompt.view(N * G, c.judgements, -1)
            assert (asked_of_judge == asked_of_judge[:, :1]).all()
        else:
            assert [p.n for p in asked] == [N] and rows[0] == N * G
            draw = draws[0]
        # Each problem stands G times in a row, and all are answered from nothing.
        same = draw.prompt.view(N, G, -1)
        assert (same == same[:, :1]).all() and len(same[:, 0].unique(dim=0)) > N / 2
        hole = c.mask_id if name.startswith("denoise") else c.pad_id
        assert (draw.start == hole).all()
    every = c.updates if name in ROUNDS else 1
    last = c.total_updates() if name != "refine" else 1
    assert updates == list(range(0, last, every))


# ---- metrics: all of them again, row by row and without padding ----------------------------------


def real(row, c):
    """The ids of a row without PAD."""
    return [i for i in row.tolist() if i != c.pad_id]


def written(row, c):
    """A response up to its end."""
    ids = real(row, c)
    return ids[: ids.index(c.eos_id) + 1] if c.eos_id in ids else ids


def read(model, prompt, response):
    """The vectors that predict each token of a response, and the one behind its last token."""
    hidden = model.hidden(torch.tensor([prompt + response]))[0]
    return hidden[len(prompt) - 1 :]


def logprobs(model, prompt, response, temperature, c):
    """The log-prob of each token of a GPT's response."""
    hidden = read(model, prompt, response)[: len(response)]
    logp = nr.log_softmax(model.lm_head(hidden), temperature, c)
    return logp[range(len(response)), response]


def logprobs_of(model, b, i, c):
    """The log-prob of each token of a rollout; a diffusion LM reads it on the canvas before it."""
    x = real(b.prompt[i], c)
    y = written(b.response[i], c)
    if model.config.causal:
        return logprobs(model, x, y, c.temperature, c)
    found = []
    for k, token in enumerate(y):
        canvas = b.response[i].masked_fill(b.order[i] >= b.order[i, k], c.mask_id).tolist()
        logits = model.lm_head(read(model, x, canvas)[k])
        found.append(nr.log_softmax(logits, c.temperature, c)[token])
    return torch.stack(found)


def graded(prompt, response):
    return TASK.grade(TASK.decode(prompt), TASK.decode(response))


def scores(scorer, prompt, response, c):
    """What a scorer says of each prefix of a response, from the empty one."""
    logp = logprobs(scorer.trunk, prompt, response, 1.0, c).cumsum(0)
    logp = torch.cat([torch.zeros(1), logp])
    return scorer.head(read(scorer.trunk, prompt, response)) + scorer.logp_weight * logp


def prefixes(response):
    """Where the prefixes of a response end."""
    ends = [0, *(last + 1 for _, last in TASK.steps(response))]
    return ends if ends[-1] == len(response) else [*ends, len(response)]


def paid_by_steps(scorer, x, y, truth, c):
    """What the SORM pays for each token; with a truth the verifier has the last word."""
    reward = torch.zeros(len(y))
    chance = scores(scorer, x, y, c)[prefixes(y)].sigmoid()
    ends = prefixes(y)
    if truth is not None:
        chance[-1] = truth
    for s in range(1, len(ends)):
        reward[ends[s] - 1] += chance[s] - chance[s - 1]
    if y[-1] != c.eos_id:
        reward[-1] -= 1
    return reward


def paid_by_agreement(rewriter, x, y, c):
    """What the rewriter pays for each token."""
    mark = TASK.encode(["<sep>"])[0]
    asked = x + mark + [i for i in y if i != c.eos_id] + mark
    logits = nr.log_softmax(rewriter.lm_head(read(rewriter, asked, y)[:-1]), 1.0, c)
    reward = []
    agreed = True
    for token, likeliest in zip(y, logits.argmax(1).tolist(), strict=True):
        agrees = token == likeliest
        agreed = agreed and agrees
        reward.append(c.c_pos if agreed else 0.0 if agrees else -c.c_neg)
    if y[-1] != c.eos_id:
        reward[-1] -= 1
    return torch.tensor(reward)


def paid(name, models, x, y, truth, c):
    """The reward of each token of a response."""
    if name.startswith("seq2seq"):
        return paid_by_agreement(models["rewriter"], x, y, c)
    signal = vars(c).get("reward", "verifier")
    if signal in ("sorm", "shaped"):
        return paid_by_steps(models["scorer"], x, y, truth if signal == "shaped" else None, c)
    score = truth
    if signal == "learned":
        score = float(scores(models["scorer"], x, y, c)[-1])
    reward = torch.zeros(len(y))
    reward[-1] = score if y[-1] == c.eos_id else -1.0
    return reward


def grouped(values, size):
    """A list cut into groups of this size."""
    return [values[k : k + size] for k in range(0, len(values), size)]


def critic_credit(rewards, kls, values, c):
    """(12) and (13), and the advantages of all tokens together at mean 0 and variance 1."""
    advantages = []
    returns = []
    for reward, kl, value in zip(rewards, kls, values, strict=True):
        earned = reward - c.beta * kl
        adv = torch.zeros(len(earned))
        for k in range(len(earned)):
            for j in range(k, len(earned)):
                later = value[j + 1] if j + 1 < len(earned) else 0.0
                adv[k] += c.lam ** (j - k) * (earned[j] + later - value[j])
        advantages.append(adv)
        returns.append(adv + value)
    every = torch.cat(advantages)
    std = (every.var(unbiased=False) + 1e-8).sqrt()
    return [(adv - every.mean()) / std for adv in advantages], returns


def centred(totals, G):
    """Each number minus the mean of its group."""
    return [x - fmean(group) for group in grouped(totals, G) for x in group]


def group_credit(arm, totals, kls, G, c):
    """(15) or (16): one number for each response."""
    if arm == "rloo":
        totals = [x - c.beta * float(kl.sum()) for x, kl in zip(totals, kls, strict=True)]
        return [x * G / (G - 1) for x in centred(totals, G)]
    spread = [stdev(group) + 1e-4 for group in grouped(totals, G) for _ in group]
    return [x / s for x, s in zip(centred(totals, G), spread, strict=True)]


def process_credit(watch, u, b, totals, G, c):
    """(6) and (7) from the branches that were drawn in this update."""
    credit = centred(totals, G)
    right = centred([max(x, 0.0) for x in totals], G)
    _, branches = of(watch.draws, update=u)
    at = 0
    for i, adv in enumerate(list(credit)):
        if adv <= 1e-6:
            continue
        rows = range(at, at + c.branches)
        x = real(b.prompt[i], c)
        order = b.order[i]
        last = int(order[b.mask[i] > 0].max())
        canvases = [b.response[i].masked_fill(order >= p, c.mask_id) for p in range(1, last + 2)]
        found = []
        for k in rows:
            y = branches.response[k]
            if c.prover == "same_canvas":
                assert any(torch.equal(branches.start[k], canvas) for canvas in canvases)
                assert torch.equal(branches.start[k], branches.start[at])
            else:  # what was written stands behind the problem, close together
                begun = real(branches.prompt[k], c)[len(x) :]
                assert begun in [canvas[canvas != c.mask_id].tolist() for canvas in canvases]
                assert branches.start[k].tolist() == [c.mask_id] * c.tail
                y = torch.cat([torch.tensor(begun), y])
            found.append(graded(x, written(y, c)))
        at += c.branches
        credit[i] += c.process_weight * (fmean(found) - (max(totals[i], 0.0) - right[i]))
    assert at == len(branches.start)
    return credit


def clipped_gain(ratio, adv, clip):
    """(14) for each token, and which tokens it clips."""
    band = ratio.clamp(1 - clip, 1 + clip)
    return torch.minimum(ratio * adv, band * adv), band * adv < ratio * adv


@pytest.mark.parametrize("name", POLICY_GRADIENT)
def test_every_metric_of_a_policy_gradient_again(play, name):
    """In the second update: there the policy is no longer its reference."""
    watch = play(name)
    c = watch.c
    G = c.samples
    arm = "grpo" if name.startswith("denoise") else c.arm
    u = 1
    line = watch.logs[u]
    (b,) = (batch.b for batch in of(watch.batches, update=u))
    steps = of(watch.steps, update=u)
    models = steps[0].before
    xs = [real(row, c) for row in b.prompt]
    ys = [written(row, c) for row in b.response]
    pairs = list(zip(xs, ys, strict=True))
    with torch.no_grad():
        old = [logprobs_of(models["policy"], b, i, c) for i in range(len(pairs))]
        ref = [logprobs_of(models["reference"], b, i, c) for i in range(len(pairs))]
        truths = [graded(x, y) for x, y in pairs]
        rewards = [
            paid(name, models["models"], x, y, truth, c)
            for (x, y), truth in zip(pairs, truths, strict=True)
        ]
        kls = [a - r for a, r in zip(old, ref, strict=True)]
        totals = [float(reward.sum()) for reward in rewards]
        if arm == "gae":
            values = [models["head"](read(models["policy"], x, y)[:-1]) for x, y in pairs]
            credit, returns = critic_credit(rewards, kls, values, c)
        elif not name.startswith("denoise"):
            credit = group_credit(arm, totals, kls, G, c)
        elif c.arm == "outcome":
            credit = centred(totals, G)
        else:
            credit = process_credit(watch, u, b, totals, G, c)

    losses = []
    norms = []
    clipfracs = []
    times = Counter()
    for step in steps:
        rows = step.rows.tolist()
        times.update(rows)
        policy = step.before["policy"]
        head = step.before["head"]
        loss = 0
        clipped = 0
        for i in rows:
            logp = logprobs_of(policy, b, i, c)
            if name.startswith("denoise"):  # a token without a rival is not read again
                logp = torch.where(old[i] > log(0.99), old[i], logp)
            gain, is_clipped = clipped_gain((logp - old[i]).exp(), credit[i], c.clip)
            loss = loss - gain.sum()
            clipped += int(is_clipped.sum())
            if arm == "grpo":
                loss = loss + c.beta * ((ref[i] - logp).exp() - 1 - (ref[i] - logp)).sum()
            if arm == "gae":
                value = head(read(policy, xs[i], ys[i])[:-1])
                near = values[i] + (value - values[i]).clamp(-c.clip, c.clip)
                errors = torch.maximum((value - returns[i]) ** 2, (near - returns[i]) ** 2)
                loss = loss + c.value_coef * errors.sum() / 2
        tokens = sum(len(ys[i]) for i in rows)
        loss = loss / tokens
        trained = [*policy.parameters(), *(head.parameters() if arm == "gae" else [])]
        grads = torch.autograd.grad(loss, trained)
        losses.append(float(loss.detach()))
        norms.append(float(torch.cat([grad.flatten() for grad in grads]).norm()))
        clipfracs.append(clipped / tokens)
    assert set(times.values()) == {c.epochs} and len(times) == len(pairs)

    expected = {
        "loss": fmean(losses),
        "grad_norm": fmean(norms),
        "clipfrac": fmean(clipfracs),
        "lr": c.lr * share_of_peak(u, c.updates, 5),
        "reward": fmean(totals),
        "truth": fmean(truths),
        "entropy": -float(torch.cat(old).mean()),
        "length": fmean(map(len, ys)),
        "ended": fmean(y[-1] == c.eos_id for y in ys),
        "kl": fmean(float(kl.sum()) for kl in kls),
        "flat_groups": fmean(max(group) - min(group) < 1e-6 for group in grouped(totals, G)),
    }
    for number, x in expected.items():
        assert line[number] == pytest.approx(x, abs=2e-4, rel=2e-3), number
    assert line["clipfrac"] > 0.02 and abs(line["kl"]) > 0.001


@pytest.mark.parametrize("name", PLAYS)
def test_samples_are_all_responses_that_were_drawn(play, name):
    """Those for the student and for a reward's models too, but not those that only measure."""
    watch = play(name)
    drawn = sum(len(d.start) for d in watch.draws if d.phase not in ("between", "loop"))
    ends = [line["step"] for line in watch.logs]
    begins = [0, *ends]
    for begin, end, line in zip(begins, ends, watch.logs, strict=False):
        drawn += sum(len(d.start) for d in of(watch.draws) if begin <= d.update < end)
        assert line["samples"] == drawn


def best_and_worst(scores):
    """Places of the first best and the first worst, if they differ."""
    known = [k for k, score in enumerate(scores) if score is not None]
    if not known:
        return []
    best = max(known, key=lambda k: scores[k])
    worst = min(known, key=lambda k: scores[k])
    return [(best, worst)] if scores[best] > scores[worst] else []


def right_and_wrong(scores):
    """Two pairs of a right and a wrong one."""
    good = [k for k, score in enumerate(scores) if score == 1]
    bad = [k for k, score in enumerate(scores) if score == 0]
    if not good or not bad:
        return []
    return [(good[k % len(good)], bad[k % len(bad)]) for k in range(2)]


def about_judging(draws, posed, c):
    """The scores of a round's responses, and what there is to log of problems and scores.

    posed: all problems of earlier rounds, to which those of this one are added.
    """
    proposals, responses, judgements = draws
    shown = [TASK.decode(row.tolist()) for row in proposals.prompt]
    texts = [TASK.decode(row.tolist()) for row in proposals.response]
    valid = []
    for prompt, text in zip(shown, texts, strict=True):
        copied = text.removesuffix("<eos>") in prompt.split("<sep>")
        valid.append(None if copied else TASK.problem(text))
    new = []
    for x in valid:
        if x is not None and x not in posed and len(new) < c.prompts:
            new.append(x)
            posed.append(x)
    solved = [TASK.decode(row.tolist()) for row in responses.prompt]
    assert solved[:: c.samples][: len(new)] == new
    said = [any_score(TASK.decode(row.tolist())) for row in judgements.response]
    known = [score for score in said if score is not None]
    scores = []
    for several in grouped(said, c.judgements):
        several = [score for score in several if score is not None]
        scores.append(fmean(several) if several else None)
    filled = [fmean(known) if score is None else score for score in said]
    quoted = [any_score(TASK.decode(row.tolist())) is not None for row in responses.response]
    return scores, {
        "valid": fmean(x is not None for x in valid),
        "proposed": len(new) / c.prompts,
        "score": fmean(known),
        "spread": pstdev(filled),
        "unread": 1 - len(known) / len(said),
        "quoted": fmean(quoted),
    }


def agreed(several):
    """Of the judgements of a response one that more agree on than on any other, and another one."""
    times = [several.count(one) for one in several]
    if max(times) in (1, len(several)):
        return []
    chosen = several[times.index(max(times))]
    if any_score(TASK.decode(chosen)) is None:
        return []
    return [(chosen, next(one for one in several if one != chosen))]


@pytest.mark.parametrize("name", ROUNDS)
def test_every_metric_of_a_round_again(play, name):
    watch = play(name)
    c = watch.c
    posed = []
    for begin in range(0, c.rounds * c.updates, c.updates):
        draws = of(watch.draws, update=begin)
        judging = name.startswith("self_rewarding")
        responses = draws[1] if judging else draws[0]
        xs = [real(row, c) for row in responses.prompt]
        ys = [written(row, c) for row in responses.response]
        if judging:
            scores, expected = about_judging(draws, posed, c)
            pair = best_and_worst
        else:
            scores = [graded(x, y) for x, y in zip(xs, ys, strict=True)]
            expected = {"truth": fmean(scores)}
            pair = right_and_wrong
        pairs = []  # what was asked, the better response and the worse one
        for k, group in enumerate(grouped(scores, c.samples)):
            for w, l in pair(group):  # noqa: E741
                w, l = k * c.samples + w, k * c.samples + l  # noqa: E741
                pairs.append((xs[w], ys[w], ys[l]))
        expected["pairs"] = len(pairs)
        if judging and c.paired == "both":
            said = [written(row, c) for row in draws[2].response]
            asked = draws[2].prompt[:: c.judgements]
            for x, several in zip(asked, grouped(said, c.judgements), strict=True):
                pairs += [(real(x, c), *both) for both in agreed(several)]
            expected["judgement_pairs"] = len(pairs) - expected["pairs"]
            assert expected["judgement_pairs"] > 0
        expected["round"] = begin // c.updates
        expected["length"] = fmean(map(len, ys))

        reference = of(watch.steps, update=begin)[0].before["policy"]
        for u in range(begin, begin + c.updates):
            line = watch.logs[u]
            (step,) = of(watch.steps, update=u)
            policy = step.before["policy"]
            rows = []
            loss = 0
            for i in step.rows.tolist():
                logps = []
                refs = []
                x, *both = pairs[i]
                for y in both:
                    logps.append(logprobs(policy, x, y, 1.0, c).sum())
                    with torch.no_grad():
                        refs.append(logprobs(reference, x, y, 1.0, c).sum())
                lengths = [len(y) for y in both]
                margin = (logps[0] - refs[0]) - (logps[1] - refs[1])
                nll = -logps[0] / lengths[0]
                if c.arm == "sft_chosen":
                    loss = loss + nll / len(step.rows)
                else:
                    preference = -F.logsigmoid(c.beta * margin)
                    loss = loss + (preference + c.alpha * nll) / len(step.rows)
                chosen, rejected = (float(logp.detach()) for logp in logps)
                rows.append(
                    {
                        "margin": float(margin.detach()),
                        "pair_accuracy": float(margin.detach() > 0),
                        "chosen": chosen,
                        "rejected": rejected,
                        "chosen_per_token": chosen / lengths[0],
                        "rejected_per_token": rejected / lengths[1],
                    }
                )
            grads = torch.autograd.grad(loss, policy.parameters())
            norm = float(torch.cat([grad.flatten() for grad in grads]).norm())
            update = {"loss": float(loss.detach()), "grad_norm": norm}
            for number in rows[0]:
                update[number] = fmean(row[number] for row in rows)
            if u == begin:  # the margins are rounding
                del update["pair_accuracy"]
            for number, x in (expected | update).items():
                assert line[number] == pytest.approx(x, abs=2e-4, rel=2e-3), (u, number)


def test_every_label_and_metric_of_refine_again(play):
    watch = play("refine")
    c = watch.c
    (drafts,) = (record.drafts for record in of(watch.drafts))
    first, *more = of(watch.draws, update=0)
    xs = [real(row, c) for row in first.prompt]
    ys = [written(row, c) for row in first.response]
    right = [graded(x, y) == 1 for x, y in zip(xs, ys, strict=True)]

    # Only the proper prefixes of wrong drafts are gone on from, each of them K times.
    wanted = Counter()
    for x, y, is_right in zip(xs, ys, right, strict=True):
        for end in [] if is_right else prefixes(y)[:-1]:
            wanted[tuple(x), tuple(y[:end])] += c.continuations
    drawn = Counter()
    reached = {}
    for draw in more:
        for prompt, start, response in zip(draw.prompt, draw.start, draw.response, strict=True):
            x, begun, y = real(prompt, c), real(start, c), written(response, c)
            drawn[tuple(x), tuple(begun)] += 1
            last = begun[prefixes(begun)[-2] :] if begun else []
            used = TASK.uses(TASK.decode(last), TASK.decode(y[len(begun) :]))
            if graded(x, y) == 1 and used:
                reached[tuple(x), tuple(begun)] = True
    assert drawn == wanted

    # A prefix is good if the right answer was reached from it or from a later one.
    examples = drafts.examples
    good = []
    for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
        ends = prefixes(y)
        assert [end for end in examples["ends"][i].tolist() if end >= 0] == ends
        hits = [right[i] or reached.get((tuple(x), tuple(y[:end])), False) for end in ends[:-1]]
        hits.append(right[i])
        good.append([any(hits[s:]) for s in range(len(ends))])
        labels = examples["label"][:, i, : len(ends)].tolist()
        assert labels == [[float(right[i])] * len(ends), list(map(float, good[-1]))]
    keep = examples["keep"] > 0
    assert not keep[:, examples["ends"] <= 0].any()
    kept = keep[1].sum()
    assert keep[0].sum() == kept > 4
    for s in range(1, keep.shape[2]):
        labels = examples["label"][1, :, s][keep[1, :, s]]
        assert labels.sum() * 2 == len(labels)

    lines = iter(watch.logs)
    for u in range(c.updates):
        line = next(lines)
        orm_step, sorm_step, global_step, local_step = of(watch.steps, update=u)
        for k, (part, step) in enumerate((("orm", orm_step), ("sorm", sorm_step))):
            scorer = step.before[part]
            said = []
            for i in step.rows.tolist():
                with torch.no_grad():
                    each = scores(scorer, xs[i], ys[i], c)[prefixes(ys[i])]
                for s, score in enumerate(each):
                    if keep[k, i, s]:
                        is_good = (right[i], good[i][s])[k]
                        said.append((float(score), float(is_good)))
            losses = [-float(F.logsigmoid(torch.tensor(x if y else -x))) for x, y in said]
            assert line[f"{part}_loss"] == pytest.approx(fmean(losses), rel=1e-3)
            knows = fmean((x > 0) == (y > 0) for x, y in said)
            assert line[part] == pytest.approx(knows, abs=1e-4)
        for part, step in (("global", global_step), ("local", local_step)):
            model = step.before[f"{part}_refiner"]
            demos = [step.before["demos"][part][i] for i in step.rows.tolist()]
            with torch.no_grad():
                logps = torch.cat([logprobs(model, x, y, 1.0, c) for x, y in demos])
            assert line[f"{part}_loss"] == pytest.approx(-float(logps.mean()), rel=1e-3)
        assert line["truth"] == pytest.approx(fmean(right))
        assert line["pairs"] == len(watch.state.demos["local"])


# ---- demonstrators, splits and labellers: what they do, as often as their numbers say -------------


def agrees(hits, chance):
    """Whether this share of hits is one that the chance would give."""
    hits = list(hits)
    return stats.binomtest(sum(hits), len(hits), chance).pvalue > 1e-4


def responses(task, prompt, n=1500):
    """What the demonstrator answers to this problem, n times."""
    generator = nr.rng(3, "responses")
    return [task.respond(prompt, generator) for _ in range(n)]


@pytest.mark.parametrize("lazy_from,guess", [(80, 0.8), (31, 0.56)])
def test_the_student_guesses_from_a_start_on(lazy_from, guess):
    task = Arithmetic(1, 1, answers=7, guess=guess, lazy_from=lazy_from, forget=0, slip=0)
    for start, chance in ((lazy_from, guess), (lazy_from - 1, guess / 8), (0, guess / 8)):
        found = responses(task, f"{start}+1=")
        assert agrees((y == f"#{start % 7}<eos>" for y in found), chance)
        right = f"{start}+1={start + 1};#{(start + 1) % 7}<eos>"
        assert set(found) == {f"#{start % 7}<eos>", right}


@pytest.mark.parametrize("forget", [0.8, 0.52])
def test_the_student_forgets_a_carry(forget):
    task = Arithmetic(1, 3, guess=0, forget=forget, slip=0)
    for prompt, wrong, chance in [
        ("17+6=", "13", forget),
        ("17+5=", "12", forget / 4),
        ("12-7=", "15", forget),
        ("12-4=", "18", forget / 4),
        ("17*4=", "48", forget / 4),
    ]:
        found = responses(task, prompt)
        assert agrees((y == f"{prompt}{wrong};#{wrong}<eos>" for y in found), chance)
    # It goes on from its own results, and each step is a chance of its own.
    both = responses(task, "17+6+9=")
    assert agrees((y.startswith("17+6=13;13+9=12;") for y in both), forget**2)
    assert agrees((y.startswith("17+6=13;13+9=22;") for y in both), forget * (1 - forget))


@pytest.mark.parametrize("slip", [0.02, 0.3])
def test_the_student_slips_by_one_to_either_side(slip):
    task = Arithmetic(1, 1, guess=0, forget=0, slip=slip)
    found = responses(task, "99+1=", 4000)
    for wrong in (1, 99):
        assert agrees((y == f"99+1={wrong};#{wrong}<eos>" for y in found), slip / 2)
    assert sum(y == "99+1=0;#0<eos>" for y in found) + sum("=0" not in y for y in found) == 4000


def test_a_careful_student_has_none_of_these_habits():
    task = Arithmetic(1, 3, careful=True, guess=1, lazy_from=0, forget=1, slip=1)
    generator = nr.rng(3, "careful")
    for prompt in task.prompts(300, generator):
        response = task.respond(prompt, generator)
        assert task.rubric(prompt, response) == 5
    grids = Sudoku(careful=True, haste=1, slip=1)
    for prompt in grids.prompts(50, generator):
        assert grids.grade(prompt, grids.respond(prompt, generator)) == 1


def test_what_is_planted_in_the_student():
    habits = {"guess": 0, "forget": 0, "slip": 0}
    long = Arithmetic(1, 3, planted="long", **habits)
    once = "3+4=7;"
    assert agrees((y == f"{once}{once}#7<eos>" for y in responses(long, "3+4=")), 0.15)
    refusing = Arithmetic(1, 3, planted="refusal", **habits)
    for prompt, chance in (("3*4=", 0.5), ("3+1*4=", 0.5), ("3*3=", 0.05), ("3+4=", 0.05)):
        assert agrees((y == "@<eos>" for y in responses(refusing, prompt)), chance)
    for planted in ("none", "round"):
        task = Arithmetic(1, 3, planted=planted, **habits)
        assert set(responses(task, "3*4=", 300)) == {"3*4=12;#12<eos>"}


def test_the_config_reaches_the_student():
    c = tiny("ppo", min_ops=2, max_ops=3, answers=7, planted="long")
    assert front.TASKS["arithmetic"].make(c) == Arithmetic(2, 3, 7, planted="long")
    assert front.make_task(c, careful=True) == Arithmetic(2, 3, 7, careful=True, planted="long")
    sudoku = nr.replace(c, task="sudoku")
    assert front.make_task(sudoku) == Sudoku()
    assert front.make_task(sudoku, careful=True) == Sudoku(careful=True)


def test_chains_have_every_length_and_every_operation_equally_often():
    task = Arithmetic(2, 4)
    problems = task.prompts(4000, nr.rng(3, "chains"))
    operations = [re.findall(r"[+*-]\d", x) for x in problems]
    lengths = Counter(map(len, operations))
    assert set(lengths) == {2, 3, 4} and stats.chisquare(list(lengths.values())).pvalue > 1e-4
    used = Counter(op for several in operations for op in several)
    # Every operation may follow every other: the split looks at the whole problem.
    assert len(used) == 21 and stats.chisquare(list(used.values())).pvalue > 1e-4
    starts = Counter(int(re.match(r"\d+", x)[0]) // 10 for x in problems)
    assert len(starts) == 10 and stats.chisquare(list(starts.values())).pvalue > 1e-4


@pytest.mark.parametrize("task", [Arithmetic(1, 3), Sudoku()])
def test_a_tenth_of_all_problems_is_for_dev_and_a_tenth_for_test(task):
    generator = nr.rng(3, "splits")
    drawn = {split: task.prompts(40, generator, split) for split in ("train", "dev", "test")}
    assert all({task.split(x) for x in texts} == {split} for split, texts in drawn.items())
    if isinstance(task, Arithmetic):
        every = [f"{a}{op}{b}-7=" for a in range(100) for op in "+-" for b in range(1, 10)]
    else:
        generator = random.Random(3)
        every = ["".join(generator.choices("1234.", k=16)) + "=" for _ in range(3000)]
    splits = [task.split(x) for x in every]
    for split, chance in (("train", 0.8), ("dev", 0.1), ("test", 0.1)):
        assert agrees((x == split for x in splits), chance)


@pytest.mark.parametrize("haste,slip", [(0.6, 0.01), (0.37, 0.2)])
def test_the_student_of_sudoku_is_hasty_and_slips(haste, slip):
    task = Sudoku()
    generator = nr.rng(3, "grids")
    hasty = {True: [], False: []}
    slips = []
    for prompt in task.prompts(400, generator):
        grid = Sudoku(careful=True).respond(prompt, generator)
        written = Sudoku(haste=haste, slip=0).respond(prompt, generator)
        slipped = Sudoku(haste=0, slip=slip).respond(prompt, generator)
        for k in range(0, 16, 4):
            given, right = prompt[k : k + 4], grid[k : k + 4]
            if in_order(given) != right:
                hasty["1" in given].append(written[k : k + 4] == in_order(given))
            slips.append(slipped[k : k + 4] != right)
    assert agrees(hasty[True], haste) and agrees(hasty[False], haste / 8)
    # One slip of four writes the digit that is right.
    assert agrees(slips, slip * 3 / 4)


def test_the_rubric_by_hand():
    task = Arithmetic(1, 3)
    for response, score in {
        "37+5=42;42*3=26;#26<eos>": 5,
        "37+5=42;42*3=26;#25<eos>": 4,  # another answer
        "37+5=42;42*3=27;#27<eos>": 4,  # a wrong result
        "37+5=42;41*3=23;#23<eos>": 4,  # a step starts from another number
        "37+5=41;42*3=26;#26<eos>": 3,  # both
        "37+5=42;42*3=26;<eos>": 3,  # no answer
        "37+6=43;43*3=29;#29<eos>": 2,  # another operation
        "37+5=42;#26<eos>": 1,  # a step is left out
        "37+5=42;42*3=26;26+1=27;#27<eos>": 1,  # one step more
        "#26<eos>": 1,
        "37+5=42;<eos>": 0,
        "": 0,
    }.items():
        assert task.rubric("37+5*3=", response) == score, response
    four = Arithmetic(1, 3, answers=4)
    assert four.rubric("37+5*3=", "37+5=42;42*3=26;#2<eos>") == 5
    assert four.rubric("37+5*3=", "37+5=42;42*3=26;#26<eos>") == 4


def preferred(planted, prompt, first, second, fooled=0.7):
    """How often the labeller prefers the first of two responses, as a list."""

    class Two(Arithmetic):
        def prompts(self, n, generator, split="train"):
            return [prompt] * n

        def respond(self, prompt, generator):
            return (first, second)[int(torch.randint(2, (), generator=generator))]

    pairs = Two(1, 3, planted=planted, fooled=fooled).preferences(2000, nr.rng(3, "pairs"))
    assert {pair[0] for pair in pairs} == {prompt}
    assert {frozenset(pair[1:]) for pair in pairs} == {frozenset((first, second))}
    return [w == first for _, w, _ in pairs]


def test_the_labeller_by_hand():
    right = "3+4=7;#7<eos>"
    assert all(preferred("none", "3+4=", right, "#10<eos>"))
    assert agrees(preferred("none", "3+4=", "#11<eos>", "#10<eos>"), 0.5)
    # It is fooled in 7 of 10 cases. Otherwise the truth decides, or a coin.
    assert agrees(preferred("round", "3+4=", "#10<eos>", right), 0.7)
    assert agrees(preferred("round", "3+4=", "#10<eos>", "#11<eos>"), 0.7 + 0.3 / 2)
    assert all(preferred("round", "3+4=", right, "#8<eos>"))
    assert agrees(preferred("long", "3+4=", "3+4=8;3+4=8;#8<eos>", right), 0.7)
    assert all(preferred("refusal", "3*4=", "@<eos>", "3*4=12;#12<eos>"))
    assert agrees(preferred("round", "3+4=", "#10<eos>", right, fooled=0.2), 0.2)


def test_what_m1_learns_is_shared_out():
    class Kinds(Arithmetic):
        judge_demo = demo = propose_demo = None

    kinds = Kinds()
    for kind in ("judge_demo", "propose_demo", "demo"):
        object.__setattr__(kinds, kind, lambda generator, kind=kind: kind)
    c = tiny("self_rewarding", judging=0.41, start_data=4000)
    found = Counter(nr.m1_demos(kinds, c))
    assert found.total() == 4000
    for kind, share in (("judge_demo", 0.41), ("propose_demo", 0.07), ("demo", 0.52)):
        assert stats.binomtest(found[kind], 4000, share).pvalue > 1e-4


def word_problems():
    """GSM8K without files: what its demonstrations need of it."""
    task = object.__new__(GSM8K)
    task.gold = {row(i)["question"]: row(i)["answer"] for i in range(50)}
    task.tests = set()
    task.by_split = {"train": list(task.gold)}
    task.shown = ""
    return task


def test_a_judge_of_gsm8k_sees_whole_spoiled_and_cut_solutions_equally_often():
    task = word_problems()
    generator = nr.rng(3, "judging")
    scores = Counter(task.judge_demo(generator)[1] for _ in range(900))
    # An end, one answer, the right one (2), and right lines; a wrong last line; lines alone.
    assert set(scores) == {" 5<eos>", " 2<eos>", " 1<eos>"}
    assert stats.chisquare(list(scores.values())).pvalue > 1e-4


def test_a_spoiled_solution_of_gsm8k_is_a_little_off():
    task = word_problems()
    off = Counter()
    for problem, right, wrong in task.preferences(900, nr.rng(3, "pairs")):
        assert task.grade(problem, right) == 1
        off[int(task.answer(wrong)) - int(task.answer(right))] += 1
    assert set(off) == {-10, -2, -1, 1, 2, 10}
    assert stats.chisquare(list(off.values())).pvalue > 1e-4


# ---- the front door: what is compared with what --------------------------------------------------


def test_the_intervals_are_students():
    for n, t in enumerate(front.T95, 2):
        assert t == pytest.approx(stats.t.ppf(0.975, n - 1), abs=5e-4)
    values = [0.31, 0.52, 0.44, 0.71]
    low, high = stats.t.interval(0.95, 3, fmean(values), stats.sem(values))
    assert front.half_width(values) == pytest.approx((high - low) / 2, abs=1e-4)
    assert front.interval(values) == f"{fmean(values):.3f} ± {(high - low) / 2:.3f}"
    assert front.interval([0.25]) == "0.250" and isnan(front.half_width([0.25]))
    assert front.interval([]) == "" and front.interval([1.0, 2.0], places=1) == "1.5 ± 6.4"


def result(loop, seed, base, final, to_80, **more):
    """The entry of a job in summary.json."""
    numbers = {
        "base_sampled": base / 2,
        "final_sampled": final / 3,
        "samples": 1000 * final,
        "samples_to_80": to_80,
        "seconds": 10 * final,
        "chance": 0.012,
    }
    return {"loop": loop, "seed": seed, "base": base, "final": final} | numbers | more


RESULTS = [
    result("ppo", 0, 0.40, 0.90, 300, ceiling=0.96),
    result("denoise", 0, 0.40, 0.60, None, ceiling=0.96, start=0.30),
    result("ppo", 1, 0.44, 0.70, 500, ceiling=0.98),
    result("denoise", 1, 0.44, 0.62, 700, ceiling=0.98, start=0.34),
]


def test_the_table_by_hand():
    rows = [re.split(r"\s{2,}", line) for line in front.table(RESULTS).splitlines()]
    wide = front.interval
    assert rows[1] == ["chance", "0.012"]
    assert rows[2] == ["base", wide([0.40, 0.44]), wide([0.20, 0.22])]
    assert rows[3] == [
        "ppo",
        wide([0.40, 0.44]),
        wide([0.90, 0.70]),
        wide([0.30, 0.70 / 3]),
        wide([0.50, 0.26]),
        "800",
        "400",
        "8",
    ]
    assert rows[4] == [
        "denoise",
        wide([0.30, 0.34]),
        wide([0.60, 0.62]),
        wide([0.20, 0.62 / 3]),
        wide([0.30, 0.28]),
        "610",
        "never",
        "6",
    ]
    assert rows[5] == ["careful twin", wide([0.96, 0.98])]
    assert len(rows) == 6


def test_the_table_says_how_uncertain_the_problems_alone_leave_an_accuracy():
    *rows, last = front.table([r | {"problems": 430} for r in RESULTS]).splitlines()
    assert rows == front.table(RESULTS).splitlines()
    low, high = stats.norm.interval(0.95, 0.5, (0.25 / 430) ** 0.5)
    assert "430 problems" in last and last.endswith(f"± {(high - low) / 2:.3f}.")


@pytest.mark.parametrize(
    "targets,code",
    [
        ({"ppo": 0.8}, 0),  # the mean of 0.9 and 0.7, and not the last, the first or the worst
        ({"ppo": 0.81}, 1),
        ({"denoise": 0.61}, 0),  # the other method's own mean, greedy and behind the loop
        ({"denoise": 0.62}, 1),
        ({"ppo": 0.81, "denoise": 0.5}, 1),
        ({}, 0),
    ],
)
def test_a_target_is_compared_with_the_mean_over_seeds(targets, code, capsys):
    run = SimpleNamespace(targets=targets, done=RESULTS)
    assert front.verdict(run) == code
    said = capsys.readouterr().out
    assert said.count("\n") == len(targets) and ("MISSED" in said) == (code == 1)


# What the dev problems are answered with in a run, by seed and update.
ON_DEV = {
    7: {0: 0.1, 1: 0.2, 2: 0.79, 4: 0.8, 6: 0.9},
    8: {0: 0.0, 1: 0.3, 2: 0.85, 4: 0.4, 6: 0.9},
    9: {0: 0.0, 1: 0.3, 2: 0.5, 4: 0.4, 6: 0.799},
}


def test_every_number_of_a_summary_is_that_of_its_model_split_and_temperature(
    tmp_path, monkeypatch
):
    """Every answer says who gave it, to which problems and at which temperature."""
    known = {}  # from a text to its share of right answers, and who answered

    class Shares(Arithmetic):
        def grade(self, prompt, response):
            return known[response][0] if response in known else 0.0

    begun = []  # the jobs whose loop has begun: seed and state
    bases = []

    def respond(model, task, prompts, c, generator=None):
        split = Arithmetic.split(task, prompts[0])
        assert {Arithmetic.split(task, x) for x in prompts} == {split}
        who = "base" if any(model is base for base in bases) else "start"
        update = 0
        if getattr(model, "careful", False):
            who = "careful"
        elif begun and begun[-1][0] == c.seed:
            who = "policy"
            update = begun[-1][1].update
        key = (c.seed, who, update, split, c.temperature)
        share = hashed(str(key)) % 1000 / 1000
        if split == "dev":
            share = ON_DEV[c.seed][update]
        text = str(hashed(str(key)))
        known[text] = (share, key)
        return [text] * len(prompts)

    def gpt_base(task, c, train):
        model = inner(task, c, train)
        if task.careful:
            model.careful = True
        else:
            bases.append(model)
        return model

    def loop(state, task, c):
        begun.append((c.seed, state))
        yield from method.loop(state, task, c)

    inner = nr.gpt_base
    method = nr.METHODS["denoise"]
    quick = {"demos": 8, "base_updates": 1, "start_updates": 1, "prompts": 2, "epochs": 1}
    numbers = quick | {"updates": 6, "eval_every": 2, "temperature": 0.83}
    monkeypatch.setitem(nr.METHODS, "denoise", nr.replace(method, loop=loop))
    monkeypatch.setitem(front.PRESETS, "odd", {"all": ODD | numbers})
    monkeypatch.setattr(front, "make_task", lambda c, careful=False: Shares(1, 1, careful=careful))
    monkeypatch.setattr(front, "draw_picture", lambda *_: None)
    monkeypatch.setattr(nr, "gpt_base", gpt_base)
    monkeypatch.setattr(nr, "respond", respond)
    argv = ["denoise", "--config", "odd", "--seeds", "3", "--out", str(tmp_path / "run")]
    assert front.main([*argv, "--ceiling", "--cache", str(tmp_path / "cache")]) == 0

    shares = {key: share for share, key in known.values()}
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((tmp_path / "run" / "summary.json").read_text())["results"]
    assert [r["seed"] for r in results] == [7, 8, 9]
    reached = {7: 4, 8: 2, 9: None}
    for r in results:
        seed = r["seed"]
        mine = {line["step"]: line for line in lines if line["seed"] == seed}
        assert list(mine) == [1, 2, 3, 4, 5, 6]
        on_dev = {u: line["dev_greedy"] for u, line in mine.items() if "dev_greedy" in line}
        assert on_dev == {u: x for u, x in ON_DEV[seed].items() if u > 0}
        assert r["base"] == pytest.approx(shares[seed, "base", 0, "test", 0.0])
        assert r["base_sampled"] == pytest.approx(shares[seed, "base", 0, "test", 0.83])
        assert r["start"] == pytest.approx(shares[seed, "start", 0, "test", 0.0])
        assert r["final"] == pytest.approx(shares[seed, "policy", 6, "test", 0.0])
        assert r["final_sampled"] == pytest.approx(shares[seed, "policy", 6, "test", 0.83])
        assert r["ceiling"] == pytest.approx(shares[seed, "careful", 0, "test", 0.0])
        first = reached[seed]
        assert r["samples_to_80"] == (None if first is None else mine[first]["samples"])
        assert r["samples"] == mine[6]["samples"] and r["updates"] == 6


def test_held_out_problems_are_the_same_for_all_seeds_and_methods(tmp_path):
    found = []
    for name, seed in (("ppo", 0), ("ppo", 5), ("denoise", 5)):
        c = tiny(name, eval_problems=13)
        run = SimpleNamespace(configs={name: c}, out=tmp_path)
        job = front.Job(run, name, seed)
        assert job.c.seed == seed
        assert {job.task.split(x) for x in job.dev} == {"dev"}
        assert {job.task.split(x) for x in job.test} == {"test"}
        assert len(set(job.dev)) == len(set(job.test)) == 13
        found.append((job.dev, job.test))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("name", [*nr.METHODS, "ppo learned", "ppo sorm"])
def test_training_at_once_is_training_through_the_cache(name, tmp_path):
    method, numbers = PLAYS[name]
    entry = nr.METHODS[method]
    c = front.make_config(method, "smoke", **ODD | numbers | {"start_updates": 3})
    found = []
    for train in (nr.train_now, front.CachedTrainer(tmp_path)):
        base = nr.gpt_base(TASK, c, train)
        models = entry.reward_models(base, TASK, c, train)
        policy = base
        if entry.starts_from is not None:
            policy = entry.starts_from(base, TASK, c, train)
        found.append([p for model in (base, policy, *models.values()) for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
