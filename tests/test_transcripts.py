"""What a run writes down to be looked at, the conversation with it, and what it says at work."""

import contextlib
import io
import json
import math
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nanoreward as nr
import train_small as front
import workers
from data import arithmetic, countdown, sudoku
from data.arithmetic import LETTERS, Arithmetic
from tests.conftest import ROOT, rough, tiny

TASK = Arithmetic(1, 3)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def tour(tmp_path_factory, cache):
    """A smoke run of every method, in this process."""
    out = tmp_path_factory.mktemp("runs") / "tour"
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert front.main(["--config", "smoke", "--out", str(out), "--cache", str(cache)]) == 0
    (out.parent / "said").write_text(said.getvalue())
    return out


def lines(out, name):
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def test_the_tour_runs_every_method_and_each_of_them_answers(tour, capsys):
    said = (tour.parent / "said").read_text()
    summary = json.loads((tour / "summary.json").read_text())
    assert [r["loop"] for r in summary["results"]] == list(nr.METHODS)
    assert set(json.loads((tour / "config.json").read_text())["configs"]) == set(nr.METHODS)
    table = front.table(summary["results"])
    assert table in said and all(f"\n{name} " in table for name in nr.METHODS)
    # `sample` reads the models back and answers what the run answered at its end
    last = {m["loop"]: m["step"] for m in lines(tour, "metrics.jsonl")}
    for shown in lines(tour, "samples.jsonl"):
        if shown["step"] == last[shown["loop"]]:
            prompt = shown["prompt"]
            assert (
                front.main(["sample", str(tour), "--loop", shown["loop"], "--prompt", prompt]) == 0
            )
            word = "right" if shown["reward"] else "wrong"
            assert capsys.readouterr().out == f"{prompt} {shown['response']}  {word}\n"


# ---- tasks: the right way, and the order in which people read ------------------------------------


@pytest.mark.parametrize("module", [arithmetic, countdown, sudoku])
@pytest.mark.parametrize("planted", ["none", "refusal", "long"])
def test_the_solution_of_a_problem_is_right_in_every_step(module, planted):
    c = tiny("ppo", min_ops=2, max_ops=3, answers=4, planted=planted)
    task = module.make(c)
    for prompt in task.prompts(50, nr.rng(0, "test"), "dev"):
        text = task.solution(prompt)
        assert task.grade(prompt, text) == 1
        [ids] = task.encode([text])
        steps = [step for step, _ in task.steps(ids)]
        assert steps and all(task.step_ok(prompt, steps))


@given(st.text(LETTERS, max_size=30))
def test_tokens_in_reading_order_spell_the_text(text):
    [ids] = TASK.encode([text + "<eos>"])
    inside = front.of_tokens(TASK, ids, {"shift": list(range(len(ids))), "said": ["a"]})
    assert "".join(inside["tokens"]) == text + "<eos>" and inside["said"] == ["a"]
    # each number went with its token
    for word, place in zip(inside["tokens"], inside["shift"], strict=True):
        assert TASK.tokenizer.id_to_token(ids[place]) == word


def test_places_behind_the_end_stay_behind_it():
    [ids] = TASK.encode(["#47<eos>"])
    inside = front.of_tokens(TASK, ids, {"order": [5, 6, 7, 8, 9, 9]})
    assert inside["tokens"] == ["#", "4", "7", "<eos>"]
    assert inside["order"] == [5, 7, 6, 8, 9, 9]


# ---- what the logs hold --------------------------------------------------------------------------


def test_the_same_problems_are_shown_at_every_look(tour):
    shown = lines(tour, "samples.jsonl")
    assert {x["loop"] for x in shown} == set(nr.METHODS)
    for name, method in nr.METHODS.items():
        asked = {}
        for x in (x for x in shown if x["loop"] == name):
            asked.setdefault(x["step"], []).append(x["prompt"])
            assert "".join(x["tokens"]) == x["response"]
            assert x["reward"] == Arithmetic(1, 1, answers=4).grade(x["prompt"], x["response"])
        looks = list(asked.values())
        assert len(looks) >= 4 and 0 in asked
        assert all(look == looks[0] for look in looks)
        # some were right before the training and some were wrong, if there were any
        first = [x["reward"] for x in shown if x["loop"] == name and x["step"] == 0]
        assert first == sorted(first, reverse=True) and 0 < len(first) <= 2 * method.shown


OF_EACH = {
    "ppo": {"token_rewards", "shift", "value"},
    "seq2seq": {"token_rewards", "shift", "value"},
    "iterative_dpo": {"logp"},
    "self_rewarding": {"logp"},
    "refine": set(),
    "denoise": set(),
}


def test_what_the_reward_says_has_a_number_for_each_token(tour):
    for x in lines(tour, "samples.jsonl"):
        for key in OF_EACH[x["loop"]]:
            assert len(x[key]) == len(x["tokens"]), (x["loop"], key)
        if x["loop"] == "refine":
            assert x["step_ends"][-1] == len(x["tokens"])
            assert len(x["orm"]) == len(x["sorm"]) == len(x["step_ends"])
            assert all(0 <= p <= 1 for p in x["orm"] + x["sorm"])
        if x["loop"] == "self_rewarding":
            assert len(x["judgements"]) == len(x["scores"]) == 3
            for text, score in zip(x["judgements"], x["scores"], strict=True):
                assert score == nr.parse_score(text)
        if x["loop"] == "denoise":
            passes = len(x["said"])
            assert passes == 1 + max(x["order"][: len(x["tokens"])])
            assert len(x["prospects"]) == len(x["branches"]) == passes
            task = Arithmetic(1, 1, answers=4)
            for value, branches in zip(x["prospects"], x["branches"], strict=True):
                right = [task.grade(x["prompt"], text) == 1 for text, _ in branches]
                assert right == [said for _, said in branches]
                assert value == pytest.approx(sum(right) / len(right), abs=1e-3)
        steps = re.findall(r"[^;]*;", x["response"])
        assert x["steps_right"] == Arithmetic(1, 1, answers=4).step_ok(x["prompt"], steps)


def test_answers_hold_all_of_dev_before_and_after(tour):
    answers = lines(tour, "answers.jsonl")
    results = json.loads((tour / "summary.json").read_text())["results"]
    dev = None
    for result in results:
        mine = [x for x in answers if x["loop"] == result["loop"]]
        assert len(mine) == result["dev_problems"] > 20
        asked = [x["prompt"] for x in mine]
        dev = dev or asked
        assert asked == dev  # the same problems for every method
        before = [x["before"]["reward"] for x in mine]
        after = [x["after"]["reward"] for x in mine]
        assert result["start_dev"] == sum(before) / len(before)
        change = [b - a for a, b in zip(before, after, strict=True)]
        assert (result["mended"], result["broken"]) == (change.count(1), change.count(-1))
        # the last look at dev is the same policy
        looks = [m for m in lines(tour, "metrics.jsonl") if m["loop"] == result["loop"]]
        assert looks[-1]["dev_greedy"] == sum(after) / len(after)
        told = [x for x in mine if "tokens" in x["after"]]
        assert told and all("tokens" in x["before"] for x in told)
        kinds = {(x["before"]["reward"], x["after"]["reward"]) for x in mine}
        assert {(x["before"]["reward"], x["after"]["reward"]) for x in told} == kinds
        for x in told:
            assert "".join(x["after"]["tokens"]) == x["after"]["response"]
        for x in mine:
            assert Arithmetic(1, 1, answers=4).grade(x["prompt"], x["solution"]) == 1
    assert any(r["mended"] for r in results) and any(r["broken"] for r in results)


def test_denoise_shows_how_it_wrote_before_it_was_trained(tour):
    """The canvases of `before` are those of the policy of that time: they end in its response."""
    told = [x for x in lines(tour, "answers.jsonl") if x["loop"] == "denoise"]
    told = [x for x in told if "tokens" in x["before"]]
    assert len(told) >= 3
    at_start = [x for x in lines(tour, "samples.jsonl") if x["loop"] == "denoise"]
    at_start = {x["prompt"]: x for x in at_start if x["step"] == 0}
    same = 0
    for x in told:
        [ids] = TASK.encode([x["before"]["response"]])
        assert len(x["before"]["tokens"]) == len(ids)
        if x["prompt"] in at_start:
            same += 1
            assert x["before"]["order"] == at_start[x["prompt"]]["order"]
            assert x["before"]["sure"] == at_start[x["prompt"]]["sure"]
    assert same


def test_pairs_hold_the_margin_that_the_loss_sees(tour):
    pairs = lines(tour, "pairs.jsonl")
    assert {x["loop"] for x in pairs} == {"iterative_dpo", "self_rewarding"}
    for x in pairs:
        gains = [x[side]["gain"] for side in ("chosen", "rejected")]
        assert x["margin"] == pytest.approx(gains[0] - gains[1], abs=2e-3)
        for side in ("chosen", "rejected"):
            assert len(x[side]["logp"]) == len(x[side]["tokens"])
            assert "".join(x[side]["tokens"]) == x[side]["response"]


def test_the_margin_of_a_pair_is_that_of_the_loss():
    c = tiny("iterative_dpo")
    policy = rough(c)
    state = nr.start_rounds(policy, c)
    assert nr.pairs_of_the_round(state, TASK, c) == []
    prompt = nr.encode_prompts(TASK, ["3+4=", "55*2="], c)
    texts = ["3+4=7;#3<eos>", "#1<eos>", "55*2=10;#2<eos>", "#<eos>"]
    response = nr.right_pad(TASK.encode(texts), c.pad_id, c.response)
    state.pairs = {"prompt": prompt, "response": response.view(2, 2, -1)}
    state.pairs["ref"] = torch.tensor([[-3.0, -4.0], [-5.0, -7.0]])
    found = nr.pairs_of_the_round(state, TASK, c)
    logp = nr.pair_logprobs(policy, state.pairs, torch.arange(2))
    length = torch.tensor([[7, 3], [9, 2]])
    _, margin = nr.dpo_nll(logp, state.pairs["ref"], length, c)
    assert [x["margin"] for x in found] == pytest.approx(margin.tolist(), abs=0.02)
    assert [x["prompt"] for x in found] == ["3+4=", "55*2="]
    assert [x[side]["response"] for x in found for side in ("chosen", "rejected")] == texts


def test_the_shift_is_what_the_policy_has_learned_of_a_token():
    c = tiny("ppo")
    state = nr.start_ppo(rough(c), c)
    b = front.as_rollout(TASK, ["3+4=", "55*2="], ["3+4=7;#3<eos>", "#1<eos>"], c)
    for inside in nr.token_rewards(state, TASK, b, c):
        assert set(inside["shift"]) == {0.0}
    state.reference = rough(c, 1)
    found = nr.token_rewards(state, TASK, b, c)
    logp = [
        nr.token_logprobs(m, b.prompt, b.response, 1.0) for m in (state.policy, state.reference)
    ]
    moved = (logp[0] - logp[1])[b.mask > 0].tolist()
    assert [x for inside in found for x in inside["shift"]] == pytest.approx(moved, abs=1e-3)
    assert all(len(inside["value"]) == len(inside["shift"]) for inside in found)


def test_judgements_that_are_shown_leave_the_loop_as_it_was():
    c = tiny("self_rewarding")
    state = nr.start_self_rewarding(rough(c), c)
    state.samples = 7
    state.judgements = {"kept": torch.ones(1)}
    b = front.as_rollout(TASK, ["3+4="], ["3+4=7;#3<eos>"], c)
    [inside] = nr.explain_judgements(state, TASK, b, c)
    assert len(inside["judgements"]) == c.judgements
    assert state.samples == 7 and set(state.judgements) == {"kept"}


def test_a_number_that_is_none_becomes_null_at_any_depth(tmp_path):
    bad = {"a": math.nan, "b": [1.0, math.inf, {"c": -math.inf}], "d": ("x", None, True)}
    front.append(tmp_path / "log.jsonl", bad)
    front.write_lines(tmp_path / "all.jsonl", [bad])
    for name in ("log.jsonl", "all.jsonl"):
        [line] = lines(tmp_path, name)
        assert line == {"a": None, "b": [1.0, None, {"c": None}], "d": ["x", None, True]}


def test_a_warning_is_logged_once_and_not_again_after_a_resume(tour, cache, tmp_path):
    told = [m for m in lines(tour, "metrics.jsonl") if "note" in m]
    assert told and all(isinstance(m["note"], str) for m in told)
    job = SimpleNamespace(told=set())
    for m in lines(tour, "metrics.jsonl"):
        if m["loop"] == "self_rewarding":
            numbers = {name: x for name, x in m.items() if x is not None}
            found = front.notes(numbers, tiny("self_rewarding"))
            new = [text for kind, text in found.items() if kind not in job.told]
            job.told |= found.keys()
            assert m.get("note", "") == "; ".join(new)


def test_the_config_says_how_the_run_was_begun(tour):
    about = json.loads((tour / "config.json").read_text())
    assert about["command"].startswith("train_small.main(['--config', 'smoke', '--out', ")
    found = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    if found.returncode == 0:
        assert found.stdout.startswith(about["commit"].removesuffix("+")) and about["commit"]
    changed = json.loads((tour / "summary.json").read_text())["changed"]
    assert set(changed) == set(nr.METHODS)
    for name, numbers in changed.items():
        c = about["configs"][name]
        default = nr.METHODS[name].config()
        assert numbers == {k: c[k] for k in numbers}
        assert all(c[k] != vars(default)[k] for k in numbers) and "max_ops" in numbers


def test_no_checkout_has_no_commit(tmp_path, monkeypatch):
    assert front.commit_of(tmp_path) == ""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert front.commit_of(ROOT) == ""


# ---- the conversation ----------------------------------------------------------------------------


def talk(monkeypatch, capsys, tour, cache, *typed, argv=()):
    """What is said when these lines are typed into `sample`: the exit code and the lines."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in typed)))
    code = front.main(["sample", str(tour), "--cache", str(cache), *argv])
    return code, capsys.readouterr().out


@pytest.mark.parametrize("name", list(nr.METHODS))
def test_a_conversation_shows_before_and_after(monkeypatch, capsys, tour, cache, name):
    answers = [x for x in lines(tour, "answers.jsonl") if x["loop"] == name][:4]
    typed = [x["prompt"] for x in answers]
    code, said = talk(monkeypatch, capsys, tour, cache, *typed, argv=("--loop", name))
    assert code == 0 and "\033" not in said
    for x in answers:
        for who, side in (("before", "before"), (name, "after")):
            text = x[side]["response"].replace("<eos>", "")
            word = "right" if x[side]["reward"] == 1 else "wrong"
            assert f"{who:15} {text}   {word}\n" in said
    wrong = [x for x in answers if 0 in (x["before"]["reward"], x["after"]["reward"])]
    assert wrong
    for x in wrong:
        assert f"{'the right way':15} {x['solution'].removesuffix('<eos>')}\n" in said
    assert ("SORM" in said) == (name == "refine") and ("its judge" in said) == (
        name == "self_rewarding"
    )


def test_a_mistake_in_a_conversation_is_a_line_and_it_goes_on(monkeypatch, capsys, tour, cache):
    typed = ["nonsense", "3+4=é", ":loop nope", ":seed 9", ":seed x", ":temperature -1"]
    typed += [":temperature nan", ":what", "", "9" * 5000]
    code, said = talk(monkeypatch, capsys, tour, cache, *typed, "3+4=", ":quit", "5+5=")
    assert code == 0
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(typed) - 1  # an empty line says nothing
    assert f"{'the right way':15} 3+4=7;#3" in said or "right" in said
    assert "5+5" not in said  # it was over by then


def test_a_conversation_changes_method_and_temperature(monkeypatch, capsys, tour, cache):
    problems = ["3+4=", "88-9=", "50*2=", "12+7="]
    typed = [":loop refine", *problems, ":temperature 1", *problems, ":temperature 0", ":help"]
    code, said = talk(monkeypatch, capsys, tour, cache, *typed, *problems)
    assert code == 0
    found = re.findall(r"^refine +(.*?)   (?:right|wrong)$", said, re.M)
    greedy, sampled, again = found[:4], found[4:8], found[8:]
    assert len(again) == 4 and greedy == again != sampled
    hot = front.open_trained(tour, "refine", 0, 1.0)
    texts = [hot.answer(problem, 5 + i) for i, problem in enumerate(problems)]  # new ones each time
    assert sampled == [text.replace("<eos>", "") for text in texts]
    assert ": ppo, seed 0" in said and ": refine, seed 0" in said
    assert ", ".join(nr.METHODS) in said
    example = re.search(r"Type a problem, for example (\S+)", said)[1]
    assert Arithmetic(1, 1, answers=4).grade(example, "") == 0  # it is one


def test_a_terminal_gets_colours_and_the_same_text(monkeypatch, tour, cache):
    """Each token in its colour; without the colours it is the plain line."""

    class Screen(io.StringIO):
        def isatty(self):
            return True

    for name in nr.METHODS:
        answers = [x for x in lines(tour, "answers.jsonl") if x["loop"] == name][:4]
        screen = Screen()
        monkeypatch.setattr(sys, "stdout", screen)
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(x["prompt"] for x in answers)))
        front.main(["sample", str(tour), "--cache", str(cache), "--loop", name])
        said = screen.getvalue()
        plain = re.sub(r"\033\[[\d;]*m", "", said)
        for x in answers:
            assert f"{name:15} {x['after']['response'].replace('<eos>', '')}   " in plain
        assert "blue: " in plain and "\033[" in said, name


def test_what_a_beginner_types_is_understood(monkeypatch, capsys, tour, cache):
    code, said = talk(monkeypatch, capsys, tour, cache, "3+4=", "3+4", " 3 + 4 =", "3 + 4", ":loop")
    assert code == 0 and "error: :loop wants a method: ppo, " in said
    found = re.findall(r"^ppo +(.*)$", said, re.M)
    assert len(found) == 4 and len(set(found)) == 1


def test_a_conversation_finds_the_bases_of_its_run(monkeypatch, capsys, tour, cache):
    """It trains nothing again, and writes nothing into the cache of another place."""
    monkeypatch.setattr(front, "CACHE", tour / "none")
    monkeypatch.setattr(sys, "stdin", io.StringIO("3+4=\n"))
    assert front.main(["sample", str(tour)]) == 0
    assert "training" not in capsys.readouterr().out and not (tour / "none").exists()


def test_colours_follow_the_numbers():
    talk = SimpleNamespace(coloured=True)
    talk.kind_of = lambda inside: front.Conversation.kind_of(talk, inside)
    inside = {
        "tokens": ["a", "b", "c"],
        "token_rewards": [1.0, -1.0, 0.0],
        "shift": [0.0, 0.0, 9.0],
    }
    painted = front.Conversation.in_colours(talk, "abc", inside)
    assert painted == f"{front.BLUE}a{front.PLAIN}{front.ORANGE}b{front.PLAIN}c"
    # a reward that comes at the end alone says nothing of tokens: the shift does
    inside = {
        "tokens": ["a", "b", "c"],
        "token_rewards": [0.0, 0.0, 1.0],
        "shift": [-1.0, 0.0, 1.0],
    }
    painted = front.Conversation.in_colours(talk, "abc", inside)
    assert painted == f"{front.ORANGE}a{front.PLAIN}b{front.BLUE}c{front.PLAIN}"
    steps = {"tokens": list("abcd"), "step_ends": [2, 4], "orm": [0.1, 0.9], "sorm": [0.9, 0.1]}
    painted = front.Conversation.in_colours(talk, "abcd", steps)
    assert painted.count(front.BLUE) == painted.count(front.ORANGE) == 2


def test_a_method_with_numbers_of_its_own_cannot_hide_its_lines(cache, tmp_path, monkeypatch):
    """Whatever a loop and `explain` name their numbers, a line says which job it belongs to."""
    usual = nr.METHODS["ppo"]

    def loop(state, task, c):
        for metrics in usual.loop(state, task, c):
            yield metrics | {"loop": "other", "step": 77, "kl": "high", "reward": None, "my": 1.5}

    def explain(state, task, b, c):
        found = usual.explain(state, task, b, c)
        return [inside | {"response": "mine", "loop": "other"} for inside in found]

    monkeypatch.setitem(nr.METHODS, "ppo", replace(usual, loop=loop, explain=explain))
    argv = ["ppo", "--config", "smoke", "--out", str(tmp_path / "x"), "--cache", str(cache)]
    assert front.main(argv) == 0
    logged = lines(tmp_path / "x", "metrics.jsonl")
    assert [(m["loop"], m["step"]) for m in logged] == [("ppo", u) for u in (1, 2, 3, 4)]
    assert all(m["kl"] == "high" and m["reward"] is None and m["my"] == 1.5 for m in logged)
    shown = lines(tmp_path / "x", "samples.jsonl")
    assert shown and {x["loop"] for x in shown} == {"ppo"}
    assert "mine" not in {x["response"] for x in shown}


def test_a_gradient_of_zero_is_said():
    assert "gradient" in front.notes({"grad_norm": 0.0}, tiny("ppo"))
    assert "gradient" not in front.notes({"grad_norm": 1e-9}, tiny("ppo"))


def test_what_to_watch_is_what_the_methods_have_and_fits_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    said = front.what_to_watch(["refine"])
    assert "orm, sorm" in said and "clipfrac" not in said
    assert max(len(line) for line in said.splitlines()) <= 50
    for name in nr.METHODS:
        assert front.what_to_watch([name]).count("\n") >= 2


# ---- a run talks while it works ------------------------------------------------------------------


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(workers, "FIRST_WORD", 0.02)
    monkeypatch.setattr(workers, "NEXT_WORD", 0.02)


def test_what_takes_long_is_said_and_what_does_not_is_not(hasty, capsys):
    with workers.saying(lambda seconds: "quick"):
        pass
    assert capsys.readouterr().out == ""
    with workers.saying(lambda seconds: f"at work {seconds:.2f}" if seconds < 9 else ""):
        time.sleep(0.2)
    said = capsys.readouterr().out
    assert said.count("at work") >= 2
    time.sleep(0.1)
    assert capsys.readouterr().out == ""  # it is over
    with workers.saying(lambda seconds: "late", first=5.0):
        time.sleep(0.1)
    assert capsys.readouterr().out == ""


def test_an_error_ends_the_talk(hasty, capsys):
    with pytest.raises(ValueError, match="x"), workers.saying(lambda seconds: "at work"):
        raise ValueError("x")
    capsys.readouterr()
    time.sleep(0.1)
    assert capsys.readouterr().out == ""


def test_refine_says_what_it_draws_before_its_first_update(hasty, tmp_path, cache, capsys):
    argv = ["refine", "--config", "smoke", "--out", str(tmp_path / "x"), "--cache", str(cache)]
    assert front.main([*argv, "--prompts", "60"]) == 0
    said = capsys.readouterr().out
    assert "refine/0: draws 60 drafts, and from each step of the wrong ones 2 more; " in said


def test_the_next_training_knows_how_long_the_last_one_took(tmp_path):
    times = {"key": 21.4, "key, first update": 9.6, "short": 0.3}
    (tmp_path / front.TIMES).write_text(json.dumps(times))
    progress = front.Progress("refine/0", 4, 0, tmp_path, "key", "draws 60 drafts")
    assert progress.begins() == " (last time it took 21 s)"
    assert progress.text(3) == "refine/0: draws 60 drafts; 3 s so far (last time it took 10 s)"
    assert front.Progress("refine/0", 4, 0, tmp_path, "short").begins() == ""
    resumed = front.Progress("refine/0", 4, 2, tmp_path, "key", "draws 60 drafts")
    assert resumed.text(3) == "refine/0: goes on behind update 2; 3 s so far"


def test_a_pipe_hears_how_far_a_training_is(tmp_path, monkeypatch, capsys):
    progress = front.Progress("ppo/0", 40, 0, tmp_path, "ppo")
    assert progress.text(3.0) == "ppo/0: the first of 40 updates; 3 s so far"
    progress.advance(4)
    assert progress.text(3.0) == "ppo/0: 4 of 40 updates after 3 s"
    progress.advance(10)
    assert progress.text(20.0) == "ppo/0: 10 of 40 updates after 20 s, about 60 s to go"
    monkeypatch.setattr(workers.console, "shows_bars", lambda: True, raising=False)
    assert progress.text(20.0) == ""  # a bar says it


def test_times_are_those_of_whole_trainings_and_survive_damage(tmp_path):
    def whole(begun_at):
        progress = front.Progress("t", 3, begun_at, tmp_path, "key")
        for update in range(begun_at + 1, 4):
            progress.advance(update)

    whole(1)
    assert not (tmp_path / front.TIMES).exists()  # a resumed part says nothing about all of it
    whole(0)
    assert set(json.loads((tmp_path / front.TIMES).read_text())) == {"key", "key, first update"}
    assert front.Progress("t", 3, 0, tmp_path, "another").read().keys() >= {"key"}
    for damage in ("", "[]", "{", '{"key": "soon"}', "null", '{"key": null}'):
        (tmp_path / front.TIMES).write_text(damage)
        assert front.Progress("t", 3, 0, tmp_path, "key").begins() == ""
    whole(0)
    assert json.loads((tmp_path / front.TIMES).read_text()).keys() >= {"key"}
    (tmp_path / front.TIMES).unlink()
    (tmp_path / front.TIMES).mkdir()
    whole(0)  # it cannot be written, and nobody minds


def test_a_first_word_comes_within_two_seconds():
    assert workers.FIRST_WORD < 2


def test_two_threads_of_a_worker_do_not_mix_what_they_send():
    """`saying` speaks while the job prints: each message arrives whole."""
    import multiprocessing
    import threading

    ours, theirs = multiprocessing.Pipe()
    wire = workers.Wire(theirs, False)
    sizes = [random.Random(0).randrange(1, 70_000) for _ in range(40)]

    def send(letter):
        for size in sizes:
            wire.send("line", letter * size, False)

    heard = {"a": [], "b": []}

    def hear():
        for _ in range(2 * len(sizes)):
            _, text, _ = ours.recv()
            assert len(set(text)) == 1
            heard[text[0]].append(len(text))

    # Where messages are mixed the other end may wait for ever, or read what is none.
    threads = [threading.Thread(target=send, args=(letter,), daemon=True) for letter in "ab"]
    threads.append(threading.Thread(target=hear, daemon=True))
    for thread in threads:
        thread.start()
    threads[-1].join(timeout=30)
    assert heard == {"a": sizes, "b": sizes}


# ---- the page ------------------------------------------------------------------------------------


def test_a_run_ends_with_a_page_and_report_makes_it_again(tour, capsys):
    page = tour / "report.html"
    first = page.read_text()
    assert first.startswith("<!doctype html>") or first.startswith("<!DOCTYPE html>")
    page.unlink()
    assert front.main(["report", str(tour)]) == 0
    assert page.read_text() == first and f"page: {page}" in capsys.readouterr().out


def test_several_runs_stand_on_one_page(tour, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert front.main(["report", str(tour), str(tour)]) == 0
    assert (tmp_path / "compare.html").stat().st_size > (tour / "report.html").stat().st_size / 2
    assert front.main(["report", str(tour), "--html", "own.html"]) == 0
    assert (tmp_path / "own.html").exists()


@pytest.mark.parametrize(
    "argv", [[], ["nothing"], ["TOUR", "--html", "x.png"], ["TOUR", "--what"], ["TOUR", "nothing"]]
)
def test_a_page_that_cannot_be_is_one_line(tour, argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert front.main(["report", *(str(tour) if a == "TOUR" else a for a in argv)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_a_page_that_fails_costs_no_result_and_no_verdict(tour, tmp_path, monkeypatch, capsys):
    from notebooks import report

    copy = shutil.copytree(tour, tmp_path / "x")
    (copy / "report.html").unlink()

    def breaks(*given):
        raise KeyError("what")

    monkeypatch.setattr(report, "page", breaks)
    assert front.main(["--resume", str(copy)]) == 0
    said = capsys.readouterr()
    assert "no page: KeyError('what')" in said.out and said.err == ""
    assert not (copy / "report.html").exists()


def test_an_explanation_that_fails_costs_no_result(cache, tmp_path, monkeypatch, capsys):
    usual = nr.METHODS["ppo"].explain

    def fails_at_the_end(state, task, b, c):
        if state.update == c.updates and len(b.mask) > 6:
            raise MemoryError("too many rows")
        return usual(state, task, b, c)

    broken = replace(nr.METHODS["ppo"], explain=fails_at_the_end)
    monkeypatch.setitem(nr.METHODS, "ppo", broken)
    argv = ["ppo", "--config", "smoke", "--out", str(tmp_path / "x"), "--cache", str(cache)]
    assert front.main(argv) == 0
    assert "ppo/0: its answers are not explained: MemoryError" in capsys.readouterr().out
    found = lines(tmp_path / "x", "answers.jsonl")
    assert len(found) > 20 and not any("tokens" in x["before"] for x in found)


def test_rollouts_that_are_fewer_than_processes_are_read_by_some(monkeypatch):
    """Under torchrun a process may have none of the few that are explained."""
    c = tiny("ppo")
    state = nr.start_ppo(rough(c), c)
    b = front.as_rollout(TASK, ["3+4="], ["3+4=7;#3<eos>"], c)
    whole = nr.annotate(state, b, c)
    monkeypatch.setattr(nr, "own_rows", lambda rows: rows[len(rows) :])
    none = nr.annotate(state, b, c)
    assert whole.logp.any() and not none.logp.any() and none.logp.shape == whole.logp.shape


def test_a_response_without_a_token_is_explained(cache):
    c = tiny("ppo")
    state = nr.start_ppo(rough(c), c)
    [inside] = front.explained(state, nr.METHODS["ppo"], TASK, ["3+4="], [""], c)
    assert inside == {
        "tokens": [],
        "token_rewards": [],
        "shift": [],
        "value": [],
        "steps_right": [],
    }
    assert front.explained(state, nr.METHODS["ppo"], TASK, [], [], c) == []


def test_tokens_are_those_that_were_written_and_not_those_of_the_text():
    """A text, encoded again, may give other ids; its numbers belong to the ids that were."""
    inside = front.of_tokens(TASK, [9, 9, 9, 9], {"ids": [7, 8], "logp": [-1.0, -2.0]})
    assert len(inside["tokens"]) == len(inside["logp"]) == 2 and "ids" not in inside


def test_a_frozen_judge_judges_in_a_conversation_too(cache, tmp_path, monkeypatch, capsys):
    argv = ["self_rewarding", "--config", "smoke", "--judge", "frozen", "--cache", str(cache)]
    assert front.main([*argv, "--out", str(tmp_path / "x")]) == 0
    trained = front.open_trained(tmp_path / "x", "", None, 0.0)
    front.Conversation(tmp_path / "x", cache, trained)
    judge = trained.state.judge.state_dict()
    m1 = nr.m1(
        nr.gpt_base(trained.task, trained.c, front.CachedTrainer(cache)),
        trained.task,
        trained.c,
        front.CachedTrainer(cache),
    ).state_dict()
    assert all(torch.equal(judge[name], m1[name]) for name in m1)
    policy = trained.state.policy.state_dict()
    assert not all(torch.equal(policy[name], m1[name]) for name in m1)


def test_a_method_whose_first_words_name_no_number_is_refused(monkeypatch, capsys):
    wrong = replace(nr.METHODS["refine"], first="draws {promts} drafts")
    monkeypatch.setitem(nr.METHODS, "refine", wrong)
    assert front.main(["ppo", "--config", "smoke"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "METHODS['refine']" in error and "promts" in error


def test_a_line_that_is_no_text_is_an_error_and_no_end(monkeypatch, capsys, tour, cache):
    typed = io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n3+4=\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", typed)
    assert front.main(["sample", str(tour), "--cache", str(cache)]) == 0
    said = capsys.readouterr().out
    assert "error: this line is no text" in said
