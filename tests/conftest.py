"""Shared small models and tasks. One thread: the suite shares its cores, and bytes must repeat."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import nanoreward as nr  # noqa: E402
import train_small as front  # noqa: E402

# The names that each method can choose from: its arms, rewards and judges. Files of notebooks/ add
# theirs to the same tables when a test imports them, so this is what nanoreward.py alone has.
CHOICES = {}
for name, method in nr.METHODS.items():
    CHOICES[name] = {number: tuple(values) for number, values in method.choices.items()}


def needed_by(method, number):
    """What a choice needs so that it is read: a prover, for example, the arm that asks it."""
    other, *values = nr.METHODS[method].only_with.get(number, "").split() or [None]
    return {other: values[0]} if other else {}


torch.set_num_threads(1)
settings.register_profile(
    "busy", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)  # cores may be shared
settings.load_profile("busy")


def tiny(method, **numbers):
    """The smoke config of a method, with these numbers changed."""
    return nr.replace(front.make_config(method, "smoke"), **numbers)


TINY = tiny("ppo")


@pytest.fixture
def config():
    return TINY


@pytest.fixture
def model():
    """A small GPT with weights large enough that every token matters."""
    return rough(TINY)


def rough(config, seed=0):
    """A Transformer whose weights are all random: nothing is zero, so nothing can hide."""
    model = nr.Transformer(config, nr.rng(seed, "init"))
    generator = nr.rng(seed, "rough")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


def write_word_folder(path, lines, special, size, **ids):
    """The folder of a tiny Llama that reads words: a byte-level vocabulary learned from lines.

    special: its special tokens. ids: pad_id, bos_id and eos_id; PAD may lie behind the vocabulary.
    """
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(
        lines,
        trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet),
    )
    vocab = words.get_vocab_size()
    shape = nr.Architecture(
        vocab=vocab, mask_id=vocab, width=32, layers=1, heads=2, kv_heads=1, mlp_width=48, **ids
    )
    nr.Transformer(shape, nr.rng(0, "word folder")).save(path)
    words.save(str(path / "tokenizer.json"))


def check_transcripts(out):
    """Every number of a run's transcripts stands at its own token."""
    checked = 0

    def check(inside):
        nonlocal checked
        for name in ("token_rewards", "shift", "value", "logp"):
            if name in inside:
                checked += 1
                assert len(inside[name]) == len(inside["tokens"]), name
        if "order" in inside:
            passes = 1 + max(inside["order"][: len(inside["tokens"])])
            assert len(inside["said"]) == len(inside["prospects"]) == passes

    for name in ("samples.jsonl", "pairs.jsonl", "answers.jsonl"):
        if name == "pairs.jsonl" and not (out / name).exists():
            continue  # random weights rarely give a better and a worse response
        for line in (out / name).read_text().splitlines():
            parts = json.loads(line)
            for part in (parts, *(x for x in parts.values() if isinstance(x, dict))):
                check(part)
    assert checked > 20
    assert 10_000 < (out / "report.html").stat().st_size < 2_000_000


def check_conversation(out, cache, monkeypatch, capsys):
    """What is typed in a conversation is a question, and it is asked as in the run."""
    trained = front.open_trained(out, "ppo", None, 0.0)
    prompt = trained.task.prompts(1, nr.rng(0, "typed"), "dev")[0]
    question = trained.task.question(prompt)
    assert question != prompt == trained.task.prompt(question)
    monkeypatch.setattr(sys, "stdin", io.StringIO(question + "\n:help\nWhat?\n"))
    capsys.readouterr()
    argv = ["sample", str(out), "--loop", "ppo", "--cache", str(cache)]
    assert front.main(argv) == 0
    said = capsys.readouterr().out
    first = trained.answer(prompt).replace("<eos>", "").split("\n")[0]
    assert f"{'ppo':15} {first}" in said and said.count("error: ") == 1
    assert trained.task.grade(prompt, trained.task.solution(prompt)) == 1


def golden(library):
    """Records of tests/golden/<library>.json by name; inputs as float64 tensors."""
    records = json.loads((ROOT / "tests" / "golden" / f"{library}.json").read_text())
    return {r["name"]: r for r in records}


def tensors(record, *names):
    """Inputs of a record as float64 tensors, in the order of names."""
    return [torch.tensor(record["inputs"][n], dtype=torch.float64) for n in names]


def random_batch(config, B=6, P=5, R=7, seed=0):
    """prompt (B, P) with PAD in front, response (B, R) ended by EOS, then PAD."""
    g = nr.rng(seed, "batch")
    prompt = torch.randint(6, config.vocab, (B, P), generator=g)
    response = torch.randint(6, config.vocab, (B, R), generator=g)
    for i in range(B):
        prompt[i, : i % P] = config.pad_id
        response[i, i % R] = config.eos_id
        response[i, i % R + 1 :] = config.pad_id
    return prompt, response
