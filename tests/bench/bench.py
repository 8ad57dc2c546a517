"""Time nanoreward beside the alternatives: python tests/bench/bench.py [PART ...]

    rollouts     `sample` beside `generate` of transformers
    sft          a supervised step beside a plain loop with transformers
    grpo         an update of ppo with --arm grpo beside a step of TRL's GRPOTrainer
    learning     seconds until both have 80 % of dev right: --arm grpo and TRL's GRPOTrainer
    dpo          an update of iterative_dpo beside a step of TRL's DPOTrainer
    diffusion    `sample` of the diffusion LM beside LLaDA's schedule
    growth       rollouts and SFT steps with more rows, longer responses and wider models

Both sides run in turns in one process, with the same weights, prompts and lengths. The ratio of
each pair of runs is kept, and its median and quartiles are shown. It prints a table and writes
bench.json beside this file. It needs the extra `bench` (pip install -e '.[bench]'). The base model
is trained once, in the usual cache.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import nanoreward as nr  # noqa: E402
import train_small as front  # noqa: E402
from data import arithmetic  # noqa: E402

OUT = Path(__file__).with_name("bench.json")
# No vocabulary here has this id. As EOS it makes all responses as long as there is room for.
NEVER = 10_000


def seconds(call: Callable) -> float:
    """The wall time of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def summary(name: str, pairs: list[tuple[float, float]], unit: str, amount: float) -> dict:
    """Turn the seconds (ours, theirs) of each turn into a row of the table.

    amount / seconds is the rate in `unit`.
    """
    ratios = [theirs / ours for ours, theirs in pairs]
    low, middle, high = quantiles(ratios, n=4)
    ours, theirs = (amount / median(side) for side in zip(*pairs, strict=True))
    print(
        f"{name:46} {ours:9.0f} {theirs:9.0f} {unit:12} {middle:5.2f} [{low:.2f}, {high:.2f}]",
        flush=True,
    )
    return {
        "name": name,
        "unit": unit,
        "ours": ours,
        "theirs": theirs,
        "ratio": middle,
        "quartiles": [low, high],
        "seconds": [[round(x, 4) for x in pair] for pair in pairs],
    }


def alternate(
    name: str, ours: Callable, theirs: Callable, unit: str, amount: float, reps: int
) -> dict:
    """Run both once to warm up, and then in turns."""
    ours()
    theirs()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(reps)]
    return summary(name, pairs, unit, amount)


def our_config(method: str, threads: int, **numbers: Any) -> Any:
    """The config of a method as it runs on this machine's CPU."""
    return front.make_config(method, device="cpu", threads=threads, **numbers)


def in_transformers(model: nr.Transformer) -> Any:
    """The same weights in transformers' Llama, through the folder that `save` writes."""
    from transformers import AutoModelForCausalLM

    # The folder stays, because TRL reads its reference model from it again.
    folder = tempfile.mkdtemp()
    model.save(folder)
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")


def some_prompts(task: nr.Task, c: nr.Config, n: int, each: int) -> torch.Tensor:
    """n problems, each of them `each` times: (n * each, P)."""
    texts = task.prompts(n, nr.rng(0, "bench"))
    return nr.encode_prompts(task, texts, c).repeat_interleave(each, 0)


# ---- rollouts ------------------------------------------------------------------------------------


def rollouts(threads: int, cache: Path, reps: int) -> list[dict]:
    """`sample` beside `generate`, forced to 28 tokens and with natural lengths."""
    c = our_config("ppo", threads)
    task = front.make_task(c)
    model = nr.gpt_base(task, c, front.CachedTrainer(cache))
    other = in_transformers(model).eval()
    rows = []
    for n, each in ((64, 8), (512, 1), (8, 8), (64, 1)):
        prompt = some_prompts(task, c, n, each)
        if each == 1:
            assert_same_greedy(model, other, prompt, c)
        for lengths, mine in (("forced", replace(c, eos_id=NEVER)), ("natural", c)):
            title = f"rollouts, {n} x {each}, {lengths} lengths"
            rows.append(sampling(title, model, other, prompt, mine, reps))
    return rows


def sampling(
    title: str, model: nr.Transformer, other: Any, prompt: torch.Tensor, c: Any, reps: int
) -> dict:
    """`sample` beside `generate` from the same prompts: tokens a second."""

    def ours() -> nr.Rollout:
        return nr.sample(model, prompt, c, generator=nr.rng(0, "s"))

    def theirs() -> torch.Tensor:
        return generate(other, prompt, c, do_sample=True)

    tokens = ours().mask.sum().item()
    if c.eos_id == NEVER:
        responses = theirs()[:, prompt.shape[1] :]
        assert tokens == responses.numel() == len(prompt) * c.response, "not of full length"
    return alternate(title, ours, theirs, "tokens/s", tokens, reps)


@torch.no_grad()
def generate(other: Any, prompt: torch.Tensor, c: Any, do_sample: bool) -> torch.Tensor:
    """Prompts and responses by transformers, (B, P + R); sampled at temperature 1 or greedy."""
    return other.generate(
        prompt,
        attention_mask=(prompt != c.pad_id).long(),
        max_new_tokens=c.response,
        do_sample=do_sample,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        pad_token_id=c.pad_id,
        eos_token_id=c.eos_id,
    )


def assert_same_greedy(
    model: nr.Transformer, other: Any, prompt: torch.Tensor, c: nr.Config
) -> None:
    """Both sides write the same tokens if they always take the likeliest one."""
    ours = nr.sample(model, prompt, replace(c, temperature=0)).response
    theirs = generate(other, prompt, c, do_sample=False)[:, prompt.shape[1] :]
    assert torch.equal(ours[:, : theirs.shape[1]], theirs), "greedy tokens are not transformers'"


# ---- sft -----------------------------------------------------------------------------------------


def matmul_rate() -> float:
    """Operations a second of a product of 2048 x 2048 matrices in float32, the best of five."""
    a, b = torch.randn(2, 2048, 2048)
    a @ b
    return 2 * 2048**3 / min(seconds(lambda: a @ b) for _ in range(5))


def training_flops(model: nr.Transformer, tokens: float, T: float) -> float:
    """The operations of a forward and a backward pass.

    They are 6 for each weight and token, and 12 * layers * T * inner width for the attention of
    each token.
    """
    c = model.config
    weights = sum(p.numel() for p in model.parameters()) - model.embed_tokens.weight.numel()
    return tokens * (6 * weights + 12 * c.layers * T * c.heads * c.head_dim)


def sft(threads: int, cache: Path, reps: int) -> list[dict]:
    """A supervised step with AdamW on both sides.

    The model is that of the laptop, and a wider one, to be compared with the rate of matrices.
    """
    laptop = our_config("ppo", threads)
    wide = replace(
        laptop,
        width=512,
        layers=4,
        heads=8,
        kv_heads=8,
        head_dim=64,
        mlp_width=1536,
        response=118,
        micro=16,
    )
    cases = (("laptop", laptop, 128, True), ("laptop", laptop, 128, False))
    cases += (("512 wide", wide, 16, False),)
    return [sft_step(*case, reps) for case in cases]


def sft_step(name: str, c: nr.Config, B: int, natural: bool, reps: int) -> dict:
    """One model, B rows a step, with the demonstrations' own lengths or with full ones."""
    task = front.make_task(c)
    model = random_model(c)
    other = in_transformers(model).train()
    demos = [task.demo(nr.rng(i, "bench demo")) for i in range(B)]
    prompt = nr.encode_prompts(task, [x for x, _ in demos], c)
    response = nr.right_pad(task.encode([y for _, y in demos]), c.pad_id, c.response)
    if not natural:
        response = torch.randint(6, 32, (B, c.response), generator=nr.rng(0, "forced"))
    response = response[(response != c.pad_id).sum(1).argsort()]
    length = (response != c.pad_id).sum(1)

    ids = torch.cat([prompt, response], 1)
    real = (ids != c.pad_id).long()
    labels = ids.masked_fill(ids == c.pad_id, -100)
    labels[:, : prompt.shape[1]] = -100

    our_optimizers = nr.optimizers([model], 1e-6)
    adamw = torch.optim.AdamW(other.parameters(), 1e-6, betas=(0.9, 0.95))

    def loss(rows: torch.Tensor) -> tuple[torch.Tensor, dict]:
        y = response[rows, : int(length[rows].max())]
        logp = nr.token_logprobs(model, prompt[rows], y, 1.0)
        return nr.nll_loss(logp, y != c.pad_id, length.sum()), {}

    def ours() -> None:
        nr.optimizer_step(our_optimizers, loss, torch.arange(B), c)

    def theirs() -> None:
        other(input_ids=ids, attention_mask=real, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()

    title = f"SFT step, {name}, {'natural' if natural else 'forced'} lengths"
    row = alternate(title, ours, theirs, "rows/s", B, reps)
    tokens = float(real.sum())
    rate = training_flops(model, tokens, tokens / B) * row["ours"] / B
    peak = matmul_rate()
    row["GFLOP/s"] = rate / 1e9
    row["matmul GFLOP/s"] = peak / 1e9
    row["share of matmul"] = rate / peak
    print(f"{'':46} {rate / 1e9:.0f} of {peak / 1e9:.0f} GFLOP/s: {rate / peak:.2f}")
    return row


# ---- growth --------------------------------------------------------------------------------------


def random_model(c: nr.Config) -> nr.Transformer:
    """A model of this shape that nobody has trained."""
    return nr.Transformer(c, nr.rng(0, "bench"))


def growth(threads: int, cache: Path, reps: int) -> list[dict]:
    """How both ratios change when rows, responses or the width grow; lengths are forced."""
    laptop = our_config("ppo", threads, response=28)
    cases = [("rows", B, laptop, B) for B in (64, 512, 4096)]
    cases += [("response", R, replace(laptop, response=R), 64) for R in (28, 64, 256)]
    for width in (64, 256, 512):
        shape = {"width": width, "head_dim": width // laptop.heads, "mlp_width": 3 * width}
        cases.append(("width", width, replace(laptop, **shape), 64))
    rows = []
    for what, value, c, B in cases:
        prompt = some_prompts(front.make_task(c), c, B, 1)
        model = random_model(c)
        other = in_transformers(model).eval()
        mine = replace(c, eos_id=NEVER)
        rows.append(sampling(f"rollouts, {what} {value}", model, other, prompt, mine, reps))
        rows.append(sft_step(f"{what} {value}", c, B, False, reps))
    return rows


# ---- TRL -----------------------------------------------------------------------------------------


def in_turns(pairs: list, ours: Callable) -> Any:
    """A callback for TRL. After each of its steps it runs one of ours, and keeps both seconds."""
    from transformers import TrainerCallback

    class Alternate(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            theirs = time.perf_counter() - self.began
            pairs.append((seconds(ours), theirs))

    return Alternate()


def fast_tokenizer(task: nr.Task) -> Any:
    """The task's tokenizer as transformers wants it."""
    from transformers import PreTrainedTokenizerFast

    words = dict(pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left")
    return PreTrainedTokenizerFast(tokenizer_object=task.tokenizer, **words)


def trainer_arguments(folder: str, reps: int) -> dict[str, Any]:
    """What both trainers of TRL are told. The first step is a warm-up."""
    return dict(
        output_dir=folder,
        learning_rate=0.0,
        max_steps=reps + 1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )


def grpo_trainer(
    policy: nr.Transformer, task: nr.Task, c: Any, texts: list[str], callback: Any, **numbers: Any
) -> Any:
    """TRL's GRPOTrainer with the weights, the sampling and the rewards of ours."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def reward(prompts: list[str], completions: Any, completion_ids: list, **_: Any) -> list:
        scores = []
        for prompt, ids in zip(prompts, completion_ids, strict=True):
            problem = arithmetic.turn(prompt.removeprefix("<bos>"))
            ended = c.eos_id in ids
            scores.append(task.grade(problem, task.decode(ids)) if ended else nr.NO_EOS)
        return scores

    args = GRPOConfig(
        num_generations=c.samples,
        max_completion_length=c.response,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        beta=c.beta,
        **numbers,
    )
    data = [{"prompt": "<bos>" + arithmetic.turn(text)} for text in texts]
    return GRPOTrainer(
        model=in_transformers(policy),
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_list(data),
        processing_class=fast_tokenizer(task),
        callbacks=[callback],
    )


def grpo(threads: int, cache: Path, reps: int) -> list[dict]:
    """A whole update of --arm grpo, 64 x 8, beside a step of TRL's GRPOTrainer.

    Generation is included on both sides, and so is the KL if it has a weight.
    """
    rows = []
    for beta in (0.0, 0.04):
        # At a rate of zero the weights, and so the lengths, stay what they are on both sides.
        c = our_config("ppo", threads, arm="grpo", beta=beta, updates=10**6, lr=0.0)
        task = front.make_task(c)
        policy = nr.gpt_base(task, c, front.CachedTrainer(cache))
        loop = nr.ppo(nr.start_ppo(policy, c), task, c)
        texts = task.prompts(c.prompts, nr.rng(0, "prompts", 0))
        responses = c.prompts * c.samples
        pairs: list[tuple[float, float]] = []
        callback = in_turns(pairs, lambda: next(loop))
        with tempfile.TemporaryDirectory() as folder:
            numbers = trainer_arguments(folder, reps)
            numbers |= {"per_device_train_batch_size": responses}
            grpo_trainer(policy, task, c, texts, callback, **numbers).train()
        title = f"grpo update, 64 x 8, beta {beta}"
        rows.append(summary(title, pairs[1:], "responses/s", responses))
    return rows


# ---- learning ------------------------------------------------------------------------------------

# What counts as learned. Both sides look at dev after every update.
ENOUGH = 0.8
SEEDS = 8


class Clock:
    """The seconds of a training until ENOUGH of dev is right; looking at dev is left out."""

    def __init__(self, task: nr.Task, c: Any):
        self.task = task
        self.c = c
        self.dev = task.prompts(c.eval_problems, nr.rng(0, "dev"), "dev")
        self.began = time.perf_counter()
        self.accuracies: list[float] = []
        self.seconds = 0.0

    def enough(self, policy: nr.Transformer) -> bool:
        """Look at dev, and say whether to stop."""
        self.seconds += time.perf_counter() - self.began
        self.accuracies.append(nr.accuracy(policy, self.task, self.dev, self.c))
        self.began = time.perf_counter()
        return self.accuracies[-1] >= ENOUGH


def we_learn(policy: nr.Transformer, task: nr.Task, c: Any) -> Clock:
    """--arm grpo as train_small.py runs it."""
    loop = nr.ppo(nr.start_ppo(policy, c), task, c)
    clock = Clock(task, c)
    for _ in loop:
        if clock.enough(policy):
            break
    return clock


def they_learn(policy: nr.Transformer, task: nr.Task, c: Any) -> Clock:
    """TRL with the same base, batches, optimizer steps and rates."""
    from transformers import TrainerCallback

    steps = c.prompts * c.samples // c.minibatch  # optimizer steps of an update
    clock = Clock(task, c)
    mirror = nr.frozen_copy(policy)

    class Look(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            if state.global_step % steps == 0:
                weights = model.state_dict()
                mirror.load_state_dict({k.removeprefix("model."): x for k, x in weights.items()})
                control.should_training_stop = clock.enough(mirror)

    texts = task.prompts(c.prompts * c.updates, nr.rng(c.seed, "prompts"))
    with tempfile.TemporaryDirectory() as folder:
        numbers = trainer_arguments(folder, 0) | {
            "learning_rate": c.lr,
            "max_steps": steps * c.updates,
            "warmup_steps": steps * nr.WARMUP,
            "lr_scheduler_type": "linear",
            "adam_beta2": 0.95,
            "adam_epsilon": nr.ADAM_EPS,
            "weight_decay": 0.0,
            "max_grad_norm": nr.CLIP_GRAD,
            "per_device_train_batch_size": c.minibatch,
            "steps_per_generation": steps,
            "epsilon": c.clip,
            "loss_type": "bnpo",  # one mean over all tokens of a step, as ours
            "seed": c.seed,
        }
        grpo_trainer(policy, task, c, texts, Look(), **numbers).train()
    return clock


def learning(threads: int, cache: Path, reps: int) -> list[dict]:
    """Seconds until 80 % of dev are right, from the same base model; one pair for each seed."""
    pairs = []
    updates = []
    for seed in range(SEEDS):
        c = our_config("ppo", threads, arm="grpo", seed=seed)
        task = front.make_task(c)
        base = nr.gpt_base(task, c, front.CachedTrainer(cache))
        clocks = [we_learn(nr.deepcopy(base), task, c), they_learn(base, task, c)]
        curves = [clock.accuracies for clock in clocks]
        assert all(curve[-1] >= ENOUGH for curve in curves), f"seed {seed}: not reached: {curves}"
        pairs.append(tuple(clock.seconds for clock in clocks))
        updates.append([len(curve) for curve in curves])
        print(f"{'':46} seed {seed}: {updates[-1]} updates", flush=True)
    row = summary("grpo until 80 % of dev", pairs, "runs/h", 3600)
    return [row | {"updates": updates}]


def some_pairs(policy: nr.Transformer, task: nr.Task, c: Any) -> dict[str, torch.Tensor]:
    """c.minibatch pairs of a right and a wrong response, each of another problem."""
    prompt, group = nr.in_groups(task, task.prompts(256, nr.rng(0, "bench")), c)
    b = nr.sample(policy, prompt, c, group=group, generator=nr.rng(0, "pairs"))
    # Of the pairs of each problem only the first one is taken.
    rows = nr.pair_up(nr.grades(task, b), group, c)[:: nr.PAIRS_EACH][: c.minibatch]
    assert len(rows) == c.minibatch, "too few pairs"
    pairs = {"prompt": prompt[rows[:, 0]], "response": b.response[rows]}
    with torch.no_grad():
        return pairs | {"ref": nr.pair_logprobs(policy, pairs, torch.arange(len(rows)))}


def dpo(threads: int, cache: Path, reps: int) -> list[dict]:
    """An update of DPO + NLL with 64 pairs beside a step of TRL's DPOTrainer.

    The log-probs of the reference are ready on both sides.
    """
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    c = our_config("iterative_dpo", threads, lr=0.0, updates=10**6)
    task = front.make_task(c)
    policy = nr.gpt_base(task, c, front.CachedTrainer(cache))
    other = in_transformers(policy)
    state = nr.start_rounds(policy, c)
    state.pairs = some_pairs(policy, task, c)

    def text(ids: torch.Tensor) -> str:
        return arithmetic.turn(task.decode(ids.tolist())).removesuffix("<eos>")

    data = []
    for x, (chosen, rejected) in zip(state.pairs["prompt"], state.pairs["response"], strict=True):
        data.append(
            {"prompt": "<bos>" + text(x), "chosen": text(chosen), "rejected": text(rejected)}
        )
    times: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            **trainer_arguments(folder, reps),
            per_device_train_batch_size=c.minibatch,
            beta=c.beta,
            loss_type=["sigmoid", "sft"],
            loss_weights=[1.0, c.alpha],
            precompute_ref_log_probs=True,
            max_length=None,
        )
        DPOTrainer(
            model=other,
            args=args,
            train_dataset=Dataset.from_list(data),
            processing_class=fast_tokenizer(task),
            callbacks=[in_turns(times, lambda: nr.pair_update(state, c))],
        ).train()
    return [summary("dpo update, 64 pairs, natural lengths", times[1:], "pairs/s", c.minibatch)]


# ---- diffusion -----------------------------------------------------------------------------------


@torch.no_grad()
def llada(model: nr.Transformer, prompt: torch.Tensor, c: Any, temperature: float) -> torch.Tensor:
    """LLaDA's public schedule, written down plainly.

    It computes whole logits, draws Gumbel noise in float64, and takes a top-k for each row.
    """
    P, R = prompt.shape[1], c.response
    x = torch.cat([prompt, torch.full((len(prompt), R), c.mask_id)], 1)
    for end in range(P + c.block, P + R + 1, c.block):
        masked = (x[:, end - c.block : end] == c.mask_id).sum(1)
        base = masked // c.block_passes
        rest = masked % c.block_passes
        for i in range(c.block_passes):
            logits = F.pad(model(x)[:, :-1], (0, 0, 1, 0))  # the model is shifted, as a GPT
            logits[..., [c.pad_id, c.mask_id]] = -torch.inf
            noise = (-torch.log(torch.rand(logits.shape, dtype=torch.float64))) ** temperature
            token = (logits.double().exp() / noise).argmax(-1)
            sure = logits.double().softmax(-1).gather(-1, token[..., None])[..., 0]
            sure[:, end:] = -torch.inf
            sure = sure.masked_fill(x != c.mask_id, -torch.inf)
            chosen = torch.zeros_like(x, dtype=torch.bool)
            for row in range(len(x)):
                k = int(base[row] + (i < rest[row]))
                chosen[row, sure[row].topk(k).indices] = True
            x = torch.where(chosen, token, x)
    return x[:, P:]


def diffusion(threads: int, cache: Path, reps: int) -> list[dict]:
    """`sample` of the diffusion LM beside LLaDA's schedule: same network, passes and blocks."""
    c = our_config("denoise", threads)
    task = front.make_task(c)
    model = nr.diffusion_base(
        nr.gpt_base(task, c, front.CachedTrainer(cache)), task, c, front.CachedTrainer(cache)
    )
    rows = []
    for n, each, passes in ((64, 8, 4), (512, 1, 4), (64, 8, 2)):
        prompt = some_prompts(task, c, n, each)
        mine = replace(c, block_passes=passes)

        def ours() -> nr.Rollout:
            return nr.sample(model, prompt, mine, generator=nr.rng(0, "s"))

        def theirs() -> torch.Tensor:
            return llada(model, prompt, mine, 1.0)

        title = f"diffusion, {n} x {each}, {7 * passes} passes"
        rows.append(alternate(title, ours, theirs, "responses/s", n * each, reps))
    return rows


# ---- all of it -----------------------------------------------------------------------------------


def version_of(package: str) -> str:
    """The version of an installed package; empty if it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def main() -> None:
    """Run the named parts, print the table, keep the numbers."""
    known = (rollouts, sft, grpo, learning, dpo, diffusion, growth)
    parts = {f.__name__: f for f in known}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[[], *parts], help="default: all")
    parser.add_argument("--reps", type=int, default=9, help="at least 2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=front.CACHE)
    parser.add_argument("--out", type=Path, default=OUT)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)

    kept = json.loads(a.out.read_text()) if a.out.exists() else {}
    git = ["git", "rev-parse", "--short", "HEAD"]
    print(f"{'':46} {'ours':>9} {'theirs':>9} {'unit':12} ratio [quartiles]")
    for name in a.parts or parts:
        about = {
            "command": f"python tests/bench/bench.py {name}",
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "threads": a.threads,
            "torch": torch.__version__,
            "transformers": version_of("transformers"),
            "trl": version_of("trl"),
            "commit": subprocess.check_output(git, cwd=ROOT, text=True).strip(),
        }
        kept[name] = about | {"rows": parts[name](a.threads, a.cache, a.reps)}
        front.write_text(a.out, json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
