"""Time nanoreward beside the alternatives: python tests/bench/bench.py [rollouts sft grpo dpo diffusion]

Both sides run alternately in one process with the same weights, prompts and lengths; the ratio of each
pair of runs is kept, its median and quartiles are shown. Prints a table and writes bench.json beside this file.
Needs the extra `bench` (pip install -e '.[bench]'); the base model is trained once, in the usual cache.
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
from pathlib import Path
from statistics import median, quantiles

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import nanoreward as nr  # noqa: E402
import train_small as front  # noqa: E402
from data import arithmetic  # noqa: E402

OUT = Path(__file__).with_name("bench.json")
NEVER = 31  # an id the base model does not write: as EOS it makes every response 28 tokens long


def seconds(call: Callable) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def summary(name: str, pairs: list[tuple[float, float]], unit: str, amount: float) -> dict:
    """Seconds (ours, theirs) of each turn -> a row; amount / seconds is the rate in `unit`."""
    ratios = [b / a for a, b in pairs]
    low, middle, high = quantiles(ratios, n=4)
    ours, theirs = (amount / median(side) for side in zip(*pairs, strict=True))
    print(
        f"{name:46} {ours:9.0f} {theirs:9.0f} {unit:12} {middle:5.2f} [{low:.2f}, {high:.2f}]",
        flush=True,
    )
    row = {
        "name": name,
        "unit": unit,
        "ours": ours,
        "theirs": theirs,
        "ratio": middle,
        "quartiles": [low, high],
    }
    return row | {"seconds": [[round(x, 4) for x in pair] for pair in pairs]}


def alternate(
    name: str, ours: Callable, theirs: Callable, unit: str, amount: float, reps: int
) -> dict:
    """Both once to warm up, then in turns."""
    ours(), theirs()
    return summary(name, [(seconds(ours), seconds(theirs)) for _ in range(reps)], unit, amount)


def in_transformers(model: nr.Transformer):
    """The same weights in transformers' Llama, through the folder that `save` writes."""
    from transformers import AutoModelForCausalLM

    folder = tempfile.mkdtemp()  # stays: TRL reads its reference from it again
    model.save(folder)
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")


def some_prompts(task, c: nr.Config, n: int, each: int) -> torch.Tensor:
    """n problems, each `each` times: (n * each, P)."""
    return nr.encode_prompts(task, task.prompts(n, nr.rng(0, "bench")), c).repeat_interleave(
        each, 0
    )


def rollouts(c: nr.Config, cache: Path, reps: int) -> list[dict]:
    """`sample` against `generate`, forced to 28 tokens and with natural lengths."""
    model, task = front.base_model(c, cache), front.make_task(c)
    theirs = in_transformers(model).eval()
    rows = []
    for n, each in ((64, 8), (512, 1), (8, 8), (64, 1)):
        prompt = some_prompts(task, c, n, each)
        for natural in (False, True):
            mine = c if natural else replace(c, eos=NEVER)
            kwargs = dict(
                attention_mask=(prompt != c.pad).long(),
                max_new_tokens=c.response,
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                pad_token_id=c.pad,
                eos_token_id=c.eos if natural else None,
            )
            if natural and each == 1:  # the same tokens come out, greedily
                a = nr.sample(model, prompt, replace(c, temperature=0)).response
                with torch.no_grad():
                    b = theirs.generate(prompt, **kwargs | {"do_sample": False})[
                        :, prompt.shape[1] :
                    ]
                assert torch.equal(a[:, : b.shape[1]], b), "greedy tokens differ from transformers'"
            tokens = float(nr.sample(model, prompt, mine, generator=nr.rng(0, "n")).mask.sum())
            with torch.no_grad():
                rows.append(
                    alternate(
                        f"rollouts, {n} x {each}, {'natural' if natural else 'forced'} lengths",
                        lambda: nr.sample(model, prompt, mine, generator=nr.rng(0, "s")),
                        lambda: theirs.generate(prompt, **kwargs),
                        "tokens/s",
                        tokens,
                        reps,
                    )
                )
    return rows


def matmul_rate() -> float:
    """fp32 operations a second of a 2048 x 2048 matrix product, best of five."""
    a, b = torch.randn(2, 2048, 2048)
    a @ b
    return 2 * 2048**3 / min(seconds(lambda: a @ b) for _ in range(5))


def training_flops(model: nr.Transformer, tokens: float, T: float) -> float:
    """Forward and backward: 6 a weight and token, and 12 * layers * T * inner width for attention."""
    c = model.config
    weights = sum(p.numel() for p in model.parameters()) - model.embed_tokens.weight.numel()
    return tokens * (6 * weights + 12 * c.layers * T * c.heads * c.head_dim)


def sft(c: nr.Config, cache: Path, reps: int) -> list[dict]:
    """One supervised step, AdamW on both sides: the laptop model, and a wider one for the matrix rate."""
    wide = replace(
        c,
        width=512,
        layers=4,
        heads=8,
        kv_heads=8,
        head_dim=64,
        hidden=1536,
        response=118,
        micro=16,
    )
    rows = []
    for name, k, B, natural in (
        ("laptop", c, 128, True),
        ("laptop", c, 128, False),
        ("512 wide", wide, 16, False),
    ):
        task = front.make_task(c)
        model = nr.Transformer(k, nr.rng(0, "bench"))
        other = in_transformers(model).train()
        demos = [task.demo(nr.rng(i, "bench demo")) for i in range(B)]
        prompt = nr.encode_prompts(task, [x for x, _ in demos], k)
        response = nr.right_pad(task.encode([y for _, y in demos]), k.pad, k.response)
        if not natural:
            response = torch.randint(6, 32, (B, k.response), generator=nr.rng(0, "forced"))
        response = response[(response != k.pad).sum(1).argsort()]
        length = (response != k.pad).sum(1)
        state = {"optimizers": nr.optimizers([model], 1e-6, k)}
        adamw = torch.optim.AdamW(other.parameters(), 1e-6, betas=(0.9, 0.95))
        ids = torch.cat([prompt, response], 1)
        real, labels = (ids != k.pad).long(), ids.masked_fill(ids == k.pad, -100)
        labels[:, : prompt.shape[1]] = -100

        def loss(rows: torch.Tensor):
            y = response[rows, : int(length[rows].max())]
            logp = nr.token_logprobs(model, prompt[rows], y, 1.0)
            return nr.nll_loss(logp, y != k.pad, length.sum()), {}

        def theirs():
            other(input_ids=ids, attention_mask=real, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
            adamw.step()
            adamw.zero_grad()

        title = f"SFT step, {name}, {'natural' if natural else 'forced'} lengths"
        row = alternate(
            title, lambda: nr.step(state, loss, torch.arange(B), k), theirs, "rows/s", B, reps
        )
        tokens = float((ids != k.pad).sum())
        row["GFLOP/s"] = training_flops(model, tokens, tokens / B) * row["ours"] / B / 1e9
        row["matmul GFLOP/s"] = matmul_rate() / 1e9
        row["share of matmul"] = row["GFLOP/s"] / row["matmul GFLOP/s"]
        print(
            f"{'':46} {row['GFLOP/s']:.0f} of {row['matmul GFLOP/s']:.0f} GFLOP/s: {row['share of matmul']:.2f}"
        )
        rows.append(row)
    return rows


def in_turns(pairs: list, ours: Callable):
    """A TRL callback: after each of its steps one of ours; seconds of both go to `pairs`."""
    from transformers import TrainerCallback

    class Alternate(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            theirs = time.perf_counter() - self.began
            pairs.append((seconds(ours), theirs))

    return Alternate()


def fast_tokenizer(task):
    """The task's tokenizer as transformers wants it."""
    from transformers import PreTrainedTokenizerFast

    words = dict(pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left")
    return PreTrainedTokenizerFast(tokenizer_object=task.tokenizer, **words)


def grpo(c: nr.Config, cache: Path, reps: int) -> list[dict]:
    """A whole grpo-arm update (64 x 8, generation and KL included) against a step of TRL's GRPOTrainer."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    task = front.make_task(c)
    # a rate of zero: the weights, and so the lengths, stay what they are on both sides
    c = replace(c, arm="grpo", beta=0.04, updates=10**6, lr=0.0)
    policy = front.base_model(c, cache)
    other = in_transformers(policy)
    state = nr.start_ppo(policy, c)
    loop = nr.ppo(state, task, c)
    texts = task.prompts(c.prompts, nr.rng(0, "prompts", 0))

    def reward(prompts, completions, completion_ids, **_):
        asked = [arithmetic.turn(p.removeprefix("<bos>")) for p in prompts]
        return [
            task.grade(p, task.decode(ids)) for p, ids in zip(asked, completion_ids, strict=True)
        ]

    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=c.prompts * c.samples,
            num_generations=c.samples,
            max_completion_length=c.response,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            beta=c.beta,
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
        data = Dataset.from_list([{"prompt": "<bos>" + arithmetic.turn(t)} for t in texts])
        GRPOTrainer(
            model=other,
            reward_funcs=reward,
            args=args,
            train_dataset=data,
            processing_class=fast_tokenizer(task),
            callbacks=[in_turns(pairs, lambda: next(loop))],
        ).train()
    pairs = pairs[1:]  # the first was the warm-up
    return [
        summary("grpo update, 64 x 8, natural lengths", pairs, "responses/s", c.prompts * c.samples)
    ]


def dpo(c: nr.Config, cache: Path, reps: int) -> list[dict]:
    """A DPO+NLL update of 64 pairs against TRL's DPOTrainer; reference log-probs are ready on both sides."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    task, c = front.make_task(c), replace(c, dpo_lr=0.0, round_updates=10**6)
    policy = front.base_model(c, cache)
    other, state = in_transformers(policy), nr.start_rounds(policy, c)
    prompt, group = nr.in_groups(task, task.prompts(256, nr.rng(0, "bench")), c)
    rollout = nr.sample(policy, prompt, c, group=group, generator=nr.rng(0, "pairs"))
    rows = nr.pair_up(nr.grades(task, rollout), group, replace(c, pairs_each=1))[: c.pair_batch]
    assert len(rows) == c.pair_batch, "too few pairs"
    pairs = {"prompt": prompt[rows[:, 0]], "response": rollout.response[rows]}
    with torch.no_grad():
        state["pairs"] = pairs | {"ref": nr.pair_logprobs(policy, pairs, torch.arange(len(rows)))}
    word = lambda ids: arithmetic.turn(task.decode(ids.tolist())).removesuffix("<eos>")  # noqa: E731
    texts = [
        {"prompt": "<bos>" + word(x), "chosen": word(w), "rejected": word(lo)}
        for x, (w, lo) in zip(pairs["prompt"], pairs["response"], strict=True)
    ]
    times = []
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=c.pair_batch,
            beta=c.dpo_beta,
            learning_rate=0.0,
            loss_type=["sigmoid", "sft"],
            loss_weights=[1.0, c.alpha],
            precompute_ref_log_probs=True,
            max_steps=reps + 1,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            max_length=None,
        )
        DPOTrainer(
            model=other,
            args=args,
            train_dataset=Dataset.from_list(texts),
            processing_class=fast_tokenizer(task),
            callbacks=[in_turns(times, lambda: nr.pair_update(state, c))],
        ).train()
    return [summary("dpo update, 64 pairs, natural lengths", times[1:], "pairs/s", c.pair_batch)]


@torch.no_grad()
def llada(
    model: nr.Transformer, prompt: torch.Tensor, c: nr.Config, temperature: float
) -> torch.Tensor:
    """LLaDA's public schedule, restated plainly: whole logits, float64 Gumbel noise, a top-k for each row."""
    P, R = prompt.shape[1], c.response
    x = torch.cat([prompt, torch.full((len(prompt), R), c.mask)], 1)
    for end in range(P + c.block, P + R + 1, c.block):
        masked = (x[:, end - c.block : end] == c.mask).sum(1)
        base, rest = masked // c.block_steps, masked % c.block_steps
        for i in range(c.block_steps):
            logits = F.pad(model(x)[:, :-1], (0, 0, 1, 0))  # the model is shifted, as a GPT
            logits[..., [c.pad, c.mask]] = -torch.inf
            noise = (-torch.log(torch.rand(logits.shape, dtype=torch.float64))) ** temperature
            token = (logits.double().exp() / noise).argmax(-1)
            sure = logits.double().softmax(-1).gather(-1, token[..., None])[..., 0]
            sure[:, end:] = -torch.inf
            sure = sure.masked_fill(x != c.mask, -torch.inf)
            chosen = torch.zeros_like(x, dtype=torch.bool)
            for row in range(len(x)):
                k = int(base[row] + (i < rest[row]))
                chosen[row, sure[row].topk(k).indices] = True
            x = torch.where(chosen, token, x)
    return x[:, P:]


def diffusion(c: nr.Config, cache: Path, reps: int) -> list[dict]:
    """`sample` of the masked-diffusion LM against LLaDA's schedule: same network, steps and blocks."""
    model, task = front.diffusion_base(c, cache), front.make_task(c)
    rows = []
    for n, each, steps in ((64, 8, 4), (512, 1, 4), (64, 8, 2)):
        prompt, k = some_prompts(task, c, n, each), replace(c, block_steps=steps)
        rows.append(
            alternate(
                f"diffusion, {n} x {each}, {7 * steps} passes",
                lambda: nr.sample(model, prompt, k, generator=nr.rng(0, "s")),
                lambda: llada(model, prompt, k, 1.0),
                "responses/s",
                n * each,
                reps,
            )
        )
    return rows


def main() -> None:
    """Run the named parts, print the table, keep the numbers."""
    parts = {f.__name__: f for f in (rollouts, sft, grpo, dpo, diffusion)}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], *parts], help="default: all")
    parser.add_argument("--reps", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=front.CACHE)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    c = replace(nr.Config(), device="cpu", threads=a.threads)
    import transformers
    import trl

    kept = json.loads(OUT.read_text()) if OUT.exists() else {}
    print(f"{'':46} {'ours':>9} {'theirs':>9} {'unit':12} ratio [quartiles]")
    for name in a.parts or parts:
        about = {
            "command": f"python tests/bench/bench.py {name}",
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "threads": a.threads,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
            "commit": subprocess.check_output(
                ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True
            ).strip(),
        }
        kept[name] = about | {"rows": parts[name](c, a.cache, a.reps)}
        front.write_text(OUT, json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
