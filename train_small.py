"""The front door: trains base models, drives the methods that you name, prints a table.

    python train_small.py                               the tour: every method
    python train_small.py ppo --arm grpo --seeds 5      one method, five seeds, mean and interval
    python train_small.py --resume runs/x
    python train_small.py sample runs/x                 type problems; see before and after
    python train_small.py report runs/x                 one page: runs/x/report.html
    python train_small.py plot runs/x runs/y            two runs on one picture

Every number of a method's config is a flag. A flag that none of the named methods reads is a
mistake. In [brackets] stands the number of --config laptop; PRESETS in this file holds the others.
Several methods or seeds are computed side by side, in as many processes as there are cores.
Exit: 0 done, 1 missed --target, 2 a mistake (one line says which), 130 Ctrl-C (saved).
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import errno
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from dataclasses import Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import mean, stdev
from typing import IO, Any, NoReturn

# What torch cannot do on one of Apple's GPUs it then does on the CPU. It reads this when imported.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

import torch
import torch.distributed as dist
from tqdm import tqdm

import nanoreward as nr
import workers
from data import arithmetic, countdown, gsm8k, sudoku, sums
from nanoreward import METHODS, Config, Transformer, UserError

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

TASKS = {
    "arithmetic": arithmetic,
    "countdown": countdown,
    "sudoku": sudoku,
    "gsm8k": gsm8k,
    "sums": sums,
}
# Those of this project: whose numbers are known.
OWN_TASKS = tuple(TASKS)
# Without a home folder this stays "~/.cache/nanoreward", and `claim_cache` asks for --cache.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "nanoreward"

# ---- presets: what --config changes of the defaults, for all methods and for single ones ---------

# The one that is taken if --config does not name another.
PRESET = "laptop"
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "laptop": {},
    # Everything in seconds: the tests run it.
    "smoke": {
        "all": {
            "threads": 1,
            "eval_every": 2,
            "eval_problems": 50,
            "max_ops": 1,
            "answers": 4,
            "response": 12,
            "width": 32,
            "layers": 1,
            "heads": 1,
            "kv_heads": 1,
            "head_dim": 32,
            "mlp_width": 64,
            "demos": 1000,
            "base_updates": 150,
            "base_batch": 32,
            "prompts": 8,
            "samples": 4,
            "updates": 4,
            "minibatch": 16,
            "reward_data": 200,
            "reward_updates": 5,
            "continuations": 2,
        },
        "ppo": {"epochs": 2},
        "seq2seq": {"epochs": 2},
        "iterative_dpo": {"rounds": 3, "updates": 2},
        "self_rewarding": {
            "updates": 2,
            "judgements": 3,
            "start_data": 200,
            "start_updates": 20,
        },
        "refine": {"prompts": 40, "start_data": 16},
        "denoise": {"start_updates": 40},
    },
    # 4x4 Sudoku for the diffusion LM. With t_min 0.05 it solves 83 % where 0.4 has 97 to 99.
    "sudoku": {
        "all": {"task": "sudoku", "response": 17},
        "denoise": {
            "block": 17,
            "block_passes": 17,
            "t_min": 0.4,
            "look_ahead": 0.0,
            "start_lr": 0.01,
            "start_muon_lr": 0.02,
        },
    },
    # Countdown with three numbers; one pass of three writes two tokens. A GPT without bad habits
    # solves 73 %: the right way has to be found. The diffusion LM begins at 12 %, and with two
    # tokens in each pass at 4 to 10 % greedy and 2 to 5 % sampled, too few for groups of eight.
    # Most of its tokens have rivals, so that many canvases are read: one epoch takes half the time.
    "countdown": {
        "all": {
            "task": "countdown",
            "min_ops": 2,
            "max_ops": 2,
            "response": 48,
            "base_updates": 800,
        },
        "denoise": {"block_passes": 3, "start_updates": 1200, "epochs": 1, "minibatch": 64},
    },
    # About 100 million parameters from random weights, on longer problems.
    "gpu": {
        "all": {
            "max_ops": 6,
            "response": 52,
            "width": 768,
            "layers": 12,
            "heads": 12,
            "kv_heads": 12,
            "head_dim": 64,
            "mlp_width": 2048,
            "bf16": True,
            "demos": 200_000,
            "base_updates": 2000,
            "base_lr": 1e-3,
            "micro": 512,
            "eval_problems": 1000,
        },
        "ppo": {"prompts": 128, "samples": 16, "minibatch": 1024, "lr": 5e-5, "updates": 100},
        "seq2seq": {"prompts": 128, "samples": 16, "minibatch": 1024, "lr": 5e-5, "updates": 100},
        "iterative_dpo": {"samples": 16},
        "self_rewarding": {"start_lr": 1e-3},
        "refine": {"samples": 16, "lr": 1e-3},
        # A response brings along a canvas for each of its tokens.
        "denoise": {"samples": 16, "minibatch": 1024, "micro": 16, "lr": 5e-5},
    },
    # A model folder on GSM8K, with the papers' rates. 512 rows of SmolLM2-135M have 11 GB of keys
    # and values.
    "hf": {
        "all": {
            "task": "gsm8k",
            "response": 384,
            "bf16": True,
            "prompts": 32,
            "micro": 8,
            "minibatch": 64,
            "lr": 2e-6,
            "base_lr": 1e-5,
            "muon_lr": 0.0,
            "base_batch": 64,
            "eval_problems": 200,
        },
        "iterative_dpo": {"prompts": 64, "lr": 1e-6, "alpha": 1.0},
        "self_rewarding": {
            "prompts": 64,
            "updates": 60,
            "judgements": 3,
            "lr": 1e-6,
            "alpha": 1.0,
            "start_lr": 1e-5,
            "start_muon_lr": 0.0,
        },
        # A log-prob of hundreds of tokens would drown the rest of a score, and its weight hardly
        # moves at these rates.
        "ppo": {"logp_weight": 0.0},
        "refine": {
            "prompts": 512,
            "minibatch": 128,
            "lr": 1e-5,
            "start_lr": 1e-6,
            "logp_weight": 0.0,
        },
        "denoise": {"start_lr": 1e-4, "start_muon_lr": 0.0, "micro": 1},
    },
    # A model folder on sums in words, on a CPU. With two solved problems in front and its chat
    # template SmolLM2-135M-Instruct begins at 24 % (greedy, 200 problems of dev).
    # ppo --arm grpo ends at 54 % there; with 4 samples of each problem it was 45 (one seed).
    # iterative_dpo ends at 50 %, and with a quarter of the learning rate at 32 (one seed).
    "sums": {
        "all": {
            "task": "sums",
            "min_ops": 1,
            "max_ops": 1,
            "shots": 2,
            "response": 24,
            "prompts": 16,
            "samples": 8,
            "micro": 64,
            "minibatch": 128,
            "updates": 40,
            "lr": 2e-5,
            "base_lr": 1e-5,
            "muon_lr": 0.0,
            "base_batch": 16,
            "demos": 1000,
            "eval_every": 10,
            "eval_problems": 200,
        },
        "iterative_dpo": {
            "rounds": 4,
            "updates": 10,
            "prompts": 64,
            "minibatch": 32,
            "alpha": 1.0,
        },
        "self_rewarding": {
            "rounds": 2,
            "updates": 20,
            "prompts": 64,
            "minibatch": 32,
            "judgements": 3,
            "alpha": 1.0,
            "start_data": 500,
            # At a tenth of this rate M1 does not learn to write a score.
            "start_updates": 60,
            "start_lr": 1e-4,
            "start_muon_lr": 0.0,
        },
        "ppo": {"logp_weight": 0.0},
        "refine": {
            "prompts": 512,
            "minibatch": 32,
            "micro": 16,
            "start_data": 64,
            "start_lr": 1e-5,
            "logp_weight": 0.0,
        },
        # It reads the whole prompt again in every pass, so nothing stands in front of the question.
        "denoise": {
            "shots": 0,
            "response": 12,
            "prompts": 8,
            "minibatch": 64,
            "micro": 4,
            "updates": 20,
            "start_updates": 200,
            "start_lr": 1e-4,
            "start_muon_lr": 0.0,
        },
    },
}


def make_config(name: str, preset: str = "laptop", **numbers: Any) -> Any:
    """The config of a method: its defaults, then the preset, then these numbers if it has them."""
    kind = METHODS[name].config
    known = {f.name for f in fields(kind)}
    chosen = PRESETS[preset].get("all", {}) | PRESETS[preset].get(name, {}) | numbers
    return kind(**{key: x for key, x in chosen.items() if key in known})


def make_task(c: Config, careful: bool = False) -> nr.Task:
    """The task that the config names; careful: with the demonstrator that makes no errors."""
    if not getattr(TASKS[c.task], "__file__", None):
        raise UserError(f"the task {c.task} must be a module, whose file decides what is cached")
    try:
        return TASKS[c.task].make(c, careful)
    except ValueError as error:
        raise UserError(f"the task {c.task} cannot be made: {error}") from None


# ---- flags --------------------------------------------------------------------------------------

# The numbers that a model folder or the tokens of a task decide are no flags.
NO_FLAG = set("vocab rope_theta rope_scaling norm_eps family tied causal".split())
NO_FLAG |= {"pad_id", "bos_id", "eos_id", "mask_id", "other_ends"}
# Numbers of one task alone.
TASK_ONLY = {key: "task arithmetic" for key in ("answers", "planted")}
TASK_ONLY |= {key: "task arithmetic countdown sums" for key in ("min_ops", "max_ops")}
TASK_ONLY |= {key: "task sums" for key in ("largest", "shots")}
TASK_ONLY |= {"data": "task gsm8k", "model": "task gsm8k sums"}
# Numbers that describe a base model of our own.
OF_OWN_BASE = set("width layers heads kv_heads head_dim mlp_width base_updates".split())
# Numbers of its training, which learned rewards and other starts of a loop read too.
OF_TRAINING = {"demos", "base_batch", "base_lr", "muon_lr"}


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line through the same door as every other mistake."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        raise UserError(f"{message} (python train_small.py --help lists what there is)")


def true_or_false(text: str) -> bool:
    """The value of a flag; argparse shows the name of this function if the text is neither."""
    words = {"true": True, "false": False}
    if text.lower() not in words:
        raise ValueError(text)
    return words[text.lower()]


FLAG_TYPES = {"int": int, "float": float, "str": str, "bool": true_or_false}


def type_name(f: Field) -> str:
    """The type of a field as a word of FLAG_TYPES: `float` for `float` and for `float | None`."""
    written = getattr(f.type, "__name__", str(f.type))
    name = written.removesuffix(" | None")
    if name not in FLAG_TYPES:
        raise UserError(
            f"the field {f.name!r} of a config has the type {written}, but a flag is one of "
            f"{', '.join(FLAG_TYPES)}, or one of them | None"
        )
    return name


def flag(name: str) -> str:
    """base_lr -> --base-lr."""
    return "--" + name.replace("_", "-")


def field_comments(kind: type) -> dict[str, str]:
    """The comment above each field of a config class: the help of its flag."""
    comments = {}
    comment: list[str] = []
    try:
        module = inspect.getsource(sys.modules[kind.__module__])
    except (KeyError, OSError, TypeError):  # a class that stands in no file, as in a notebook
        return {}
    source = re.search(rf"^class {kind.__name__}\b.*?(?=^\S|\Z)", module, re.M | re.S)
    for line in source[0].splitlines() if source else []:
        line = line.strip()
        if line.startswith("# ") and not line.startswith("# ----"):
            comment.append(line.removeprefix("# "))
            continue
        if found := re.match(r"(\w+): [\w |]+ = ", line):
            comments[found[1]] = " ".join(comment)
        comment = []
    return comments


def flag_groups() -> dict[str, list[Any]]:
    """The flags as they are shown: first what all methods share, then each method's own."""
    shared = [f for f in fields(Config) if f.name not in NO_FLAG]
    groups = {"all methods": shared}
    told = {f.name for f in shared}
    for name, method in METHODS.items():
        groups[name] = [f for f in fields(method.config) if f.name not in told | NO_FLAG]
        told |= {f.name for f in groups[name]}
    return groups


def defaults_of(name: str) -> str:
    """The default of a number, and the methods that have another one."""
    values = {}
    for method, entry in METHODS.items():
        for f in fields(entry.config):
            if f.name == name:
                values.setdefault(f.default, []).append(method)
    parts = [f"{value} for {' and '.join(methods)}" for value, methods in values.items()]
    return str(next(iter(values))) if len(parts) == 1 else ", ".join(parts)


def build_parser() -> Parser:
    """The flags of a training run."""
    parser = Parser(
        prog="train_small.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("loops", nargs="*", metavar="METHOD", help=f"any of {', '.join(METHODS)}; none: all")
    add("--config", help=f"one of {', '.join(PRESETS)} (default: {PRESET})")
    add("--out", type=Path, help="folder of the run (default: runs/METHOD-1, -2, ...)")
    add("--cache", type=Path, help=f"folder of the base models (default: {CACHE})")
    add("--seeds", type=int, help="repeat with seed, seed+1, ... (default: 1)")
    add("--target", action="append", default=[], metavar="METHOD=X", help="exit 1 if missed")
    add("--resume", type=Path, help="go on with the run in this folder")
    add("--workers", type=int, help="jobs side by side; the numbers stay the same (default: cores)")
    add("--ceiling", action="store_true", help="measure a base without bad habits too")
    comments: dict[str, str] = {}
    for method in METHODS.values():
        for kind in reversed(method.config.__mro__[:-1]):
            for name, comment in field_comments(kind).items():
                comments[name] = comments.get(name) or comment
    for title, flags in flag_groups().items():
        group = parser.add_argument_group(title)
        for f in flags:
            text = f"{comments.get(f.name, '')} [{defaults_of(f.name)}]".strip()
            group.add_argument(
                flag(f.name),
                dest="field_" + f.name,
                type=FLAG_TYPES[type_name(f)],
                metavar=type_name(f).upper(),
                help=text.replace("%", "%%"),
            )
    return parser


def given_numbers(a: argparse.Namespace) -> dict[str, Any]:
    """The numbers that the command line names."""
    named = {k.removeprefix("field_"): v for k, v in vars(a).items() if k.startswith("field_")}
    return {name: value for name, value in named.items() if value is not None}


def trains_first(name: str, c: Config) -> bool:
    """Whether a method trains a model before its loop even if its base is a folder."""
    method = METHODS[name]
    models = nr.REWARDS[c.reward].models if "reward" in vars(c) else method.reward_models
    return bool(method.starts_from) or models is not nr.no_models


def why_unread(name: str, given: str, c: Config) -> str:
    """Why this method does not read a number that was given; empty if it does."""
    if given not in {f.name for f in fields(c)}:
        readers = [k for k, m in METHODS.items() if given in {f.name for f in fields(m.config)}]
        return f"{name} does not read it, but {', '.join(readers)}"
    if c.model and given in OF_OWN_BASE:
        return "the folder of --model decides it"
    if c.model and given in OF_TRAINING and not trains_first(name, c):
        return f"{name} takes the folder of --model as it is"
    of_tasks = TASK_ONLY if c.task in OWN_TASKS else {}  # another task may read what it likes
    condition = (of_tasks | METHODS[name].only_with).get(given)
    if condition is None:
        return ""
    other, *values = condition.split()
    if str(vars(c)[other]) in values:
        return why_unread(name, other, c)  # a prover has numbers, and only one arm has a prover
    return f"it is read only with {flag(other)} {' or '.join(values)}"


def threads_of(jobs: int) -> int:
    """The threads of each job, where nobody says: one, but the usual number for a single job.

    Processes of torchrun may see unequal numbers of cores, and their runs have to be equal.
    """
    if jobs > 1:
        return 1
    cores = workers.physical_cores() if own_rank() < 0 else Config.threads
    return min(Config.threads, cores)


def changed_numbers(c: Config) -> dict[str, Any]:
    """The numbers of a run that differ from the method's own defaults."""
    unsaid = NO_FLAG | {"seed", "threads", "device"}
    numbers = [f for f in fields(c) if f.name not in unsaid]
    return {f.name: vars(c)[f.name] for f in numbers if vars(c)[f.name] != f.default}


def configs_of(
    loops: list[str], preset: str, given: dict[str, Any], seeds: int = 1
) -> dict[str, Config]:
    """The config of each method that is named; every given number must be read by one of them."""
    numbers = dict(given)
    if "threads" not in PRESETS[preset].get("all", {}):
        numbers.setdefault("threads", threads_of(len(loops) * seeds))
    configs = {name: make_config(name, preset, **numbers) for name in loops}
    for number in given:
        reasons = [why_unread(name, number, c) for name, c in configs.items()]
        if all(reasons):
            raise UserError(f"{flag(number)} would change nothing: {reasons[0]}")
    return configs


# ---- checks -------------------------------------------------------------------------------------

# Numbers that 0 makes no sense for; whole numbers have to be at least 1, but for the last ones.
ABOVE_ZERO = {"lr", "base_lr", "start_lr", "temperature", "clip", "t_min"}
MAY_BE_ZERO = {"seed", "shots", "lora"}
# A larger number is a slip of the finger.
LARGEST = {"int": 10_000_000, "float": 1_000_000}
LARGEST_OF = {"seed": 2**63 - 1, "threads": 256, "layers": 1000, "block_passes": 1000}
LARGEST_OF |= {"workers": 256, "lora": 1024}
# A smaller one is 0 in float32; divided by a smaller temperature, log-probs overflow.
SMALLEST = 1e-30
SMALLEST_OF = {"temperature": 0.01}


def check_type(f: Field, value: Any) -> None:
    """Refuse a value that is not of its field's type, as a config.json may hold it."""
    kinds = {"int": int, "float": int | float, "str": str, "bool": bool}
    kind = type_name(f)
    right = isinstance(value, kinds[kind]) and isinstance(value, bool) == (kind == "bool")
    if not right and not (value is None and "None" in str(f.type)):
        raise UserError(f"{flag(f.name)} must be of the type {kind}, not {value!r:.40}")


def check_number(name: str, value: Any) -> None:
    """Refuse a number that is none, has the wrong sign, or is larger than anybody can mean."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    given = str(value)[:40]
    if not -math.inf < value < math.inf:
        raise UserError(f"{flag(name)} must be a finite number, not {given}")
    positive = name in ABOVE_ZERO or (isinstance(value, int) and name not in MAY_BE_ZERO)
    if value < 0 or (value == 0 and positive):
        bound = "above 0" if positive else "0 or more"
        raise UserError(f"{flag(name)} must be {bound}, not {given}")
    smallest = SMALLEST_OF.get(name, SMALLEST)
    if 0 < value < smallest:
        raise UserError(f"{flag(name)} must be at least {smallest}, not {given}")
    largest = LARGEST_OF.get(name, LARGEST[type(value).__name__])
    if value > largest:
        raise UserError(f"{flag(name)} must be at most {largest:,}, not {given}")


def check(name: str, c: Any) -> None:
    """Refuse, before any work, what could only fail or mislead later."""
    method = METHODS[name]
    for f in fields(c):
        check_type(f, vars(c)[f.name])
        if f.name not in NO_FLAG:
            check_number(f.name, vars(c)[f.name])
    choices = {"task": TASKS, "planted": ("none", "round", "long", "refusal")} | method.choices
    for number, names in choices.items():
        if vars(c)[number] not in names:
            raise UserError(
                f"{flag(number)} must be one of {', '.join(names)} for {name}, "
                f"not {vars(c)[number]!r}"
            )
    rules = [
        *TASKS[c.task].rules(c),
        (bool(c.model) or c.lora == 0, "--lora adapts the model of a folder: --model FOLDER"),
        (c.heads % c.kv_heads == 0, "--heads must be a multiple of --kv-heads"),
        (c.head_dim % 2 == 0, "--head-dim must be even, as rotary pairs are"),
        (
            c.device.split(":")[0] in ("auto", "cpu", "cuda", "mps"),
            f"--device {c.device} is not here; there are auto, cpu, cuda and mps",
        ),
        (vars(c).get("lam", 0) <= 1, "--lam must lie in 0..1"),
        *c.rules(),
    ]
    for holds, message in rules:
        if not holds:
            raise UserError(message)


def check_methods() -> None:
    """Refuse an entry of METHODS that names a number that is not there, or a value of one."""
    for name, method in METHODS.items():
        known = {f.name for f in fields(method.config)}
        try:
            method.first.format(**vars(method.config()))
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise UserError(
                f"METHODS[{name!r}]: first is {method.first!r}, which cannot be filled in with the "
                f"numbers of {method.config.__name__} ({error!r})"
            ) from None
        named = list(method.choices)
        for number, condition in method.only_with.items():
            other, *values = condition.split() or [""]
            named += [number, other]
            choices = method.choices.get(other, values)
            if not values or any(value not in choices for value in values):
                raise UserError(
                    f"METHODS[{name!r}]: only_with says {condition!r} of {number!r}; write a "
                    "number and some of the values that it can have, as 'arm gae'"
                )
        for number in named:
            if number not in known:
                raise UserError(
                    f"METHODS[{name!r}]: choices or only_with name {number!r}, but "
                    f"{method.config.__name__} has no such field"
                )


def may_adapt(c: Config) -> bool:
    """Whether adapters would save memory here: a folder is trained whole and need not be."""
    allowed = all(holds for holds, _ in replace(c, lora=16).rules())
    return bool(c.model) and c.lora == 0 and allowed


def memory_needed(c: Config) -> dict[str, int]:
    """About how many bytes a run needs at least, by the flags that they depend on."""
    attention = 2 * c.width * (c.heads + c.kv_heads) * c.head_dim
    # A model that is tied has its embedding for an output layer.
    ends = (1 if c.tied else 2) * c.vocab * c.width
    parameters = ends + c.layers * (attention + 3 * c.width * c.mlp_width)
    # An adapter of a layer has rank * (inputs + outputs) numbers; q and o are of one size.
    sides = 7 * c.width + 2 * (c.heads + c.kv_heads) * c.head_dim + 3 * c.mlp_width
    adapters = c.lora * c.layers * sides
    trained = adapters if c.lora else parameters
    number = 2 if c.bf16 else 4
    rows = max(c.eval_problems, c.responses_at_once())
    keys_and_values = 2 * c.layers * c.kv_heads * c.head_dim * c.response * number
    # Beside them there are logits in float32 and their probabilities in float64.
    sampling = rows * (keys_and_values + 12 * c.vocab)
    tokens = min(c.micro, max(rows, c.base_batch)) * c.response
    activations = c.layers * (4 * c.width + 2 * c.mlp_width) * number
    examples = sum(vars(c).get(name, 0) for name in ("demos", "reward_data", "start_data"))
    return {
        # Weights; for what is trained, gradients, two moments and the weights of a reference.
        "--width --layers --heads --head-dim --mlp-width": 4
        * (parameters + adapters + 4 * trained),
        "--prompts --samples --continuations --judgements --eval-problems --response": sampling,
        # What the layers keep for the backward pass; logits, log-probs and their gradient.
        "--micro --response": tokens * (activations + 3 * 4 * c.vocab),
        # Each token is an int64 in a list and in a tensor.
        "--demos --reward-data --start-data": 2 * 8 * examples * c.response,
    }


def memory_of(device: str) -> float:
    """How many bytes of memory the device has; infinity where the system does not say."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory  # [gpu]
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return math.inf


def check_memory(name: str, c: Config) -> None:
    """Refuse sizes that the machine has no room for, before anything is spent."""
    needed = memory_needed(c)
    there = memory_of(c.device)
    if sum(needed.values()) > there:
        largest = max(needed, key=needed.__getitem__).split()
        flags = [flag(f.name) for f in fields(c) if flag(f.name) in largest]
        advice = f"lower {' or '.join(flags)}"
        if c.model and "--layers" in flags:
            advice = "take a smaller folder" + " or --lora 16" * may_adapt(c)
        raise UserError(
            f"{name} needs about {sum(needed.values()) / 1e9:,.1f} GB of memory and {c.device} has "
            f"{there / 1e9:,.1f}; {advice}"
        )


def check_task(name: str, c: Config, task: nr.Task) -> None:
    """Refuse a task that lacks what the method or its reward asks of it."""
    needs = f"encode decode prompts demo grade chance {METHODS[name].needs}"
    if "reward" in vars(c):
        needs += f" {nr.REWARDS[c.reward].needs}"
    for needed in needs.split():
        if needed not in dir(task):
            raise UserError(
                f"{name} needs a task with a method {needed!r}; {type(task).__name__} has none"
            )


def parse_targets(texts: list[str], loops: list[str]) -> dict[str, float]:
    """["ppo=0.8"] -> {"ppo": 0.8}."""
    targets = {}
    for text in texts:
        name, _, number = text.partition("=")
        is_share = number.replace(".", "", 1).isdecimal() and 0 <= float(number) <= 1
        if name not in loops or not is_share:
            raise UserError(
                f"--target {text}: write a loop of this run and a number in 0..1, as {loops[0]}=0.8"
            )
        targets[name] = float(number)
    return targets


# ---- files of a run -----------------------------------------------------------------------------

# The file of a folder that a process locks while it works there.
LOCK = "lock"
# Who waits for a lock looks so often, in seconds.
LOCK_PATIENCE = 0.2
# How the temporary files of `nanoreward.write_whole` end: with the number of their process.
LEFT_BEHIND = re.compile(r"\.\d+\.tmp$")


def not_a_run(path: Path, error: Exception) -> UserError:
    """What to say of a file that cannot be read."""
    return UserError(f"{path} cannot be read ({error}); is {path.parent} the folder of a run?")


def read_bytes(path: Path) -> bytes:
    """A file of a run's folder, or a UserError that names it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise not_a_run(path, error) from None


def checksum(about: dict[str, Any]) -> str:
    """The SHA-256 of all entries but "sha256" itself, whatever their order and the line breaks."""
    rest = {name: x for name, x in about.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote, or a UserError that names the file.

    A file without a checksum is one of an older version and is taken as it is.
    """
    try:
        about = json.loads(read_bytes(path).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise not_a_run(path, error) from None
    if not isinstance(about, dict):
        raise not_a_run(path, TypeError("it holds no JSON object"))
    if about.get("sha256", checksum(about)) != checksum(about):
        raise UserError(
            f"{path} was changed by hand or damaged since it was written: put it back as it was, "
            "or start a new run with another --out"
        )
    about.pop("sha256", None)
    return about


def write_json(path: Path, about: dict[str, Any]) -> None:
    """Write the object with a checksum."""
    write_text(path, json.dumps(about | {"sha256": checksum(about)}, indent=1))


def is_entry(line: Any, named: bool) -> bool:
    """Whether this is a line of a log; named: it says which job it belongs to."""
    if not isinstance(line, dict):
        return False
    kinds = {"step": int} | ({"loop": str, "seed": int} if named else {})
    right = all(isinstance(line.get(name), kind) for name, kind in kinds.items())
    numbers = (line.get(name, 0) for name in ("seconds", "samples", "dev_greedy"))
    return right and all(isinstance(x, int | float) for x in numbers)


def read_lines(path: Path, named: bool = True) -> list[dict[str, Any]]:
    """The lines of a .jsonl. A torn last one is left out, a broken one is a UserError.

    Every line ends with \\n. What stands behind the last one was torn, wherever that was: in the
    middle of a UTF-8 character too.
    """
    lines = []
    texts = read_bytes(path).split(b"\n")
    for i, text in enumerate(texts, 1):
        try:
            line = json.loads(text.decode("utf-8"))
        except (ValueError, RecursionError):
            line = None
        if is_entry(line, named):
            lines.append(line)
        elif text.strip() and i < len(texts):
            raise UserError(
                f"{path}, line {i}: {text[:40]!r} is no line of a log, it was changed by hand or "
                "damaged: mend or remove it, or start a new run with another --out"
            )
    return lines


def lines_there(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; none if there is no such file."""
    return read_lines(path) if path.exists() else []


def write_text(path: Path, text: str) -> None:
    """Write the whole file or none of it."""
    nr.write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def as_line(x: dict[str, Any]) -> str:
    """A line of a .jsonl. What is not a finite number becomes null, which any language reads."""

    def cleaned(x: Any) -> Any:
        if isinstance(x, dict):
            return {name: cleaned(value) for name, value in x.items()}
        if isinstance(x, list | tuple):
            return [cleaned(value) for value in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return json.dumps(cleaned(x)) + "\n"


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Write a whole .jsonl."""
    write_text(path, "".join(as_line(line) for line in lines))


def append(path: Path, line: dict[str, Any]) -> None:
    """Add one JSON line."""
    try:
        with Path(path if nr.is_first() else os.devnull).open("a", encoding="utf-8") as f:
            f.write(as_line(line))
    except OSError as error:
        raise UserError(f"{path} cannot be written (is the disk full?): {error}") from None


def take_lock(folder: Path) -> IO | None:
    """A lock on this folder until the file is closed or the process ends; None if it is taken.

    Who has it removes what killed processes left half-written. Under torchrun that is the first.
    """
    path = Path(folder / LOCK if nr.is_first() else os.devnull)
    file = path.open("a", encoding="utf-8")  # noqa: SIM115
    if not nr.is_first():
        return file
    try:
        if os.name == "nt":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Some network disks have no locks. There nobody is refused, and nothing is removed.
        if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            return file
        file.close()
        return None
    remove_left_behind(folder)
    return file


def remove_left_behind(folder: Path) -> None:
    """Remove the files that killed processes left half-written in this folder.

    Of several processes only the one that writes does so: another one, a moment later, would remove
    what the first one is writing.
    """
    half_written = folder.glob("*.tmp") if nr.is_first() else ()
    for left in half_written:
        if LEFT_BEHIND.search(left.name):
            left.unlink(missing_ok=True)


def wait_for_lock(folder: Path, told: str) -> IO:
    """Wait until nobody else works in this folder: the lock. told: what is said if it is taken.

    Ctrl-C ends the waiting. The processes of torchrun wait together.
    """
    with workers.console.listening() as stop_asked:
        for attempt in itertools.count():
            lock = take_lock(folder)
            if nr.over_ranks(torch.tensor(int(lock is None))) == 0:
                return lock
            if lock is not None:
                lock.close()
            if attempt == 0:
                print(told, flush=True)
            if nr.over_ranks(torch.tensor(int(stop_asked()))) > 0:
                raise KeyboardInterrupt
            time.sleep(LOCK_PATIENCE)


@functools.cache
def digest_of(path: Path, size: int, changed: int) -> str:
    """The SHA-256 of a file of this size that was last changed then: each is read once."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while part := f.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def inputs_of(c: Config) -> dict[str, str]:
    """The SHA-256 of each file that the run's numbers come from: the model folder and the rows."""
    paths = []
    if c.model:
        kinds = (".safetensors", ".json", ".jinja")
        paths += [path for path in Path(c.model).iterdir() if path.suffix in kinds]
    if c.task in TASK_ONLY["data"].split():
        paths += [Path(c.data) / name for name in ("train.jsonl", "test.jsonl")]
    found = {}
    for path in sorted(paths):
        about = path.stat()
        found[str(path)] = digest_of(path, about.st_size, about.st_mtime_ns)
    return found


# ---- the run: a folder that says all ------------------------------------------------------------


@dataclass
class Run:
    """One --out folder: config.json, summary.json, the logs, models/, picture and page.

    jobs/ holds a folder for each job that is not done, with its state and its own part of the logs.
    """

    out: Path
    configs: dict[str, Config]
    preset: str
    seeds: int
    targets: dict[str, float]
    # Of each file that the numbers come from its SHA-256; a run of an older version has none.
    inputs: dict[str, str]
    # Whether the base without bad habits is measured as well.
    ceiling: bool = False
    # How the run was begun, and the commit of the code; empty where nobody knows.
    command: str = ""
    commit: str = ""
    cache: Path = CACHE
    # How many processes share the jobs. It changes no number.
    workers: int = 1
    # It keeps other processes out of the folder while it is open.
    lock: IO | None = None
    # Finished jobs, as in summary.json, in the order of `jobs`.
    done: list[dict] = field(default_factory=list)

    def about(self) -> dict[str, Any]:
        """config.json: all that decides the run's numbers, and how it was begun."""
        return {
            "configs": {name: asdict(c) for name, c in self.configs.items()},
            "preset": self.preset,
            "seeds": self.seeds,
            "targets": self.targets,
            "inputs": self.inputs,
            "ceiling": self.ceiling,
            "command": self.command,
            "commit": self.commit,
            "cache": str(self.cache.absolute()),
        }

    @property
    def shared(self) -> Config:
        """A config that stands for all, where only shared numbers are read."""
        return next(iter(self.configs.values()))

    @property
    def jobs(self) -> list[tuple[str, int]]:
        """All (method, seed) in their order."""
        seeds = [self.shared.seed + i for i in range(self.seeds)]
        return [(name, seed) for seed in seeds for name in self.configs]

    @property
    def open_jobs(self) -> list[tuple[str, int]]:
        """The jobs that are not done, in their order."""
        done = {(result["loop"], result["seed"]) for result in self.done}
        return [job for job in self.jobs if job not in done]

    @property
    def finished(self) -> bool:
        """Whether all jobs are done."""
        return not self.open_jobs


def checked_configs(a: argparse.Namespace, loops: list[str]) -> dict[str, Config]:
    """What the command line asks for, refused if it cannot work."""
    for name in loops:
        if name not in METHODS:
            known = ", ".join(METHODS)
            raise UserError(
                f"no loop is called {name!r}; there are {known}, and {', '.join(COMMANDS)}"
            )
    if a.config not in PRESETS:
        raise UserError(f"no config is called {a.config!r}; there are {', '.join(PRESETS)}")
    if not 1 <= a.seeds <= len(T95) + 1:
        raise UserError(f"--seeds must lie in 1..{len(T95) + 1}")
    configs = configs_of(loops, a.config, given_numbers(a), a.seeds)
    theirs = {}
    shared = next(iter(configs.values()))
    if shared.model and a.ceiling:
        raise UserError("--ceiling would change nothing: the folder of --model decides the base")
    if shared.model:  # whatever is wrong with the folder is said now
        theirs = asdict(Transformer.load(shared.model).config) | {"bf16": shared.bf16}
    for name, c in configs.items():
        c = replace(c, **theirs)
        check(name, c)
        configs[name] = replace(c, device=nr.pick_device(c.device))
        check_memory(name, configs[name])
    # Folder and task are the same for all methods, so they are read once.
    task = make_task(next(iter(configs.values())))
    for name, c in configs.items():
        check_task(name, c, task)
    return configs


def make_folder(folder: Path) -> None:
    """Make the folder if it is not there, and see whether we may write in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"cannot write to {folder} ({error.strerror}); choose another folder"
        ) from None


def claim_cache(cache: Path) -> None:
    """Make the folder of the base models."""
    if cache.parts[:1] == ("~",):
        raise UserError("there is no home folder to keep base models in: give --cache FOLDER")
    make_folder(cache)


def claim_run(out: Path) -> IO:
    """Make the folder of a run and lock it: the lock. A folder that is not ours is left alone."""
    make_folder(out)
    names = {path.name for path in out.iterdir() if not LEFT_BEHIND.search(path.name)}
    if names - {LOCK} and "config.json" not in names:
        raise UserError(f"{out} is not empty and not a run's folder; choose another --out")
    lock = take_lock(out)
    if lock is None:
        raise UserError(f"another process is at work in {out}; wait for it or choose another --out")
    return lock


def new_run(a: argparse.Namespace) -> Run:
    """Check everything, then claim the folder."""
    loops = list(dict.fromkeys(a.loops or METHODS))
    configs = checked_configs(a, loops)
    targets = parse_targets(a.target, loops)
    inputs = inputs_of(next(iter(configs.values())))
    a.cache = a.cache or CACHE
    claim_cache(a.cache)
    # This comes last: large files have been read, and another run may have begun meanwhile.
    out = a.out or free_folder("-".join(a.loops) or "tour")
    run = Run(out, configs, a.config, a.seeds, targets, inputs, a.ceiling, cache=a.cache)
    run.command = a.command
    run.commit = commit_of(Path(__file__).parent)
    run.lock = claim_run(out)
    if (out / "config.json").exists():
        there = open_run(out)
        asked = (configs, a.config, a.seeds, a.ceiling)
        if (there.configs, there.preset, there.seeds, there.ceiling) != asked:
            raise UserError(f"{out} holds a run with another config; choose another --out")
        if not there.finished:
            check_inputs(there)
        return replace(there, targets=targets, cache=a.cache, lock=run.lock)
    write_json(out / "config.json", run.about())
    return run


def commit_of(folder: Path) -> str:
    """The commit of a checkout, with a + if files differ from it; empty where there is none."""
    there = {name: x for name, x in os.environ.items() if not name.startswith("GIT_")}

    def ask(*words: str) -> str:
        """What git says, or a UserError."""
        command = ["git", "-C", str(folder), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=5, env=there)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UserError(str(error)) from None
        if done.returncode != 0:
            raise UserError(done.stderr)
        return done.stdout.strip()

    try:
        # If git does not know this file, it is the checkout of another project.
        ask("ls-files", "--error-unmatch", "train_small.py")
        return ask("describe", "--always", "--dirty=+", "--exclude=*")
    except UserError:
        return ""


def old_run(a: argparse.Namespace) -> Run:
    """The run of --resume: see that it is one, then claim its folder."""
    read_json(a.resume / "config.json")
    lock = claim_run(a.resume)
    run = replace(open_run(a.resume), lock=lock)
    run.cache = a.cache or run.cache
    if not run.finished:
        check_inputs(run)
        claim_cache(run.cache)
    return run


def check_inputs(run: Run) -> None:
    """Refuse to go on with files that are not those that the run began with."""
    if not run.inputs:
        return
    now = inputs_of(run.shared)
    changed = [path for path in sorted(run.inputs | now) if run.inputs.get(path) != now.get(path)]
    if changed:
        raise UserError(
            f"{changed[0]} has changed since the run {run.out} began: put it back as it was, or "
            "start a new run with another --out"
        )


def free_folder(name: str) -> Path:
    """Make runs/NAME-1, or the next that is not there."""
    make_folder(Path("runs"))
    for i in itertools.count(1):
        folder = Path("runs") / f"{name}-{i}"
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue


def open_run(out: Path) -> Run:
    """The run in this folder as far as it went. A damaged folder is a UserError."""
    path = out / "config.json"
    about = read_json(path)
    try:
        for name in about["configs"]:
            if name not in METHODS:
                raise UserError(
                    f"{out} is a run of {name}, and no method is called so here; use the script "
                    "that registers it"
                )
        configs = {name: METHODS[name].config(**c) for name, c in about["configs"].items()}
        targets = {name: float(x) for name, x in about["targets"].items()}
        inputs = dict(about.get("inputs", {}))
        ceiling = bool(about.get("ceiling", False))
        run = Run(out, configs, about["preset"], int(about["seeds"]), targets, inputs, ceiling)
        run.cache = Path(about.get("cache", CACHE))
        run.command = str(about.get("command", ""))
        run.commit = str(about.get("commit", ""))
        if not configs or not 1 <= run.seeds <= len(T95) + 1:
            raise ValueError("no methods, or no number of seeds")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a config of this version ({error!r:.100})") from None
    for name, c in run.configs.items():
        check(name, c)
    run.done = read_results(out)
    try:
        done = [(result["loop"], result["seed"]) for result in run.done]
        fits = done == [job for job in run.jobs if job in done]
        if run.done:
            table(run.done)  # it shows all of their numbers
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise UserError(f"{out / 'summary.json'} is not that of the run in {path}, or is damaged")
    return run


def read_results(out: Path) -> list[dict[str, Any]]:
    """The finished jobs of a run, as summary.json has them."""
    path = out / "summary.json"
    if not path.exists():
        return []
    results = read_json(path).get("results")
    if not isinstance(results, list):
        raise not_a_run(path, TypeError("it holds no results"))
    return results


# The logs of a run and of a job: the numbers of every update; the same few problems, and pairs that
# were being learned from, at every look at dev; all of dev before and after.
LOGS = ("metrics.jsonl", "samples.jsonl", "pairs.jsonl", "answers.jsonl")
# The other files of a job's folder: its result, once it is done; the traceback of an error that
# nobody expected; what its process wrote past Python.
RESULT = "result.json"
ERROR = "error.txt"
OUTPUT = "output.txt"


def job_folder(out: Path, name: str, seed: int) -> Path:
    """Where a job keeps its files until it is done."""
    return out / "jobs" / f"{name}-{seed}"


def job_of(line: dict[str, Any]) -> str:
    """ "ppo/0", the job that a line of a log belongs to."""
    return f"{line['loop']}/{line['seed']}"


def cut_log(path: Path, update: int) -> float:
    """Drop the lines behind the saved update, and say how many seconds the kept part took."""
    if not path.exists():
        return 0.0
    # Without a saved update the job begins again, and says again what came before the first.
    kept = [line for line in read_lines(path) if update > 0 and line["step"] <= update]
    write_lines(path, kept)
    return kept[-1].get("seconds", 0.0) if kept else 0.0


# A file of the cache: how many seconds each training and each first update took last time.
TIMES = "seconds.json"


class Progress:
    """How far a training is, in words, and how long its parts took last time.

    key: the same for all trainings that should take as long; first: what the first update begins
    with, if that takes long.
    """

    def __init__(self, title: str, total: int, done: int, cache: Path, key: str, first: str = ""):
        self.title = title
        self.total = total
        self.begun_at = self.done = done
        self.times = cache / TIMES
        self.key = key
        self.first = first
        self.began = time.monotonic()
        # In whole seconds; 0 is not worth telling.
        times = self.read()
        self.last = round(times.get(key, 0))
        self.last_first = round(times.get(f"{key}, first update", 0))

    def read(self) -> dict[str, float]:
        """The times of the cache; none if the file is not there or is damaged."""
        try:
            found = json.loads(self.times.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(found, dict):
            return {}
        return {key: x for key, x in found.items() if isinstance(x, int | float)}

    def remember(self, key: str) -> None:
        """How long it has taken until now."""
        seconds = round(time.monotonic() - self.began, 1)
        text = json.dumps(self.read() | {key: seconds}, indent=1)
        temporary = self.times.with_suffix(f".{os.getpid()}.tmp")
        with contextlib.suppress(OSError):  # these times are no more than a courtesy
            if nr.is_first():
                temporary.write_text(text, encoding="utf-8")
                temporary.replace(self.times)

    def advance(self, update: int) -> None:
        """An update is done. What was begun in the middle says nothing about the whole."""
        if self.begun_at == 0 == self.done:
            self.remember(f"{self.key}, first update")
        self.done = update
        if self.begun_at == 0 and self.done >= self.total:
            self.remember(self.key)

    def begins(self) -> str:
        """What is said when it begins, if it is known how long it will take."""
        return f" (last time it took {self.last:.0f} s)" if self.last else ""

    def text(self, seconds: float) -> str:
        """What `workers.saying` prints."""
        if self.done == self.begun_at > 0:
            return f"{self.title}: goes on behind update {self.done}; {seconds:.0f} s so far"
        if self.done == 0:
            what = self.first or f"the first of {self.total} updates"
            known = f" (last time it took {self.last_first:.0f} s)" if self.last_first else ""
            return f"{self.title}: {what}; {seconds:.0f} s so far{known}"
        if workers.console.shows_bars():
            return ""
        text = f"{self.title}: {self.done} of {self.total} updates after {seconds:.0f} s"
        since = self.done - self.begun_at
        if since < 5:  # the first ones are no measure of the others
            return text
        return f"{text}, about {seconds / since * (self.total - self.done):.0f} s to go"


def drive(
    loop: Iterator[dict],
    saved: Any,
    state: Any,
    every: int,
    folder: Path,
    progress: Progress,
    log: Callable[[dict], None],
) -> None:
    """Run a loop to its end: bar, log, states. Ctrl-C is heard between two updates.

    saved: what is saved every so many updates, the state included.
    """
    console = workers.console
    bar = console.bar(progress.title, progress.total, state.update)
    with console.listening() as stop_asked, bar as advance, workers.saying(progress.text):
        for metrics in loop:
            progress.advance(state.update)
            log(metrics)
            advance()
            # All processes leave together.
            stop = nr.over_ranks(torch.tensor(int(stop_asked()))) > 0
            if state.update % every == 0 or stop:
                nr.save_state(folder, saved)
            if stop:
                raise KeyboardInterrupt


# ---- trained models, cached ---------------------------------------------------------------------

# The numbers of Config that say nothing about how a base model is trained.
NOT_OF_A_BASE = set("eval_every eval_problems prompts samples temperature updates lr".split())


# Files that may lie beside a task of somebody's own and decide nothing of it.
NO_TASK = ("nanoreward.py", "train_small.py", "workers.py")


@functools.cache
def source_of(path: str) -> str:
    """The text of a source file as it was when it was first asked for.

    What a process has imported stays what it was, whatever is saved in the file later.
    """
    return Path(path).read_text(encoding="utf-8")


# The SHA-256 of what this process has just imported.
CODE = hashlib.sha256(
    "".join(source_of(module.__file__) for module in (nr, *TASKS.values())).encode()
).hexdigest()


def code_of_task(name: str) -> str:
    """The source of a task, and of all that it uses of files in its own folder."""
    used = {str(Path(TASKS[name].__file__).resolve()): TASKS[name]}
    folder = Path(TASKS[name].__file__).resolve().parent
    to_read = list(used.values())
    while to_read:
        for thing in vars(to_read.pop()).values():
            module = sys.modules.get(getattr(thing, "__module__", None) or "", thing)
            file = getattr(module, "__file__", None)
            path = Path(file).resolve() if file else folder
            if path.parent == folder and path.name not in NO_TASK and str(path) not in used:
                used[str(path)] = module
                to_read.append(module)
    own, *others = used
    return "".join(source_of(path) for path in (own, *sorted(others)))


def code_of(make_batches: Callable) -> str:
    """The code that a training depends on, without comments and docstrings.

    That is Part I of nanoreward.py, whose numbers enter by their values, and the section that
    `make_batches`, the function that makes the training's data, belongs to.
    """
    path = Path(nr.__file__)
    text = source_of(nr.__file__)
    lines = text.splitlines()
    part_two = next(i for i, line in enumerate(lines, 1) if line.startswith("#   PART II"))
    file = Path(make_batches.__code__.co_filename)
    if file.name != path.name:  # a method of somebody's own, in another file
        return text + source_of(str(file))
    # The function that `make_batches` stands in, by name: lines may have moved since it was read.
    outer = make_batches.__qualname__.split(".")[0]
    line = next(line for line, name, _ in statements(text) if outer == name)
    banners = [i for i, text in enumerate(lines, 1) if text.startswith("# ====")]
    begin = max(i for i in banners if i < line)
    end = min((i for i in banners if i > begin), default=len(lines) + 1)
    found = []
    for line, name, code in statements(text):
        inside = line < part_two or begin < line < end
        if inside and not name.endswith(("Config", "Architecture")):
            found.append(code)
    return "\n".join(found)


@functools.cache
def statements(text: str) -> list[tuple[int, str, str]]:
    """Of each statement of a file: its line, what it defines, its code without docstrings.

    The line of a decorated function is that of its `def`. A name is "" where nothing is defined.
    """
    found = []
    for node in ast.parse(text).body:
        for part in ast.walk(node):
            if isinstance(part, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(part):
                part.body = part.body[1:] or [ast.Pass()]
        found.append((node.lineno, vars(node).get("name", ""), ast.dump(node)))
    return found


class CachedTrainer:
    """A `Trainer` that keeps what it has trained, and goes on with what was stopped."""

    def __init__(self, cache: Path, prefix: str = ""):
        self.cache = cache
        self.prefix = prefix

    def folder(
        self, name: str, make_batches: Callable, c: Config, *numbers: Any, reads: str
    ) -> Path:
        """Where the models lie. The name holds a key of all that decides their weights."""
        wanted = {f.name for f in fields(Config)} - NOT_OF_A_BASE | set(reads.split())
        values = {k: v for k, v in vars(c).items() if k in wanted}
        code = code_of(make_batches) + code_of_task(c.task)
        if c.lora:
            code += code_of(nr.add_adapters)
        parts = [code, values, inputs_of(c), numbers, torch.__version__]
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        return self.cache / f"{self.prefix}{name}-{key[:16]}"

    def __call__(
        self,
        name: str,
        modules: list[torch.nn.Module],
        make_batches: Callable[[], nr.Batches],
        updates: int,
        c: Config,
        lr: float,
        muon_lr: float = 0.0,
        warmup: int = nr.FIT_WARMUP,
        reads: str = "",
    ) -> None:
        """Train the modules, or load them if that was done before."""
        folder = self.folder(name, make_batches, c, updates, lr, muon_lr, warmup, reads=reads)
        folder.mkdir(parents=True, exist_ok=True)
        # Another job or run may train the same models at this moment.
        told = f"waiting for {self.prefix}{name}, which another process trains in {folder}"
        with wait_for_lock(folder, told):
            state = nr.Fit(modules, nr.optimizers(modules, lr, muon_lr))
            if (folder / "state.pt").exists():
                device = next(modules[0].parameters()).device
                nr.load_state(folder, into=state, device=device)
            if state.update == updates:
                return
            past = read_lines(folder / "fit.jsonl", named=False) if state.update else []
            write_lines(folder / "fit.jsonl", [m for m in past if m["step"] <= state.update])
            size = sum(p.numel() for p in modules[0].parameters())
            what = f"{self.prefix}{name}"
            key = f"{what}, {updates} updates, {size} parameters, {c.device}, {c.threads} threads"
            progress = Progress(what, updates, state.update, self.cache, key)
            print(
                f"training {what} ({size:,} parameters, {updates} updates){progress.begins()} -> "
                f"{folder}",
                flush=True,
            )
            began = time.time()

            def log(m: dict[str, Any]) -> None:
                seconds = round(time.time() - began, 3)
                append(folder / "fit.jsonl", {"step": state.update, "seconds": seconds, **m})

            loop = nr.fit(state, make_batches(), updates, c, warmup)
            every = max(1, updates // 10)
            drive(loop, state, state, every, folder, progress, log)
            nr.save_state(folder, state)


# ---- one job: one method with one seed ----------------------------------------------------------

# What a healthy value of each metric is, and the methods that have it; none: all.
HEALTHY = {
    "dev": ("the share of right answers to held-out problems; it rises", ""),
    "reward, truth": (
        "rise together; if only reward rises, it is being fooled",
        "ppo seq2seq denoise",
    ),
    "kl": ("a few nats a response; tens: the policy has left its start", "ppo seq2seq denoise"),
    "entropy": ("falls slowly; near 0 nothing new is found", "ppo seq2seq denoise"),
    "clipfrac": ("below 0.2; above it steps are too large", "ppo seq2seq denoise"),
    "ended": ("near 1; at 0 no response ends", "ppo seq2seq denoise"),
    "flat_groups": ("below 1, or the arms that compare in groups learn nothing", "ppo denoise"),
    "pairs": ("hundreds a round", "iterative_dpo self_rewarding"),
    "chosen": ("does not fall; pair_accuracy rises", "iterative_dpo self_rewarding"),
    "score": ("rises, and dev with it", "self_rewarding"),
    "orm, sorm": ("rise from 0.5 to 0.8; at 0.5 they know nothing", "refine"),
}
WATCHED = """reward truth score kl entropy clipfrac ended flat_groups pairs chosen rejected
pair_accuracy orm sorm""".split()


def what_to_watch(names: Collection[str]) -> str:
    """A line for each metric that these methods have, no wider than the terminal."""
    width = shutil.get_terminal_size().columns
    lines = ["what to watch:"]
    for metric, (healthy, owners) in HEALTHY.items():
        if not owners or not set(names).isdisjoint(owners.split()):
            lines += textwrap.wrap(
                f"{metric}: {healthy}",
                max(width, 40),
                initial_indent="  ",
                subsequent_indent="      ",
            )
    return "\n".join(lines)


def notes(m: dict[str, Any], c: Any) -> dict[str, str]:
    """What a person should be told about an update, in plain words. Each is said once."""
    m = {name: x for name, x in m.items() if isinstance(x, int | float)}
    found = {}
    if m.get("grad_norm") == 0:
        found["gradient"] = "the gradient is 0: every response earned the same, nothing is learned"
    if m.get("flat_groups") == 1 and vars(c).get("arm") != "gae":
        found["flat"] = "equal rewards in every group, nothing to learn from"
    if m.get("ended") == 0:
        found["eos"] = "no response ends with EOS (a larger --response, more --base-updates?)"
    if m.get("kl", 0) > 20:
        kl = m["kl"]
        found["kl"] = f"KL runs away, {kl:.0f} nats a response (a larger --beta, a smaller --lr?)"
    if m.get("entropy", 1) < 1e-3:
        found["entropy"] = "all samples are the same, nothing new can be found (a smaller --lr?)"
    if m.get("pairs") == 0 and m.get("judgement_pairs", 0) == 0:
        found["pairs"] = "no problem has a better and a worse response, the round teaches nothing"
    if m.get("spread") == 0 or m.get("unread", 0) > 0.5:
        found["judge"] = "the judge says one score to everything, or none"
    if m.get("quoted", 0) > 0.05:
        found["quoted"] = "responses hold a score themselves: they talk to the judge"
    if m.get("chosen_per_token", 0) < -1:
        found["chosen"] = "the chosen log-prob falls below -1 a token (a larger --alpha?)"
    return found


# A look at dev that takes longer, in seconds, is said.
LOOK = 10.0
# The names of lists that have one number for each token.
OF_TOKENS = ("token_rewards", "value", "shift", "logp", "order", "sure")


def as_rollout(task: nr.Task, prompts: list[str], texts: list[str], c: Config) -> nr.Rollout:
    """Problems and responses as a method's `explain` reads them."""
    device = nr.pick_device(c.device)
    prompt = nr.encode_prompts(task, prompts, c).to(device)
    ids = [y[: c.response] for y in task.encode(texts)]
    response = nr.right_pad(ids, c.pad_id, c.response).to(device)
    mask = nr.up_to_eos(response, c)
    return nr.Rollout(prompt, response, mask, response, torch.arange(len(texts)))


def of_tokens(task: nr.Task, ids: list[int], inside: dict[str, Any]) -> dict[str, Any]:
    """What is said inside of a response, beside its tokens, in the order in which people read.

    inside may name the response's own `ids`: its text, encoded again, may give others.
    """
    ids = inside.get("ids", ids)
    places = task.reading_order(ids) if "reading_order" in dir(task) else list(range(len(ids)))
    found = {"tokens": [task.decode([ids[place]]) for place in places]}
    for name, numbers in inside.items():
        if name == "ids":
            continue
        if name in OF_TOKENS:
            behind = numbers[len(ids) :]
            numbers = [numbers[place] for place in places if place < len(numbers)] + behind
        found[name] = numbers
    return found


def explained(
    state: nr.State,
    method: nr.Method,
    task: nr.Task,
    prompts: list[str],
    texts: list[str],
    c: Config,
) -> list[dict[str, Any]]:
    """What the reward says of each token, step or pass of these responses."""
    if not texts:
        return []
    b = as_rollout(task, prompts, texts, c)
    lengths = b.mask.sum(1).int().tolist()
    found = []
    for i, inside in enumerate(method.explain(state, task, b, c)):
        ids = b.response[i, : lengths[i]].tolist()
        found.append(of_tokens(task, ids, inside))
        if "steps" in dir(task) and "step_ok" in dir(task):
            steps = [text for text, _ in task.steps(ids)]
            found[i]["steps_right"] = task.step_ok(prompts[i], steps)
    return found


class Job:
    """One method with one seed: its config, task and state, and what is written about it."""

    def __init__(self, run: Run, name: str, seed: int):
        self.run = run
        self.name = name
        self.seed = seed
        self.title = f"{name}/{seed}"
        self.folder = job_folder(run.out, name, seed)
        self.method = METHODS[name]
        self.c = replace(run.configs[name], seed=seed)
        self.task = make_task(self.c)
        # The held-out problems are the same for all seeds.
        self.dev = self.task.prompts(self.c.eval_problems, nr.rng(0, "dev"), "dev")
        self.test = self.task.prompts(self.c.eval_problems, nr.rng(0, "test"), "test")
        self.told: set[str] = set()
        # The update of the last look at dev, and what it answered then.
        self.looked: dict[int, list[str]] = {}
        self.total = self.c.total_updates()
        # Evaluate and save every so many updates.
        self.every = max(self.c.eval_every, self.total // 8)

    def start(self) -> None:
        """Train what the method starts from, measure it, and take up a state that was saved."""
        c, task = self.c, self.task
        train = CachedTrainer(self.run.cache)
        base = nr.gpt_base(task, c, train)
        result = {"loop": self.name, "seed": self.seed, "chance": task.chance()}
        result["problems"] = len(self.test)
        with self.saying(f"measures the base on {len(self.test)} test problems"):
            result["base"] = nr.accuracy(base, task, self.test, c)
            result["base_sampled"] = nr.accuracy(base, task, self.test, c, c.temperature)
        print(
            f"{self.title}: base {result['base']:.3f} greedy, {result['base_sampled']:.3f} sampled",
            flush=True,
        )
        models = self.method.reward_models(base, task, c, train)
        policy = base
        if self.method.starts_from is not None:
            policy = self.method.starts_from(base, task, c, train)
            with self.saying(f"measures its start on {len(self.test)} test problems"):
                result["start"] = nr.accuracy(policy, task, self.test, c)
        self.state = self.method.start(policy, c)
        if models:
            self.state.models = models
        greedy = replace(c, temperature=0.0)
        # What the policy answers before it is trained, and the true rewards.
        with self.saying(f"answers {len(self.dev)} problems of dev before it is trained"):
            generator = nr.rng(c.seed, "evaluate")
            self.before = nr.respond(policy, task, self.dev, greedy, generator)
        self.graded = [task.grade(x, y) for x, y in zip(self.dev, self.before, strict=True)]
        self.saved = {"job": self.title, "result": result, "state": self.state}
        path = self.folder / "state.pt"
        if path.exists():
            fresh = {"job": "", "result": {}, "state": self.state}
            found = nr.load_state(self.folder, into=fresh, device=policy.device)
            if found.keys() != self.saved.keys() or found["job"] != self.title:
                raise UserError(f"{path} is not a state of this job and version, delete it")
            self.saved = found

    def answer(self, prompts: list[str], temperature: float = 0.0) -> list[str]:
        """One response to each problem by what has been trained so far."""
        c = replace(self.c, temperature=temperature)
        return self.method.answer(self.state, self.task, prompts, c, nr.rng(c.seed, "evaluate"))

    def right(self, prompts: list[str], temperature: float = 0.0) -> float:
        """The share of right ones."""
        texts = self.answer(prompts, temperature)
        return mean(self.task.grade(x, y) for x, y in zip(prompts, texts, strict=True))

    def saying(self, what: str, first: float | None = None) -> contextlib.AbstractContextManager:
        """Say what is at work, if it takes long."""

        def text(seconds: float) -> str:
            return f"{self.title}: {what}, {seconds:.0f} s so far"

        return workers.saying(text, first)

    def head(self) -> dict[str, Any]:
        """What every line of a log begins with."""
        return {"loop": self.name, "seed": self.seed, "step": self.state.update}

    def show(self) -> None:
        """A few problems -> samples.jsonl, and a few pairs -> pairs.jsonl.

        The problems are the same at every look: some were right before the training, some wrong.
        """
        few = self.method.shown
        asked = range(min(32, len(self.dev)))
        right = [i for i in asked if self.graded[i] == 1]
        wrong = [i for i in asked if self.graded[i] != 1]
        prompts = [self.dev[i] for i in right[:few] + wrong[:few]]
        texts = self.answer(prompts)
        inside = explained(self.state, self.method, self.task, prompts, texts, self.c)
        head = self.head()
        for x, y, more in zip(prompts, texts, inside, strict=True):
            line = {"prompt": x, "response": y, "reward": self.task.grade(x, y)}
            append(self.folder / "samples.jsonl", head | more | line | head)
        for pair in self.method.pairs(self.state, self.task, self.c):
            for name in ("chosen", "rejected"):
                pair[name] = of_tokens(self.task, pair[name]["ids"], pair[name])
            append(self.folder / "pairs.jsonl", head | pair)

    def compare(self, result: dict[str, Any]) -> None:
        """All of dev before and after the training -> answers.jsonl, and into the result.

        What the reward says is there for some of each kind; those that changed come first.
        """
        task, few = self.task, self.method.shown
        after = self.looked.get(self.state.update) or self.answer(self.dev)
        lines: list[dict[str, Any]] = []
        kinds: dict[tuple, list[int]] = {}
        for i, (x, before, y) in enumerate(zip(self.dev, self.before, after, strict=True)):
            first = {"response": before, "reward": self.graded[i]}
            last = {"response": y, "reward": task.grade(x, y)}
            line: dict[str, Any] = {"prompt": x, "before": first, "after": last}
            if "solution" in dir(task):
                line["solution"] = task.solution(x)
            lines.append(line)
            kinds.setdefault((first["reward"] == 1, last["reward"] == 1), []).append(i)
        result["dev_problems"] = len(lines)
        result["start_dev"] = mean(self.graded)
        mended, broken = (kinds.get(kind, []) for kind in ((False, True), (True, False)))
        result["mended"], result["broken"] = len(mended), len(broken)
        told = mended[: 4 * few] + broken[: 4 * few]
        told += kinds.get((False, False), [])[: 2 * few] + kinds.get((True, True), [])[:few]
        try:
            for name in ("before", "after"):
                self.explain(name, [lines[i] for i in told])
        except Exception as error:  # the training was long, and its result is what counts
            if dist.is_initialized():
                raise  # the other processes would wait for ever
            tqdm.write(f"{self.title}: its answers are not explained: {error!r:.200}")
        write_lines(self.folder / "answers.jsonl", [self.head() | line for line in lines])

    def explain(self, name: str, lines: list[dict[str, Any]]) -> None:
        """What the reward says of the answers of this name, "before" or "after", into these lines.

        The trained models read both. But a method that writes again writes as it did then.
        """
        state = self.state
        if name == "before" and self.method.writes_again:
            state = replace(state, policy=state.reference)
        prompts = [line["prompt"] for line in lines]
        texts = [line[name]["response"] for line in lines]
        found = explained(state, self.method, self.task, prompts, texts, self.c)
        for line, inside in zip(lines, found, strict=True):
            line[name] |= inside

    def log(self, m: dict[str, Any]) -> None:
        """One update -> metrics.jsonl; now and then a look at dev; warnings in plain words."""
        u = self.state.update
        seconds = round(self.offset + time.time() - self.began, 3)
        head = self.head() | {"seconds": seconds, "samples": self.state.samples}
        line = head | m | head  # in this order, whatever a method calls its own numbers
        title = f"{self.title} {u:4d}"
        if u % self.every == 0 or u in (1, self.total):
            with self.saying(f"answers {len(self.dev)} problems of dev after update {u}", LOOK):
                texts = self.answer(self.dev)
                self.looked = {u: texts}
                line["dev_greedy"] = mean(map(self.task.grade, self.dev, texts))
                self.show()
            numbers = [(key, m.get(key)) for key in WATCHED]
            parts = [f"{key} {x:.3f}" for key, x in numbers if isinstance(x, int | float)]
            tqdm.write("  ".join([f"{title}  dev {line['dev_greedy']:.3f}", *parts]))
        new = {kind: x for kind, x in notes(m, self.c).items() if kind not in self.told}
        self.told |= new.keys()
        for text in new.values():
            tqdm.write(f"{title}  note: {text}")
        if new:
            line["note"] = "; ".join(new.values())
        append(self.folder / "metrics.jsonl", line)

    def train(self) -> None:
        """Run the loop, from the beginning or from the saved state."""
        folder, state = self.folder, self.state
        self.offset = cut_log(folder / "metrics.jsonl", state.update)
        for log in LOGS[1:]:
            cut_log(folder / log, state.update)
        self.began = time.time()
        for line in lines_there(folder / "metrics.jsonl"):
            self.told |= notes(line, self.c).keys()
        if state.update == 0:
            with self.saying("shows what it starts from"):
                self.show()
        loop = self.method.loop(state, self.task, self.c)
        numbers = json.dumps({**asdict(self.c), "seed": 0}, sort_keys=True)
        key = f"{self.name}, {hashlib.sha256(numbers.encode()).hexdigest()[:16]}"
        first = self.method.first.format(**vars(self.c))
        progress = Progress(self.title, self.total, state.update, self.run.cache, key, first)
        if progress.last:
            print(f"{self.title}: {self.total} updates{progress.begins()}", flush=True)
        drive(loop, self.saved, state, self.every, folder, progress, self.log)

    def finish(self) -> None:
        """Save the models and measure them on test: the job's entry in summary.json."""
        c, state = self.c, self.state
        folder = self.run.out / "models" / f"{self.name}-{self.seed}"
        remove_left_behind(folder)
        state.policy.save(folder)
        if nr.adapters(state.policy):
            nr.save_adapters(state.policy, folder / "adapters")
        if self.method.answer_parts:
            nr.save_state(folder, {part: vars(state)[part] for part in self.method.answer_parts})
        enough = None
        for m in lines_there(self.folder / "metrics.jsonl"):
            if m.get("dev_greedy", 0) >= 0.8:
                enough = enough or m["samples"]
        result = self.saved["result"]
        with self.saying(f"answers {len(self.test)} test problems"):
            result["final"] = self.right(self.test)
            result["final_sampled"] = self.right(self.test, c.temperature)
        result["samples"] = state.samples
        result["samples_to_80"] = enough
        result["updates"] = self.total
        result["seconds"] = round(self.offset + time.time() - self.began, 1)
        with self.saying("compares its answers before and after the training"):
            self.compare(result)
        if self.run.ceiling:
            train = CachedTrainer(self.run.cache, "careful-")
            ceiling = nr.gpt_base(make_task(c, careful=True), c, train)
            result["ceiling"] = nr.accuracy(ceiling, self.task, self.test, c)
        write_json(self.folder / RESULT, result)


def run_job(run: Run, name: str, seed: int) -> None:
    """Train and measure one method with one seed; at its end its folder holds the result."""
    folder = job_folder(run.out, name, seed)
    folder.mkdir(parents=True, exist_ok=True)
    # The processes of a run that was killed end after the update at hand.
    told = f"{name}/{seed}: waiting for the process of a stopped run that still works in {folder}"
    with wait_for_lock(folder, told):
        if (folder / RESULT).exists():
            return
        (folder / ERROR).unlink(missing_ok=True)
        c = run.configs[name]
        torch.set_num_threads(c.threads)
        torch.set_float32_matmul_precision("high")  # [gpu] logits by TF32; a CPU has none
        job = Job(run, name, seed)
        job.start()
        job.train()
        job.finish()


# ---- all jobs of a run, one after another or side by side ----------------------------------------

# What to lower if memory ran out inside this function of nanoreward.py; the first that fits.
TO_LOWER = {
    "optimizer_step": "--micro",
    "pose_problems": "--prompts",
    "judged": "--judgements",
    "respond": "--eval-problems",
    "sample": "--prompts or --samples",
    "annotate": "--micro",
    "pair_logprobs": "--micro",
    "logprobs_in_parts": "--micro",
    "read": "--micro",
}
# What Python takes with torch loaded, in bytes.
PROCESS_MEMORY = 300_000_000


def in_a_line(error: Exception, c: Config | None = None) -> str:
    """What to tell the user of an error; empty if it is none that a user can mend.

    c: the config of the job that met it, if it was in a job.
    """
    message = str(error)
    if nr.out_of_memory(error):
        inside = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
        lower = next((flags for name, flags in TO_LOWER.items() if name in inside), "the sizes")
        if "optimizer_step" in inside and c and may_adapt(c):
            lower += ", or train adapters with --lora 16"
        message = f"there is not enough memory, lower {lower}: {message}"
    elif not isinstance(error, UserError | OSError):
        return ""
    return " ".join(message.splitlines())


def try_job(run: Run, name: str, seed: int) -> str:
    """Run a job. What went wrong, in a line; empty if it is done."""
    try:
        run_job(run, name, seed)
    except Exception as error:
        if dist.is_initialized():
            raise  # the other processes would wait for ever
        if message := in_a_line(error, run.configs[name]):
            return message
        path = job_folder(run.out, name, seed) / ERROR
        write_text(path, traceback.format_exc())
        return f"{type(error).__name__}: {error!s:.200} (all of it in {path})".replace("\n", " ")
    return ""


def entry_of(name: str) -> str:
    """What METHODS says of a method, in words that are the same in every process."""
    parts = vars(METHODS[name]) if name in METHODS else {}
    words = {key: getattr(x, "__qualname__", "") or repr(x) for key, x in parts.items()}
    return re.sub(r" at 0x[0-9a-f]+", "", repr(words))


@dataclass
class Plan:
    """What a process has to know of the run to do a job of it."""

    out: Path
    cache: Path
    ceiling: bool
    configs: dict[str, dict[str, Any]]
    # What METHODS says in the process that began.
    entries: dict[str, str]
    # Its CODE.
    code: str


def plan_of(run: Run) -> Plan:
    """The plan of a run, in plain values: a process that has other classes can read it too."""
    configs = {name: asdict(c) for name, c in run.configs.items()}
    entries = {name: entry_of(name) for name in configs}
    return Plan(run.out, run.cache, run.ceiling, configs, entries, CODE)


def work(plan: Plan, name: str, seed: int) -> str:
    """Do a job in a process of its own. What went wrong, in a line; empty if it is done."""
    numbers = plan.configs[name]
    if entry_of(name) != plan.entries[name] or numbers["task"] not in TASKS:
        return (
            f"its process does not know the same method {name} or task {numbers['task']}: a script "
            "must register them when it is imported, or be started with --workers 1"
        )
    if plan.code != CODE:
        return "a source file was changed after the run began: go on with --resume"
    configs = {name: METHODS[name].config(**numbers)}
    run = Run(plan.out, configs, "", 1, {}, {}, plan.ceiling, cache=plan.cache)
    folder = job_folder(run.out, name, seed)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        workers.keep_output(folder / OUTPUT)
        return try_job(run, name, seed)
    except (OSError, UserError) as error:
        return in_a_line(error)
    finally:
        workers.keep_output(Path(os.devnull))


def in_good_order(jobs: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """The order in which processes take jobs: first one job of each seed, then the others.

    So bases of several seeds are trained side by side; the jobs of a seed wait for the same one.
    Within both parts the last methods of METHODS go first, because they take longest: short jobs at
    the end leave no process alone at work.
    """
    rank = {name: i for i, name in enumerate(METHODS)}
    longest_first = sorted(jobs, key=lambda job: -rank.get(job[0], 0))
    first: dict[int, tuple[str, int]] = {}
    for name, seed in longest_first:
        first.setdefault(seed, (name, seed))
    return [*first.values(), *(job for job in longest_first if job not in first.values())]


def do_jobs(run: Run, about: dict[str, Any]) -> None:
    """Do all jobs that are left; a line says of each that fails why. about: for summary.json."""

    def ended(job: tuple[str, int], why: str, died: bool) -> None:
        name, seed = job
        if not why:
            take_over(run, name, seed, about)
            return
        last = last_line(job_folder(run.out, name, seed) / OUTPUT) if died else ""
        tqdm.write(f"error: {name}/{seed} failed: {why}{last}", file=sys.stderr)

    jobs = run.open_jobs
    size = min(run.workers, len(jobs))
    if size > 1:
        do = functools.partial(work, plan_of(run))
        try:
            workers.Pool(size, do, ended).run(in_good_order(jobs))
        except UserError as error:  # no process could begin, or the folder cannot be written
            tqdm.write(f"error: {error}", file=sys.stderr)
        return
    for name, seed in jobs:
        ended((name, seed), try_job(run, name, seed), False)


def last_line(path: Path) -> str:
    """The last words of a process that died, if there are any."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"; it wrote: {lines[-1]:.200}" if lines else ""


def take_over(run: Run, name: str, seed: int, about: dict[str, Any]) -> None:
    """Merge what a finished job has left into the files of the run, then remove its folder.

    The lines and results stand in the order of the run's jobs, whatever was finished first. Killed
    in between, the same is done again at the next start.
    """
    folder = job_folder(run.out, name, seed)
    result = read_json(folder / RESULT)
    if (result.get("loop"), result.get("seed")) != (name, seed):
        raise UserError(f"{folder / RESULT} is not that of the job {name}/{seed}, delete it")
    order = {job: i for i, job in enumerate(run.jobs)}
    for log in LOGS:
        lines = lines_of(run.out / log, run.done) + lines_of(folder / log, [result])
        lines.sort(key=lambda line: order[line["loop"], line["seed"]])
        if lines or log == LOGS[0]:
            write_lines(run.out / log, lines)
    results = [*run.done, result]
    results.sort(key=lambda result: order[result["loop"], result["seed"]])
    run.done = results
    write_json(run.out / "summary.json", about | {"results": results})
    remove_folder(folder)


def lines_of(path: Path, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of a log that belong to the jobs of these results."""
    jobs = {job_of(result) for result in results}
    return [line for line in lines_there(path) if job_of(line) in jobs]


def remove_folder(folder: Path) -> None:
    """Remove the folder of a job that is done."""
    if nr.is_first():
        shutil.rmtree(folder, ignore_errors=True)


def take_over_all(run: Run, about: dict[str, Any]) -> None:
    """Take over what jobs of a killed process have finished. A broken line of a log is said now."""
    for log in LOGS:
        lines_there(run.out / log)
    for name, seed in run.open_jobs:
        if (job_folder(run.out, name, seed) / RESULT).exists():
            take_over(run, name, seed, about)


def remove_jobs(run: Run) -> None:
    """Remove the folder of the jobs, and what a killed process has left there, if all are done."""
    if run.finished and nr.is_first():
        shutil.rmtree(run.out / "jobs", ignore_errors=True)


# ---- what a person sees at the end --------------------------------------------------------------

# Student's t, two-sided 95 %, for 2 to 20 values.
T95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]
T95 += [2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093]


def half_width(values: list[float]) -> float:
    """Half of the 95 % interval of a mean over seeds; nan of fewer than two values."""
    if len(values) < 2:
        return math.nan
    return T95[len(values) - 2] * stdev(values) / len(values) ** 0.5


def interval(values: list[float], places: int = 3) -> str:
    """Mean and 95 % interval over seeds; with one seed the number alone. places: after the dot."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.{places}f}"
    return f"{mean(values):.{places}f} ± {half_width(values):.{places}f}"


def table(results: list[dict[str, Any]]) -> str:
    """The table at the end: greedy and sampled accuracy on held-out test problems."""

    def over(rs: list[dict], key: str) -> str:
        return interval([r[key] for r in rs])

    one = list({r["seed"]: r for r in reversed(results)}.values())
    titles = "start greedy sampled gain_(paired) samples to_80_% seconds".split()
    rows = [["", *(title.replace("_", " ") for title in titles)]]
    rows.append(["chance", "", f"{one[0]['chance']:.3f}"])
    rows.append(["base", "", over(one, "base"), over(one, "base_sampled")])
    for name in dict.fromkeys(r["loop"] for r in results):
        mine = [{"start": r["base"]} | r for r in results if r["loop"] == name]
        reached = [r["samples_to_80"] for r in mine]
        cells = [over(mine, key) for key in ("start", "final", "final_sampled")]
        cells.append(interval([r["final"] - r["start"] for r in mine]))
        cells.append(f"{mean(r['samples'] for r in mine):.0f}")
        cells.append("never" if None in reached else f"{mean(reached):.0f}")
        cells.append(f"{mean(r['seconds'] for r in mine):.0f}")
        rows.append([name, *cells])
    if "ceiling" in one[0]:
        rows.append(["careful twin", "", over(one, "ceiling")])
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    if "problems" in one[0]:
        n = one[0]["problems"]
        # A share of n problems has the variance p (1 - p) / n, which is largest for p = 1/2.
        lines.append(
            f"An accuracy is that of {n} problems, the same for all seeds: they alone leave it "
            f"uncertain by up to ± {1.96 * 0.5 / n**0.5:.3f}."
        )
    return "\n".join(lines)


def lines_so_far(out: Path) -> list[dict[str, Any]]:
    """The metrics of a run, those of jobs at work included."""
    at_work: list[dict[str, Any]] = []
    try:
        logs = sorted((out / "jobs").glob("*/metrics.jsonl"))
    except FileNotFoundError:  # the last job has ended at this moment
        logs = []
    for path in logs:
        try:
            at_work += read_lines(path)
        except UserError:
            if path.exists():
                raise  # else the job has ended at this moment, and its lines stand in the run's
    if at_work and not (out / "metrics.jsonl").exists():
        return at_work
    # A job that was being taken over stands in both.
    jobs = {job_of(line) for line in at_work}
    done = [line for line in read_lines(out / "metrics.jsonl") if job_of(line) not in jobs]
    return done + at_work


def draw_picture(runs: list[Path], path: Path) -> None:
    """The curves of one or several runs, if matplotlib is installed."""
    logs = {run: lines_so_far(run) for run in runs}
    results = read_results(runs[0]) if len(runs) == 1 else []
    try:
        from notebooks.curves import picture
    except ImportError as error:
        missing = str(error.name).split(".")[0] == "matplotlib"
        why = "matplotlib is missing (pip install matplotlib)" if missing else error
        print(f"no picture: {why}")
        return
    kind = path.suffix.lower()[1:]
    nr.write_whole(path, lambda temporary: picture(logs, results, temporary, kind))
    print(f"picture: {path}")


def write_page(runs: list[Path], path: Path) -> None:
    """One page with all that there is to see of one or several runs."""
    try:
        from notebooks import report
    except ModuleNotFoundError as error:  # installed without the folder notebooks/
        raise UserError(f"no page can be made: {error}") from None
    try:
        write_text(path, report.page(runs, report.REFERENCE, path.parent))
    except report.BadRun as error:
        raise UserError(f"no page can be made: {error}") from None
    print(f"page: {path}")


def show_run(out: Path, again: bool = True) -> None:
    """Picture and page of a run; those that are there already only if again."""
    if again or not (out / "curves.png").exists():
        draw_picture([out], out / "curves.png")
    if again or not (out / PAGE).exists():
        try:
            write_page([out], out / PAGE)
        except Exception as error:  # the run is done and saved, whatever is wrong with its page
            print(f"no page: {error!r:.300}")


def verdict(run: Run) -> int:
    """The exit code of the targets: 1 if one was missed."""
    missed = 0
    for name, target in run.targets.items():
        got = mean(r["final"] for r in run.done if r["loop"] == name)
        word = "reached" if got >= target else "MISSED"
        print(f"target {name} {target}: {word} with {got:.3f}")
        missed += got < target
    return int(missed > 0)


# ---- commands -----------------------------------------------------------------------------------


def join_processes() -> None:
    """Become one of the processes of torchrun: all compute, the first one writes and speaks."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # [gpu]
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    if not nr.is_first():
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def leave_processes() -> None:
    """End the group. Its threads are still at work, and could abort a process that just ends."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def check_shared(folder: Path, given: str) -> None:
    """Refuse processes on several machines that do not share this folder; given: its flag."""
    seen = torch.tensor(int(time.time_ns()) if nr.is_first() else 0)
    mark = folder / f"shared.{int(nr.over_ranks(seen))}.tmp"
    if nr.is_first():
        mark.touch()
    dist.barrier()
    missing = int(nr.over_ranks(torch.tensor(int(not mark.exists()))))
    if nr.is_first():
        mark.unlink()
    if missing:
        many = dist.get_world_size()
        leave_processes()
        raise UserError(
            f"{missing} of {many} processes do not see {folder}: {given} must "
            "name a folder on a disk that all machines share"
        )


def own_rank() -> int:
    """Which of several processes this one is, from 0 on; -1 if it is alone.

    RANK by itself is left over from another program.
    """
    rank, size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    if not (rank.isdecimal() and size.isdecimal() and int(size) > 1):
        return -1
    return int(rank)


def find_run(a: argparse.Namespace) -> Run:
    """The run that is asked for, new or old; under torchrun the first process makes the folder."""
    given = (a.loops, a.out, a.target, a.ceiling, a.config, given_numbers(a))
    if a.resume and (any(given) or a.seeds is not None):
        raise UserError(
            "--resume takes all numbers from its folder: give no loop, flag or target with it"
        )
    a.config = PRESET if a.config is None else a.config
    a.seeds = 1 if a.seeds is None else a.seeds
    rank = own_rank()
    if rank >= 0 and not (a.out or a.resume):
        raise UserError("under torchrun give --out FOLDER: all processes work on one run")
    if rank >= 0 and not {"MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        raise UserError(
            "RANK and WORLD_SIZE say that there are several processes, but MASTER_ADDR and "
            "MASTER_PORT do not say where they meet: use torchrun, or unset RANK"
        )
    if rank > 0:
        join_processes()  # waits until the first process has the folder
        check_shared(Path(a.resume or a.out), "--out")
    run = old_run(a) if a.resume else new_run(a)
    if rank == 0:
        join_processes()
        check_shared(run.out, "--out")
    if rank >= 0:
        check_shared(run.cache, "--cache")
    return run


def check_workers(asked: int | None) -> None:
    """Refuse a number of workers that cannot be."""
    if asked is None:
        return
    check_number("workers", asked)
    if asked > 1 and own_rank() >= 0:
        raise UserError("under torchrun all processes share one job: leave out --workers")


def usual_workers(run: Run) -> int:
    """As many as the cores have room for, and the memory; one under torchrun and on a GPU."""
    if own_rank() >= 0 or run.shared.device != "cpu":
        return 1
    largest = max(sum(memory_needed(c).values()) for c in run.configs.values())
    by_memory = memory_of("cpu") / (largest + PROCESS_MEMORY)
    return max(1, int(min(workers.physical_cores() // run.shared.threads, by_memory)))


def train_command(argv: list[str], alone: bool) -> int:
    """The main command. alone: one worker, unless the flags say otherwise."""
    check_methods()
    a = build_parser().parse_args(argv)
    a.command = command_of(argv, alone)
    check_workers(a.workers)
    run = find_run(a)
    with run.lock:
        run.workers = a.workers or (1 if alone else usual_workers(run))
        code = finish_run(run)
    leave_processes()
    return code


def command_of(argv: list[str], alone: bool) -> str:
    """How to begin the same run again. alone: the words come from a script that called `main`."""
    if alone:
        return f"train_small.main({argv})"
    program = ["python", "train_small.py"]
    if own_rank() >= 0:
        program = ["torchrun", "--nproc-per-node", os.environ["WORLD_SIZE"], "train_small.py"]
    return shlex.join([*program, *argv])


def finish_run(run: Run) -> int:
    """Do the jobs that are left, then show all of them."""
    c = run.shared
    nr.pick_device(c.device)
    remove_jobs(run)
    if run.finished:
        print(f"{run.out} is finished; nothing to do. Its table:\n{table(run.done)}")
        show_run(run.out, again=False)
        return verdict(run)
    about = {
        "config": run.preset,
        "threads": c.threads,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    print(
        f"run {run.out} · base models {run.cache} · {about}\n{what_to_watch(run.configs)}",
        flush=True,
    )
    about["changed"] = {name: changed_numbers(c) for name, c in run.configs.items()}
    if note := getattr(make_task(c), "note", ""):
        print(note, flush=True)
    if c.model and run.preset == PRESET and c.lr == type(c).lr:
        print(f"note: --lr {c.lr} is for a small GPT; a folder wants --config sums or hf")
    out, cache = shlex.quote(str(run.out)), shlex.quote(str(run.cache))
    script = shlex.quote(os.path.basename(sys.argv[0]) or "train_small.py")
    again = f"python {script} --resume {out} --cache {cache}"
    try:
        take_over_all(run, about)
        do_jobs(run, about)
    except KeyboardInterrupt:
        print(f"\nstopped; go on with: {again}")
        return 130
    if run.done:
        print(table(run.done))
    if not run.finished:
        left = ", ".join(f"{name}/{seed}" for name, seed in run.open_jobs)
        print(f"not done: {left}; try again with: {again}")
        return 2
    remove_jobs(run)
    show_run(run.out)
    return verdict(run)


@dataclass
class Trained:
    """A method of a run as it was after its training."""

    name: str
    c: Config
    task: nr.Task
    state: nr.State
    # How it answers; 0 is greedy.
    temperature: float

    def answer(self, prompt: str, index: int = 0) -> str:
        """What it answers; another index draws anew. A text that is no problem is a UserError."""
        method = METHODS[self.name]
        c = replace(self.c, temperature=self.temperature)
        try:
            self.task.grade(prompt, "")
            generator = nr.rng(c.seed, "evaluate", index)
            return method.answer(self.state, self.task, [prompt], c, generator)[0]
        except ValueError as error:
            raise UserError(str(error)) from None


def open_trained(out: Path, name: str, seed: int | None, temperature: float) -> Trained:
    """What the run in this folder has trained; without a name or a seed its first one."""
    run = open_run(out)
    name = name or next(iter(run.configs))
    seed = run.shared.seed if seed is None else seed
    if name not in run.configs:
        raise UserError(f"{out} has no method {name!r}; it has {', '.join(run.configs)}")
    folder = out / "models" / f"{name}-{seed}"
    if not folder.exists():
        there = sorted(path.name for path in (out / "models").glob("*-*"))
        raise UserError(
            f"{folder} does not exist: that method and seed has not finished in this run "
            f"(there are {', '.join(there) or 'none'})"
        )
    c = replace(run.configs[name], seed=seed)
    try:
        nr.pick_device(c.device)
    except UserError:
        c = replace(c, device="cpu")  # it was trained on another machine
    task = make_task(c)
    method = METHODS[name]
    policy = Transformer.load(folder).to(c.device)
    for f in fields(nr.Architecture):
        # A diffusion LM looks ahead, and it may have one token more than its base: MASK.
        may_differ = f.name in ("vocab", "causal", "bf16")
        if not may_differ and vars(policy.config)[f.name] != vars(c)[f.name]:
            raise UserError(
                f"{folder / 'config.json'} was changed by hand or damaged: its {f.name} is "
                f"{vars(policy.config)[f.name]!r}, but the run has trained {vars(c)[f.name]!r}"
            )
    if c.lora and method.answer_parts:  # the saved policy is merged, and these parts are not
        state = method.start(nr.add_adapters(Transformer.load(folder), c).to(c.device), c)
        state.policy = policy
    else:
        state = method.start(policy, c)
    if method.answer_parts:
        nr.load_state(folder, into={part: vars(state)[part] for part in method.answer_parts})
    return Trained(name, c, task, state, temperature)


def sample_command(argv: list[str]) -> int:
    """Print what a trained model answers, or talk with it."""
    parser = Parser(prog="train_small.py sample", allow_abbrev=False)
    parser.add_argument("run", type=Path)
    parser.add_argument("--loop", default="", help="default: the run's first")
    parser.add_argument("--seed", type=int, help="default: the run's first")
    parser.add_argument("--prompt", help="one problem; without it you type one after the other")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--cache", type=Path, help="folder of the base models (default: the run's)")
    a = parser.parse_args(argv)
    if a.temperature != 0:
        check_number("temperature", a.temperature)
    trained = open_trained(a.run, a.loop, a.seed, a.temperature)
    if a.prompt is None:
        return Conversation(a.run, a.cache or open_run(a.run).cache, trained).run()
    text = trained.answer(a.prompt)
    right = trained.task.grade(a.prompt, text)
    print(f"{a.prompt} {text}  {'right' if right else 'wrong'}")
    return 0


# Tokens are coloured by the first of these numbers that a method gives: blue from the first bound
# on, orange below the second one. The words say what that means.
COLOURS = {
    "sorm": (0.5, 0.5, "blue: a step that the SORM believes in; orange: one that it blames"),
    "sure": (0.9, 0.5, "blue: it was sure of the token when it wrote it; orange: it was not"),
    "logp": (-0.1, -0.7, "blue: a token that it finds likely (above 0.9); orange: below 0.5"),
    "token_rewards": (1e-9, 0.0, "blue: a token that the reward pays for; orange: one that costs"),
    "shift": (0.3, -0.3, "blue: a token that the training made likelier; orange: less likely"),
}
PLAIN = "\033[0m"
BLUE = "\033[1;94m"
ORANGE = "\033[38;5;208m"

HELP = """\
Type a problem, for example {example}
It is answered as before the training and as now. In a terminal the tokens have colours.
:loop NAME      another method of this run ({names})
:seed N         another seed
:temperature T  0 takes the likeliest token, {temperature:g} draws as in training
:quit           or Ctrl-D"""


class Conversation:
    """Problems are typed; the model answers as it did before its training, and as it does now."""

    def __init__(self, out: Path, cache: Path, trained: Trained):
        self.out = out
        self.cache = cache
        self.coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self.asks = sys.stdin is not None and sys.stdin.isatty()
        self.questions = 0
        # Of which colours it was said what they mean.
        self.explained: set[str] = set()
        self.switch_to(trained)

    def switch_to(self, trained: Trained) -> None:
        """Talk with this one from now on."""
        method = METHODS[trained.name]
        claim_cache(self.cache)
        train = CachedTrainer(self.cache)
        c, task = trained.c, trained.task
        base = nr.gpt_base(task, c, train)
        self.before = base
        if method.starts_from is not None:
            self.before = method.starts_from(base, task, c, train)
        if models := method.reward_models(base, task, c, train):
            trained.state.models = models
        if "reference" in vars(trained.state):
            trained.state.reference = nr.frozen_copy(self.before)
        if vars(c).get("judge") == "frozen":
            trained.state.judge = nr.frozen_copy(self.before)
        self.trained = trained
        self.example = task.prompts(1, nr.rng(trained.c.seed, "example"), "dev")[0]
        if "question" in dir(task):
            self.example = task.question(self.example)
        who = f"{trained.name}, seed {trained.c.seed}"
        print(f"{self.out}: {who}. Type a problem, for example {self.example} (:help tells more)")
        if note := getattr(task, "note", ""):
            print(note)

    def run(self) -> int:
        """Talk until there are no more lines: the exit code."""
        while True:
            try:
                line = input("> " if self.asks else "").strip()
            except (EOFError, RuntimeError):  # RuntimeError: there is no standard input
                if self.asks:
                    print()
                return 0
            except UnicodeDecodeError:
                print("error: this line is no text")
                continue
            except KeyboardInterrupt:
                print()
                raise
            if line in (":quit", ":q"):
                return 0
            try:
                self.handle(line)
            except UserError as error:  # one line, and the next problem
                print(f"error: {error}")
            sys.stdout.flush()

    def handle(self, line: str) -> None:
        """Do what a line asks for."""
        name, _, value = line.partition(" ")
        t = self.trained
        if not line:
            return
        if name == ":help":
            names = ", ".join(open_run(self.out).configs)
            print(HELP.format(example=self.example, names=names, temperature=t.c.temperature))
        elif name == ":loop":
            if not value:
                raise UserError(f":loop wants a method: {', '.join(open_run(self.out).configs)}")
            self.switch_to(open_trained(self.out, value.strip(), t.c.seed, t.temperature))
        elif name in (":seed", ":temperature"):
            try:
                number = float(value) if name == ":temperature" else int(value)
            except ValueError:
                raise UserError(f"{name} wants a number, not {value!r}") from None
            if name == ":seed":
                self.switch_to(open_trained(self.out, t.name, number, t.temperature))
                return
            if number != 0:
                check_number("temperature", number)
            t.temperature = number
        elif name.startswith(":"):
            raise UserError(f"there is no {name}; type :help for the commands")
        else:
            self.answer(line)

    def understood(self, line: str) -> str:
        """The problem that was typed. A missing end, as the `=`, or spaces are forgiven."""
        task = self.trained.task
        if "question" in dir(task):  # a question is typed without the solved ones before it
            try:
                return task.prompt(task.question(line))
            except ValueError as error:
                raise UserError(str(error)) from None
        joined = "".join(line.split())
        for text in (line, joined, joined + self.example[-1]):
            try:
                task.grade(text, "")
                return text
            except ValueError:
                continue
        return line

    def answer(self, line: str) -> None:
        """The answers of both to a problem, and the right way if one of them is wrong."""
        prompt = self.understood(line)
        t = self.trained
        # Sampled answers differ from one question to the next.
        self.questions += 1
        index = self.questions if t.temperature > 0 else 0
        now = t.answer(prompt, index)
        c = replace(t.c, temperature=t.temperature)
        [before] = nr.respond(self.before, t.task, [prompt], c, nr.rng(c.seed, "evaluate", index))
        right = [t.task.grade(prompt, text) == 1 for text in (before, now)]
        inside: dict[str, Any] = {}
        shown = before
        if not METHODS[t.name].writes_again:
            both = [before, now]
            first, inside = explained(t.state, METHODS[t.name], t.task, [prompt] * 2, both, t.c)
            shown = self.in_colours(before, first)
        elif t.temperature == 0:  # else it would write another answer than it gave
            [inside] = explained(t.state, METHODS[t.name], t.task, [prompt], [now], t.c)
        self.print_answer("before", shown, right[0])
        self.print_answer(t.name, self.in_colours(now, inside), right[1])
        for name in ("orm", "sorm"):
            if name in inside:
                numbers = "  ".join(f"{p:.2f}" for p in inside[name])
                print(f"{name.upper():15} {numbers}  (after each step, and after the answer)")
        if "judgements" in inside:
            print(f"{'its judge':15} {' '.join(inside['judgements'])}".replace("<eos>", ""))
        if not all(right) and "solution" in dir(t.task):
            self.print_answer("the right way", t.task.solution(prompt), None)
        kind = self.kind_of(inside)
        if self.coloured and kind and kind not in self.explained:
            print(f"{'':15} {COLOURS[kind][2]}")
            self.explained.add(kind)

    def print_answer(self, who: str, text: str, right: bool | None) -> None:
        """A line for each line of the text."""
        word = {None: "", True: "   right", False: "   wrong"}[right]
        lines = f"{text.replace('<eos>', '')}{word}".split("\n")
        for i, line in enumerate(lines):
            print(f"{who if i == 0 else '':15} {line}")

    def kind_of(self, inside: dict[str, Any]) -> str:
        """By which number the tokens are coloured; empty if there is none."""
        paid = inside.get("token_rewards", [])
        at_the_end = not any(paid[:-1])  # then the reward says nothing of single tokens
        kinds = [kind for kind in COLOURS if kind in inside]
        return next((x for x in kinds if not (at_the_end and x == "token_rewards")), "")

    def in_colours(self, text: str, inside: dict[str, Any]) -> str:
        """The tokens of the answer, coloured by what the reward says; plain text for a pipe."""
        kind = self.kind_of(inside)
        tokens = inside.get("tokens", [])
        if not self.coloured or not kind or "".join(tokens) != text:
            return text
        numbers = inside[kind]
        if kind == "sorm":
            numbers = []
            begin = 0
            for end, p in zip(inside["step_ends"], inside["sorm"], strict=True):
                numbers += [p] * (end - begin)
                begin = end
        high, low, _ = COLOURS[kind]
        painted = []
        for token, x in zip(tokens, numbers, strict=False):
            colour = BLUE if x >= high else ORANGE if x < low else ""
            painted.append(f"{colour}{token}{PLAIN}" if colour else token)
        return "".join(painted)


def plot_command(argv: list[str]) -> int:
    """Several runs on one picture."""
    parser = Parser(prog="train_small.py plot", allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--png", type=Path, default=Path("compare.png"))
    a = parser.parse_args(argv)
    if a.png.suffix.lower() not in PICTURES:
        raise UserError(f"--png {a.png} is no picture's name; it ends with {', '.join(PICTURES)}")
    draw_picture(a.runs, a.png)
    return 0


def report_command(argv: list[str]) -> int:
    """A page about one run, or about several side by side."""
    parser = Parser(prog="train_small.py report", allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--html", type=Path, help="default: RUN/report.html, or compare.html")
    a = parser.parse_args(argv)
    path = a.html or (a.runs[0] / PAGE if len(a.runs) == 1 else Path("compare.html"))
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--html {path} is no page's name; it ends with .html")
    write_page(a.runs, path)
    return 0


# The page of a run.
PAGE = "report.html"
# What a picture's name may end with. No other file of a run ends so.
PICTURES = (".png", ".svg", ".pdf", ".jpg", ".jpeg")
COMMANDS = {"sample": sample_command, "plot": plot_command, "report": report_command}


class Output(io.FileIO):
    """Standard output or error. If nobody reads it any more, the run goes on unheard.

    The reader of a pipe may leave, as `head` does, and a terminal may be closed.
    """

    def write(self, data: Any) -> int:
        """Write some bytes, or drop them: how many there were."""
        try:
            return super().write(data)
        except OSError:
            return len(data)


def prepare_output() -> None:
    """See to it that nothing that is printed can end a run.

    Characters that the terminal's encoding lacks become question marks.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by who started us
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif not isinstance(stream, io.TextIOWrapper):  # a notebook has its own
            continue
        elif os.name == "nt" and stream.isatty():  # a console of Windows is no file
            stream.reconfigure(errors="replace")
        else:
            raw = Output(stream.fileno(), "w", closefd=False)
            whole = raw if stream.write_through else io.BufferedWriter(raw)
            how = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
            setattr(sys, name, io.TextIOWrapper(whole, stream.encoding, "replace", **how))


def main(argv: list[str] | None = None) -> int:
    """Dispatch. Every UserError ends here as one line and exit code 2.

    argv: the words of the command line. Who gives them has one worker if they do not say otherwise.
    """
    alone = argv is not None
    argv = sys.argv[1:] if argv is None else argv
    try:
        if workers.is_worker():
            raise UserError(
                "a script that starts a run must call main() under `if __name__ == "
                '"__main__":`, or be started with --workers 1'
            )
        if argv and argv[0] in COMMANDS:
            return COMMANDS[argv[0]](argv[1:])
        return train_command(argv, alone)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        message = in_a_line(error)
        if not message:
            raise
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    prepare_output()
    sys.exit(main())
