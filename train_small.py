"""The front door: builds the base models, drives the loops you name, prints a table, draws a picture.

    python train_small.py                               the tour: every loop
    python train_small.py ppo --arm grpo --seeds 5      one loop, five seeds, mean and interval
    python train_small.py --resume runs/x
    python train_small.py sample runs/x --loop ppo --prompt "3+4-5="
    python train_small.py plot runs/x runs/y
Every Config field is a flag. Exit: 0 done, 1 missed --target, 2 a mistake (one line says which), 130 Ctrl-C (saved).
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from tqdm import tqdm

import nanoreward as nr
from data import arithmetic, gsm8k, sudoku
from nanoreward import LOOPS, Config, Transformer, UserError

T95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]  # Student's t, two-sided, n = 2..10
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanoreward"
HEALTHY = """\
what to watch: reward and truth rise together (only reward: it is being fooled) · kl: a few nats a response ·
entropy falls slowly, not to 0 at once · clipfrac < 0.2 · ended near 1 · flat_groups < 1, or grpo and rloo learn
nothing · pairs: hundreds a round · chosen does not fall, pair_accuracy rises · score rises with dev, not alone ·
orm, sorm: labels of steps that they know, 0.5 is nothing · with centred advantages a loss near 0 is no fault"""
SEEN = "reward truth score kl entropy clipfrac ended flat_groups pairs chosen rejected pair_accuracy orm sorm".split()

# ---- the call: flags, checks, one line for a mistake -------------------------------------------
class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line through the same door as every other mistake."""
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (python train_small.py --help lists what there is)")
def true_or_false(text: str) -> bool:  # its name is what argparse shows on a mistake
    return ["false", "true"].index(text.lower()) == 1
FLAG_TYPES = {"int": int, "float": float, "str": str, "bool": true_or_false}
def build_parser() -> Parser:
    """The flags of a training run."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="train_small.py", description=__doc__, allow_abbrev=False, formatter_class=shape)
    parser.add_argument("loops", nargs="*", metavar="LOOP", help=f"any of {', '.join(LOOPS)}; none: all")
    parser.add_argument("--config", default="laptop", help=f"one of {', '.join(nr.CONFIGS)}")
    parser.add_argument("--out", type=Path, help="folder of the run (default: runs/LOOP-1, -2, ...)")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the base models")
    parser.add_argument("--seeds", type=int, default=1, help="repeat with seed, seed+1, ...")
    parser.add_argument("--target", action="append", default=[], metavar="LOOP=X", help="exit 1 if missed")
    parser.add_argument("--resume", type=Path, help="go on with the run in this folder")
    for f in fields(Config):
        flag = "--" + f.name.replace("_", "-")
        parser.add_argument(flag, dest="field_" + f.name, type=FLAG_TYPES[f.type], metavar=f.type.upper())
    return parser
TASKS = {"arithmetic": arithmetic, "sudoku": sudoku, "gsm8k": gsm8k}
ANY_SIGN = {"no_eos", "gamma", "lam", "pad", "bos", "eos", "mask"}  # these have rules of their own
MAY_BE_ZERO = ("value_clip value_coef beta kl_target seed alpha judging posing least c_pos c_neg rewriter_beta "
               "earliest latest process_weight hide_prompt look_ahead muon_lr diffusion_muon_lr").split()
CHOICES = {"arm": nr.ARMS, "reward": nr.SIGNALS, "preference": nr.PREFERENCES, "judge": ("own", "frozen"),
           "planted": ("none", "round", "long", "refusal"), "credit": nr.CREDITS, "task": TASKS}
def check(c: Config) -> None:
    """Refuse, before any work, what could only fail or mislead later."""
    for f in fields(Config):
        value, flag = getattr(c, f.name), "--" + f.name.replace("_", "-")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{flag} must be a finite number, not {value}")
        signed = f.type in ("int", "float") and f.name not in ANY_SIGN
        if signed and (value < 0 or (value == 0 and f.name not in MAY_BE_ZERO)):
            raise UserError(f"{flag} must be {'0 or more' if f.name in MAY_BE_ZERO else 'above 0'}, not {value}")
        if f.name in CHOICES and value not in CHOICES[f.name]:
            raise UserError(f"{flag} must be one of {', '.join(CHOICES[f.name])}, not {value!r}")
    rules = [
        *TASKS[c.task].rules(c),
        (c.heads % c.kv_heads == 0, "--heads must be a multiple of --kv-heads"),
        (c.head_dim % 2 == 0, "--head-dim must be even (rotary pairs)"),
        (c.samples > 1 or c.arm == "gae", f"--arm {c.arm} compares samples of one prompt: --samples 2 or more"),
        (0 <= c.gamma <= 1 and 0 <= c.lam <= 1, "--gamma and --lam must lie in 0..1"),
        (min(c.temperature, c.late_temperature) >= 0.01, "a temperature must be at least 0.01: log-probs overflow"),
        (c.kl_target == 0 or c.kl_horizon > 0.2 * c.prompts * c.samples, "--kl-horizon must exceed 0.2 * rollouts"),
        (c.judging + c.posing <= 1, "--judging and --posing are shares of the seed data: at most 1 together"),
        (max(c.t_min, c.look_ahead, c.hide_prompt) <= 1, "--t-min, --look-ahead --hide-prompt: shares, at most 1"),
        (c.earliest <= c.latest <= 1, "--earliest and --latest are shares of the steps, in this order"),
        (c.candidates > 1, "--candidates must be at least 2: the best is set against the worst"),
        (c.threshold < 1 and c.least < 1, "--threshold and --least are probabilities: below 1"),
        (c.causal, "--causal false: a loop chooses its model; denoise takes the masked-diffusion LM"),
        (c.kl_target == 0 or c.beta > 0, "--kl-target adapts beta by factors: give it a --beta above 0")]
    if broken := [message for holds, message in rules if not holds]:
        raise UserError(broken[0])
def pick_device(name: str) -> str:
    """auto -> cuda or cpu; a device that is not there is a UserError."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, TypeError):
        raise UserError(f"--device {name} is not here; try --device cpu") from None
    return name
def parse_targets(texts: list[str], loops: list[str]) -> dict[str, float]:
    """["ppo=0.8"] -> {"ppo": 0.8}."""
    targets = {}
    for text in texts:
        name, _, number = text.partition("=")
        if name not in loops or not number.replace(".", "", 1).isdecimal() or not 0 <= float(number) <= 1:
            raise UserError(f"--target {text}: write a loop of this run and a number in 0..1, as {loops[0]}=0.8")
        targets[name] = float(number)
    return targets

# ---- the run: a folder that says all -----------------------------------------------------------
@dataclass
class Run:
    """One --out folder: config.json, metrics.jsonl, samples.jsonl, summary.json, state/, PNG."""
    out: Path
    config: Config
    preset: str
    loops: list[str]
    seeds: int
    targets: dict[str, float]
    cache: Path
    done: list[dict] = field(default_factory=list)  # finished jobs, as in summary.json
    job: str = ""  # "ppo/0": loop and seed of the job whose state is saved
    saved_update: int = 0
    def about(self) -> dict[str, Any]:
        """config.json: all that decides the run's numbers."""
        return {"config": asdict(self.config)} | {k: getattr(self, k) for k in "preset loops seeds targets".split()}
    @property
    def finished(self) -> bool:
        return len(self.done) == len(self.loops) * self.seeds
def read_json(path: Path, parse: Callable[[str], Any] = json.loads) -> Any:
    """A JSON file of a run folder, or a UserError that names it."""
    try:
        return parse(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); is {path.parent} the folder of a run?") from None
def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a .jsonl; a torn last one is left out."""
    return read_json(path, lambda text: [json.loads(x) for x in text.splitlines() if x.endswith("}")])
def write_text(path: Path, text: str) -> None:
    """The whole file or none of it."""
    nr.write_whole(path, lambda temporary: temporary.write_text(text))
def new_run(a: argparse.Namespace) -> Run:
    """Check everything, then claim the folder."""
    loops = list(dict.fromkeys(a.loops or LOOPS))
    if unknown := [name for name in loops if name not in LOOPS]:
        raise UserError(f"no loop is called {unknown[0]!r}; there are {', '.join(LOOPS)}, and sample and plot")
    if a.config not in nr.CONFIGS:
        raise UserError(f"no config is called {a.config!r}; there are {', '.join(nr.CONFIGS)}")
    if not 1 <= a.seeds <= len(T95) + 1:
        raise UserError(f"--seeds must lie in 1..{len(T95) + 1}")
    given = {f.name: getattr(a, "field_" + f.name) for f in fields(Config)}
    config = replace(Config(), **nr.CONFIGS[a.config] | {k: v for k, v in given.items() if v is not None})
    if config.model:  # whatever is wrong with the folder is said now
        theirs = Transformer.load(config.model).config
        config = replace(config, **{name: getattr(theirs, name) for name in [*nr.HF_KEYS, "rope_scaling"]})
    check(config)
    config = replace(config, device=pick_device(config.device))
    free = (Path("runs") / f"{'-'.join(a.loops) or 'tour'}-{i}" for i in range(1, 10**6))
    out = a.out or next(path for path in free if not path.exists())
    run = Run(out, config, a.config, loops, a.seeds, parse_targets(a.target, loops), a.cache)
    for folder in (out, a.cache):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()  # may we write there?
        except OSError as error:
            raise UserError(f"cannot write to {folder} ({error.strerror}); choose another folder") from None
    if (out / "config.json").exists():
        if read_json(out / "config.json") | {"targets": None} != run.about() | {"targets": None}:
            raise UserError(f"{out} holds a run with another config; choose another --out")
        return replace(open_run(out, a.cache), targets=run.targets)
    if any(path.suffix != ".tmp" for path in out.iterdir()):
        raise UserError(f"{out} is not empty and not a run's folder; choose another --out")
    write_text(out / "config.json", json.dumps(run.about(), indent=1))
    return run
def open_run(out: Path, cache: Path) -> Run:
    """The run in this folder as far as it went; a damaged folder is a UserError."""
    a = read_json(out / "config.json")
    try:
        run = Run(out, Config(**a["config"]), a["preset"], a["loops"], a["seeds"], a["targets"], cache)
    except (KeyError, TypeError) as error:
        raise UserError(f"{out / 'config.json'} is not a config of this version ({error})") from None
    check(run.config)
    if (out / "summary.json").exists():
        run.done = read_json(out / "summary.json")["results"]
    if (out / "state" / "state.pt").exists() and not run.finished:
        saved = nr.load_state(out / "state")
        run.job, run.saved_update = saved.get("job", ""), saved.get("update", 0)
    return run
def cut_log(path: Path, run: Run) -> float:
    """Drop the lines behind the saved state, and say how many seconds the kept part took."""
    if not path.exists():
        return 0.0
    job = lambda line: f"{line['loop']}/{line['seed']}"  # noqa: E731
    finished = set(map(job, run.done))
    saved = lambda line: job(line) == run.job and line["step"] <= run.saved_update  # noqa: E731
    kept = [line for line in read_lines(path) if job(line) in finished or saved(line)]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
    return kept[-1].get("seconds", 0.0) if kept and job(kept[-1]) not in finished else 0.0
def append(path: Path, line: dict[str, Any]) -> None:
    """One JSON line; what is not a finite number becomes null."""
    silent = dist.is_initialized() and dist.get_rank() > 0
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
    with Path(os.devnull if silent else path).open("a") as f:
        f.write(json.dumps(clean) + "\n")
def drive(loop: Iterator[dict], state: dict, total: int, folder: Path, title: str, every: int, log: Callable) -> None:
    """Run a loop or fit to its end: bar, log, states. Ctrl-C is heard between two updates; a second one at once."""
    asked = []
    def ask(*_: Any) -> None:
        asked.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.signal(signal.SIGINT, ask)
    try:
        with tqdm(total=total, initial=state["update"], desc=title, disable=None, leave=False) as bar:
            for metrics in loop:
                log(metrics)
                bar.update()
                stop = nr.over_ranks(torch.tensor(len(asked))) > 0  # all processes leave together
                if state["update"] % every == 0 or stop:
                    nr.save_state(folder, state)
                if stop:
                    raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, before)

# ---- base models, cached -----------------------------------------------------------------------
def code_key(root: str) -> tuple[str, set[str]]:
    """Hash of all code here and in nanoreward.py that `root` reaches, without docstrings, and the fields it reads."""
    trees = [ast.parse(Path(module).read_text()) for module in (nr.__file__, __file__)]
    known = {n.name: n for t in trees for n in t.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    reached, todo, read = set(), [root, "fit", "optimizers"], set()
    while todo:
        if (name := todo.pop()) in reached or name not in known or name in ("Config", "cached"):
            continue
        reached.add(name)
        for node in ast.walk(known[name]):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
                node.body = node.body[1:] or [ast.Pass()]
            owner = ast.unparse(node.value).split(".")[-1] if isinstance(node, ast.Attribute) else ""
            if isinstance(node, ast.Name) or owner == "nr":
                todo.append(node.id if isinstance(node, ast.Name) else node.attr)
            elif owner in ("c", "config"):
                read.add(node.attr)
    code = "".join(ast.dump(known[name]) for name in sorted(reached))
    return hashlib.sha256(code.encode()).hexdigest(), read & {f.name for f in fields(Config)}
def cached(kind: str, root: str, c: Config, cache: Path, modules: list, batches: Callable, updates: int, lr: float,
           muon_lr: float = 0.0) -> list[torch.nn.Module]:
    """The modules, trained by `fit` once, then loaded; the key: the code and fields behind `root`, task and torch."""
    code, read = code_key(root)
    values = {name: getattr(c, name) for name in sorted(read | {"threads"})} | {"of": repr(make_task(c))}
    data = hashlib.sha256(Path(TASKS[c.task].__file__).read_bytes()).hexdigest()
    key = hashlib.sha256(json.dumps([code, values, data, torch.__version__]).encode()).hexdigest()
    folder = cache / f"{kind}-{key[:16]}"
    state = {"modules": modules, "optimizers": nr.optimizers(modules, lr, c, muon_lr), "update": 0}
    state = nr.load_state(folder, into=state) if (folder / "state.pt").exists() else state
    if state["update"] < updates:
        folder.mkdir(parents=True, exist_ok=True)
        past = read_lines(folder / "fit.jsonl") if state["update"] else []  # of a training that was stopped
        write_text(folder / "fit.jsonl", "".join(json.dumps(m) + "\n" for m in past if m["step"] <= state["update"]))
        print(f"training {kind} ({sum(p.numel() for p in modules[0].parameters()):,} parameters) -> {folder}")
        began = time.time()
        def log(m: dict[str, Any]) -> None:
            append(folder / "fit.jsonl", {"step": state["update"], "seconds": round(time.time() - began, 3), **m})
        drive(nr.fit(state, batches(), updates, c), state, updates, folder, kind, max(1, updates // 10), log)
        nr.save_state(folder, state)
    return [module.requires_grad_(True) for module in modules]
def make_task(c: Config, careful: bool = False) -> nr.Task:
    """The task that the config names, and its careful demonstrator."""
    return TASKS[c.task].make(c, careful)
def ready(model: Transformer, c: Config) -> Transformer:
    """The model on its device, computing as the config says."""
    bf16 = c.bf16 and (c.device == "cpu" or torch.cuda.is_bf16_supported())  # [gpu] older cards have none
    model.config = replace(model.config, bf16=bf16, recompute=c.recompute)
    for layer in model.layers if c.compile else []:
        layer.compile()  # [gpu]
    return model.to(c.device)
def base_model(c: Config, cache: Path, careful: bool = False) -> Transformer:
    """The model of the folder that is named, or the GPT after the demonstrator; careful: after its careful twin."""
    if c.model:
        return ready(Transformer.load(c.model), c)
    model, task = ready(Transformer(c, nr.rng(c.seed, "init")), c), make_task(c, careful)
    kind, batches = "careful-gpt" if careful else "gpt", lambda: nr.demonstrations(model, task, c)
    return cached(kind, "base_model", c, cache, [model], batches, c.base_updates, c.base_lr, c.muon_lr)[0]
def diffusion_base(c: Config, cache: Path, careful: bool = False) -> Transformer:
    """The masked-diffusion LM: the base GPT's weights, taught to look ahead on the same demonstrations."""
    task, both = make_task(c, careful), replace(c, causal=False, vocab=max(c.vocab, c.mask + 1))  # a row for MASK
    model = ready(Transformer(both, nr.rng(c.seed, "init")), c)
    if c.look_ahead:  # else from scratch
        weights, mine = (m.state_dict() for m in (base_model(c, cache, careful), model))
        more = lambda x: torch.cat([x, x.mean(0, keepdim=True)])  # noqa: E731
        model.load_state_dict({k: x if len(x) == len(mine[k]) else more(x) for k, x in weights.items()})
    c = both
    kind, rates = "careful-diffusion" if careful else "diffusion", (c.diffusion_lr, c.diffusion_muon_lr)
    batches = lambda: nr.demonstrations(model, task, c)  # noqa: E731
    return cached(kind, "diffusion_base", c, cache, [model], batches, c.diffusion_updates, *rates)[0]
def seed_data(task: nr.Task, c: Config) -> list[tuple[str, str]]:
    """What makes M1: judgements (EFT), proposed problems, and demonstrations again (IFT)."""
    generator = nr.rng(c.seed, "seed data")
    kinds = torch.rand(c.seed_demos, generator=generator).tolist()
    other = lambda k: task.propose_demo if k > 1 - c.posing else task.demo  # noqa: E731
    return [(task.judge_demo if k < c.judging else other(k))(generator) for k in kinds]
def seed_model(c: Config, cache: Path) -> Transformer:
    """M1 of self_rewarding: the base, which has also learned to judge and to pose problems."""
    model, task = base_model(c, cache), make_task(c)
    batches = lambda: nr.demonstrations(model, task, c, nr.encode_demos(task, seed_data(task, c), c))  # noqa: E731
    return cached("m1", "seed_model", c, cache, [model], batches, c.seed_updates, c.base_lr, c.muon_lr)[0]
def student_model(c: Config, cache: Path) -> Transformer:
    """refine's student: the base after one round of expert iteration, small enough to leave a third wrong."""
    model, task, c = base_model(c, cache), make_task(c), replace(c, base_warmup=c.warmup)
    def right() -> nr.Batches:
        prompt, group = nr.in_groups(task, task.prompts(c.expert_prompts, nr.rng(c.seed, "expert")), c)
        b = nr.sample(model, prompt.to(c.device), c, group=group, generator=nr.rng(c.seed, "expert", 1))
        pairs = zip(*(x[nr.grades(task, b) == 1].tolist() for x in (b.prompt, b.response)), strict=True)
        known = [[[i for i in ids if i != c.pad] for ids in pair] for pair in pairs]
        return nr.demonstrations(model, task, c, [x for i, x in enumerate(known) if x not in known[:i]])
    return cached("student", "student_model", c, cache, [model], right, c.expert_updates, c.expert_lr)[0]
def rewriter_model(c: Config, cache: Path) -> Transformer:
    """The reward of seq2seq: the base, taught to rewrite both responses of each pair as the preferred one."""
    model, task = base_model(c, cache), make_task(c)
    pairs = lambda: task.preferences(c.pairs, nr.rng(c.seed, "preferences"))  # noqa: E731
    batches = lambda: nr.demonstrations(model, task, c, nr.rewriting_demos(task, pairs(), c))  # noqa: E731
    made = cached("rewriter", "rewriter_model", c, cache, [model], batches, c.rewriter_updates, c.base_lr, c.muon_lr)
    return made[0].requires_grad_(False)
def scorer_model(c: Config, cache: Path) -> dict[str, torch.nn.Module]:
    """The learned reward: a Bradley-Terry model that starts as the base and reads preference pairs."""
    base, task = base_model(c, cache), make_task(c)
    head = nr.Head(c, (c.width + 1) ** -0.5, nr.rng(c.seed, "scorer")).to(c.device)
    pairs = lambda: task.preferences(c.pairs, nr.rng(c.seed, "preferences"))  # noqa: E731
    batches = lambda: nr.preference_batches(base, head, pairs(), task, c)  # noqa: E731
    scorer, head = cached("scorer", "scorer_model", c, cache, [base, head], batches, c.reward_updates, c.reward_lr)
    prompt = nr.encode_prompts(task, task.prompts(512, nr.rng(c.seed, "normalize")), c).to(c.device)
    rollout = nr.sample(base_model(c, cache), prompt, c, generator=nr.rng(c.seed, "normalize", 1))
    nr.normalize_head(scorer, head, rollout)
    return {"scorer": scorer.requires_grad_(False), "scorer_head": head.requires_grad_(False)}

# ---- one job: one loop with one seed -----------------------------------------------------------
STARTS = {"self_rewarding": seed_model, "refine": student_model, "denoise": diffusion_base}  # if not from the base
REFINERS = ("scorer", "orm", "sorm", "global", "local")
def reward_models(name: str, c: Config, cache: Path) -> dict[str, Any]:
    """What the loop's reward needs in its state."""
    reward = {"ppo": c.reward, "seq2seq": "seq2seq"}.get(name)
    if reward == "seq2seq":
        return {"rewriter": rewriter_model(c, cache)}
    return scorer_model(c, cache) if reward == "learned" else {}
def write(name: str, state: dict, task: nr.Task, prompts: list[str], c: Config, T: float = 0.0) -> list[str]:
    """One response a problem by what the loop has trained."""
    c, generator = replace(c, temperature=T), nr.rng(c.seed, "evaluate")
    if name == "refine":
        return nr.refined(state, task, prompts, c, generator)
    return nr.respond(state["policy"], task, prompts, c, generator)
@torch.no_grad()
def trajectory(state: dict, task: nr.Task, b: nr.Rollout, c: Config) -> tuple[torch.Tensor, ...]:
    """How a diffusion LM wrote its responses (B, R): how sure it was of each token when it wrote it (B, R), what it
    would have written at once before each step (B, S, R), and V(x_t) of that state by branches (B, S)."""
    B, S, policy = len(b.order), int(b.order.max()) + 1, state["policy"]
    row, t = (x.flatten().to(c.device) for x in torch.meshgrid(torch.arange(B), torch.arange(S), indexing="ij"))
    canvas = nr.state_at(b.response[row], b.order[row], t, c)
    logp = nr.log_softmax(policy.lm_head(nr.predictive_states(policy, b.prompt[row], canvas)), 1.0, c)
    said = torch.where(canvas == c.mask, logp.argmax(-1), canvas).view(B, S, -1)
    sure = logp.gather(-1, b.response[row][..., None]).view(B, S, -1).gather(1, b.order[:, None])[:, 0].exp()
    more = nr.go_on(policy, b[row], t, c.branches, c, nr.rng(c.seed, "trajectory", state["update"]))
    return sure, said, nr.verifier(state, task, more, nr.grades(task, more), c).sum(1).view(B, S, -1).mean(2)
@torch.no_grad()
def inside(name: str, state: dict, task: nr.Task, prompts: list[str], texts: list[str], c: Config) -> list[dict]:
    """What the reward says within each response: of every token, of every step (ORM and SORM), of every state."""
    prompt = nr.encode_prompts(task, prompts, c).to(c.device)
    response = nr.right_pad([y[: c.response] for y in task.encode(texts)], c.pad, c.response).to(c.device)
    b = nr.Rollout(prompt, response, nr.up_to_eos(response, c), response, torch.arange(len(texts)))
    rounded = lambda x: [round(v, 3) for v in x.tolist()]  # noqa: E731
    if name == "denoise":  # greedy: the same responses again, now with their order
        b = nr.sample(state["policy"], prompt, replace(c, temperature=0.0))
        sure, said, value = trajectory(state, task, b, c)
        return [{"order": o.tolist(), "sure": rounded(p), "said": [task.decode(y) for y in s.tolist()],
                 "value": rounded(v)} for o, p, s, v in zip(b.order, sure, said, value, strict=True)]  # fmt: skip
    if name == "refine":
        ends = nr.prefix_ends(task, b)
        scores = nr.step_scores(state, prompt, response, ends).sigmoid()
        return [{"orm": rounded(o[e > 0]), "sorm": rounded(s[e > 0])} for o, s, e in zip(*scores, ends, strict=True)]
    if name not in ("ppo", "seq2seq"):
        return [{} for _ in texts]
    reward = nr.SIGNALS["seq2seq" if name == "seq2seq" else c.reward](state, task, b, nr.grades(task, b), c)
    return [{"token_rewards": rounded(r[m > 0])} for r, m in zip(reward, b.mask, strict=True)]
def notes(m: dict[str, Any], c: Config) -> dict[str, str]:
    """What a person should be told about an update, in plain words; each is said once."""
    m = dict(flat_groups=0, ended=1, kl=0, entropy=1, pairs=1, chosen_per_token=0, spread=1, quoted=0, unread=0) | m
    found = {
        "flat": (m["flat_groups"] == 1 and c.arm != "gae", "equal rewards in every group, nothing to learn from"),
        "eos": (m["ended"] == 0, "no response ends with EOS (a larger --response, more --base-updates?)"),
        "kl": (m["kl"] > 20, f"KL runs away, {m['kl']:.0f} nats a response (a larger --beta, a smaller --lr?)"),
        "entropy": (m["entropy"] < 1e-3, "all samples are the same, nothing new can be found (a smaller --lr?)"),
        "pairs": (m["pairs"] == 0, "no problem has a better and a worse response, the round teaches nothing"),
        "judge": (m["spread"] == 0 or m["unread"] > 0.5, "the judge says one score to everything, or none"),
        "quoted": (m["quoted"] > 0.05, "responses hold a score themselves: they talk to the judge"),
        "chosen": (m["chosen_per_token"] < -1, "the chosen log-prob falls below -1 a token (a larger --alpha?)")}
    return {name: text for name, (holds, text) in found.items() if holds}
def run_job(run: Run, name: str, seed: int) -> dict[str, Any]:
    """Train, measure, and describe one loop with one seed; what it returns is its summary entry."""
    c, job, out, few = replace(run.config, seed=seed), f"{name}/{seed}", run.out, 1 if name == "denoise" else 3
    task, policy = make_task(c), base_model(c, run.cache)
    dev, test = (task.prompts(c.eval_problems, nr.rng(0, s), s) for s in ("dev", "test"))  # the same for all seeds
    base, base_sampled = (nr.accuracy(policy, task, test, c, T) for T in (0.0, c.temperature))
    result = {"loop": name, "seed": seed, "chance": task.chance(), "base": base, "base_sampled": base_sampled}
    print("{loop}/{seed}: base {base:.3f} greedy, {base_sampled:.3f} sampled".format(**result), flush=True)
    if name in STARTS:
        policy = STARTS[name](c, run.cache)
        result["start"] = nr.accuracy(policy, task, test, c)  # M1 or the student, not the base
    start, loop = LOOPS[name]
    state = start(policy, c) | reward_models(name, c, run.cache) | {"result": result}
    state = nr.load_state(out / "state", into=state) if run.job == job else state
    state["job"], result = job, state["result"]
    offset, began, told = cut_log(out / "metrics.jsonl", run), time.time(), set()
    cut_log(out / "samples.jsonl", run)
    def right(prompts: list[str], T: float = 0.0) -> float:
        texts = write(name, state, task, prompts, c, T)
        return mean(task.grade(x, y) for x, y in zip(prompts, texts, strict=True))
    def show(u: int) -> None:  # few right and few wrong ones of 32 greedy responses; denoise's V(x_t) costs branches
        texts = write(name, state, task, dev[:32], c)
        both = [{"prompt": x, "response": y, "reward": task.grade(x, y)} for x, y in zip(dev, texts, strict=False)]
        both = [t for t in both if t["reward"] == 1][:few] + [t for t in both if t["reward"] < 1][:few]
        more = inside(name, state, task, [t["prompt"] for t in both], [t["response"] for t in both], c)
        for t, x in zip(both, more, strict=True):
            append(out / "samples.jsonl", {"loop": name, "seed": seed, "step": u, **t, **x})
    def log(m: dict[str, Any]) -> None:
        u = state["update"]
        line = {"loop": name, "seed": seed, "step": u, "seconds": round(offset + time.time() - began, 3), **m}
        if u % max(c.eval_every, state["updates"] // 8) == 0 or u in (1, state["updates"]):
            line["dev_greedy"] = right(dev)
            show(u)
            numbers = "  ".join(f"{k} {m[k]:.3f}" for k in SEEN if k in m)
            tqdm.write(f"{job} {u:4d}  dev {line['dev_greedy']:.3f}  {numbers}")
        for warning, text in notes(m, c).items():
            if warning not in told:
                tqdm.write(f"{job} {u:4d}  note: {text}")
            told.add(warning)
        append(out / "metrics.jsonl", line)
    if state["update"] == 0:
        show(0)
    drive(loop(state, task, c), state, state["updates"], out / "state", job, c.save_every, log)
    policy.save(out / "models" / f"{name}-{seed}")
    if name == "refine":
        nr.save_state(out / "models" / f"{name}-{seed}", {k: state[k] for k in REFINERS})
    mine = [m for m in read_lines(out / "metrics.jsonl") if (m["loop"], m["seed"]) == (name, seed)]
    enough = [m["samples"] for m in mine if m.get("dev_greedy", 0) >= 0.8]
    result |= {"final": right(test), "final_sampled": right(test, c.temperature)}
    result |= {"samples": state["samples"], "samples_to_80": next(iter(enough), None), "updates": state["updates"]}
    result["seconds"] = round(offset + time.time() - began, 1)
    return result | ({} if c.model else {"ceiling": nr.accuracy(base_model(c, run.cache, True), task, test, c)})

# ---- what a person sees at the end -------------------------------------------------------------
def half_width(values: list[float]) -> float:
    """Of the 95 % interval of a mean over seeds (Student's t); at least two."""
    return T95[len(values) - 2] * stdev(values) / len(values) ** 0.5
def interval(values: list[float]) -> str:
    """Mean and 95 % interval over seeds; one seed: the number alone."""
    return f"{mean(values):.3f}" + (f" ± {half_width(values):.3f}" if len(values) > 1 else "")
def table(results: list[dict[str, Any]]) -> str:
    """The table at the end: greedy and sampled accuracy on held-out test problems."""
    one = list({r["seed"]: r for r in reversed(results)}.values())
    over = lambda rs, key: interval([r[key] for r in rs])  # noqa: E731
    rows = [("", "start", "greedy", "sampled", "gain (paired)", "samples", "to 80 %", "seconds"),
            ("chance", "", f"{one[0]['chance']:.3f}"), ("base", "", over(one, "base"), over(one, "base_sampled"))]
    for name in dict.fromkeys(r["loop"] for r in results):
        mine = [{"start": r["base"]} | r for r in results if r["loop"] == name]
        drawn, reached, seconds = ([r[key] for r in mine] for key in ("samples", "samples_to_80", "seconds"))
        rows += [(name, *(over(mine, key) for key in ("start", "final", "final_sampled")),
                  interval([r["final"] - r["start"] for r in mine]), f"{mean(drawn):.0f}",
                  "never" if None in reached else f"{mean(reached):.0f}", f"{mean(seconds):.0f}")]  # fmt: skip
    rows += [("careful twin", "", over(one, "ceiling"))] if "ceiling" in one[0] else []
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
def picture(runs: list[Path], path: Path) -> None:
    """Dev accuracy by update, a panel a loop: the mean over seeds in a band that holds them all; one PNG."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("no picture: matplotlib is missing (pip install matplotlib)")
    panels: dict[str, dict[Path, dict[int, list[float]]]] = {}  # loop -> run -> update -> accuracy, a number a seed
    for folder, m in [(run, m) for run in runs for m in read_lines(run / "metrics.jsonl")]:
        if "dev_greedy" in m:
            line = panels.setdefault(m["loop"], {}).setdefault(folder, {})
            line.setdefault(m["step"], []).append(m["dev_greedy"])
    done = len(runs) == 1 and (runs[0] / "summary.json").exists()
    results = read_json(runs[0] / "summary.json")["results"] if done else []
    columns, rows = min(3, len(panels)) or 1, -(-len(panels) // 3) or 1
    figure = Figure(figsize=(1 + 3 * columns, 0.6 + 2.4 * rows), layout="tight")
    for axes, (loop, lines) in zip(figure.subplots(rows, columns, squeeze=False).flat, panels.items(), strict=False):
        for i, (folder, line) in enumerate(lines.items()):
            x = [u for u, ys in line.items() if len(ys) == max(map(len, line.values()))]  # all seeds came so far
            low, middle, high = ([f(line[u]) for u in x] for f in (min, mean, max))
            axes.fill_between(x, low, high, color=f"C{i}", alpha=0.25, lw=0)
            axes.plot(x, middle, color=f"C{i}", lw=2, label=folder)
        mine = [r for r in results if r["loop"] == loop]
        for what in (what for what in ("chance", "base", "start", "ceiling") if mine and what in mine[0]):
            level, side = mean(r[what] for r in mine), "top" if what == "start" else "bottom"
            axes.axhline(level, color="0.5", lw=0.8, ls="--")
            axes.text(0.98, level, what, transform=axes.get_yaxis_transform(), ha="right", va=side, color="0.4")
        axes.set(title=loop, xlabel="update", ylabel="greedy accuracy (dev)", ylim=(0, 1.12))
        axes.legend(frameon=False, loc="lower right").set_visible(len(runs) > 1)  # one run needs no name
    nr.write_whole(path, lambda p: figure.savefig(p, format="png", dpi=150))
    print(f"picture: {path}")

def join() -> None:
    """Become one of the processes of torchrun: all compute, the first one writes and speaks."""
    if cuda := torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # [gpu]
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    if dist.get_rank() > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
def train(a: argparse.Namespace) -> int:
    """The main job."""
    if a.resume and (a.loops or a.out or a.target or any(v is not None for k, v in vars(a).items() if "field_" in k)):
        raise UserError("--resume takes all numbers from its folder: give no loop, flag or target with it")
    rank = int(os.environ.get("RANK", -1))  # of a process of torchrun
    if rank >= 0 and not (a.out or a.resume):
        raise UserError("under torchrun give --out FOLDER: all processes work on one run")
    if rank > 0:
        join()  # waits until the first process has the folder
    run = open_run(a.resume, a.cache) if a.resume else new_run(a)
    if rank == 0:
        join()
    pick_device(run.config.device)
    if run.finished:
        print(f"{run.out} is finished; nothing to do. Its table:\n{table(run.done)}")
        return verdict(run)
    torch.set_num_threads(run.config.threads)
    torch.set_float32_matmul_precision("high")  # [gpu] logits by TF32; nothing changes on a CPU
    beside = {"config": run.preset, "threads": run.config.threads, "torch": torch.__version__}
    beside["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
    print(f"run {run.out} · base models {run.cache} · {beside}\n{HEALTHY}", flush=True)
    try:
        jobs = [(name, run.config.seed + i) for i in range(run.seeds) for name in run.loops]
        for name, seed in jobs[len(run.done) :]:
            run.done.append(run_job(run, name, seed))
            write_text(run.out / "summary.json", json.dumps(beside | {"results": run.done}, indent=1))
    except KeyboardInterrupt:
        print(f"\nstopped; go on with: python train_small.py --resume {run.out} --cache {run.cache}")
        return 130
    print(table(run.done))
    picture([run.out], run.out / "curves.png")
    return verdict(run)
def verdict(run: Run) -> int:
    """Exit code of the targets: 1 if one was missed."""
    got = {name: mean(r["final"] for r in run.done if r["loop"] == name) for name in run.targets}
    for name, target in run.targets.items():
        print(f"target {name} {target}: {'reached' if got[name] >= target else 'MISSED'} with {got[name]:.3f}")
    return int(any(got[name] < target for name, target in run.targets.items()))
def sample_command(argv: list[str]) -> None:
    """Print what a trained model answers."""
    parser = Parser(prog="train_small.py sample", allow_abbrev=False)
    parser.add_argument("run", type=Path)
    parser.add_argument("--loop", default="", help="default: the run's first")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    a = parser.parse_args(argv)
    run = open_run(a.run, CACHE)
    name, seed = a.loop or run.loops[0], run.config.seed if a.seed is None else a.seed
    folder = a.run / "models" / f"{name}-{seed}"
    if not folder.exists():
        raise UserError(f"{folder} does not exist: that loop and seed has not finished in this run")
    if not 0 <= a.temperature < math.inf:
        raise UserError("--temperature must be 0 or more")
    c, task = replace(run.config, seed=seed), make_task(run.config)
    state = LOOPS[name][0](Transformer.load(folder), c)
    state = nr.load_state(folder, into=state) if name == "refine" else state
    try:
        task.grade(a.prompt, "")
    except ValueError as error:
        raise UserError(str(error)) from None
    text = write(name, state, task, [a.prompt], c, a.temperature)[0]
    print(f"{a.prompt} {text}  {'right' if task.grade(a.prompt, text) else 'wrong'}")
def plot_command(argv: list[str]) -> None:
    """Several runs on one picture."""
    parser = Parser(prog="train_small.py plot", allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--png", type=Path, default=Path("compare.png"))
    a = parser.parse_args(argv)
    picture(a.runs, a.png)
def main(argv: list[str] | None = None) -> int:
    """Dispatch; every UserError ends here as one line and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    command = {"sample": sample_command, "plot": plot_command}.get(argv[0] if argv else "")
    try:
        return command(argv[1:]) or 0 if command else train(build_parser().parse_args(argv))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
if __name__ == "__main__":
    sys.exit(main())
