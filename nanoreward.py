"""nanoreward: how rewards teach language models, in one file that a person can read.

A small GPT learns arithmetic from bad demonstrations and then gets better from rewards alone; the
same weights become a masked-diffusion LM. The true reward is known exactly and nothing is hidden in
a framework: each method is one equation, one function and one generator loop.

Loops (python train_small.py NAME; without a NAME all, 376 s from nothing on two free cores) and
their greedy accuracy on held-out problems; chance 0.01, base 0.45, careful twin 1.00
    ppo             0.93    arms gae, grpo, rloo        arXiv 1707.06347, 2402.03300, 2402.14740
    iterative_dpo   0.94    dpo_nll, sft_chosen         arXiv 2404.19733, 2203.14465
    self_rewarding  0.55    judge own, frozen           arXiv 2401.10020
    seq2seq         0.57    rule by --top, --least      arXiv 2409.00162
    refine          0.72    ORM, SORM, two refiners     arXiv 2402.10963
    denoise         0.56    the way is paid or not      arXiv 2510.01544 (abstract), 2504.12216

Equation numbers in comments, also (2): diffu-GRPO, on mean-field log-probs:
    (1) masked diffusion: a bound   (9)  DPO + NLL             (13) advantage estimation (GAE)
    (6) reward of a stretch         (10) rewriting             (14) clipped policy, value losses
    (7) advantage with (6)          (11) agreement reward      (15) GRPO: group, KL in the loss
    (8) step labels by rollouts     (12) per-token KL penalty  (16) RLOO: leave-one-out baseline

Deviations from the papers stand where they happen: grep DEVIATION; numbers no paper gives: UNKNOWN.
Non-goals: a trainer framework, serving, multi-turn agents, quantization, kernels.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from math import comb, log, pi
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Pair = tuple[Tensor, Tensor]  # two results of one function; the pairs of (9) are something else

# ==== 1. Config =================================================================================
# After this section you know what can be turned: each field is also a flag of train_small.py.
class UserError(Exception):
    """A mistake that its maker can mend: the front door prints it as one line and exits with 2."""
def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """write(temporary path), then rename: a kill leaves the old file or the new one."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two runs may share a cache
        write(temporary)
        os.replace(temporary, path)
    if dist.is_initialized():
        dist.barrier()  # who reads it now finds it

@dataclass(frozen=True)
class Config:
    """All numbers of all loops. Presets: CONFIGS; laptop is the default."""
    # the run
    seed: int = 0  # every random number comes from a generator seeded by (seed, purpose, step)
    threads: int = 2  # same seed, machine and threads: same bytes. One is better on busy cores
    device: str = "auto"  # cuda, else cpu; mps if asked
    save_every: int = 5  # updates between two saved states; a kill loses at most these
    eval_every: int = 5  # updates between two looks at dev; more where that makes over 8 looks
    eval_problems: int = 500  # held-out problems per evaluation; 500 give +-4 points at 95 %
    # the task
    task: str = "arithmetic"  # sudoku, gsm8k; min_ops to planted are arithmetic's
    data: str = "gsm8k"  # folder of gsm8k's train.jsonl and test.jsonl
    min_ops: int = 1  # operations in a chain; each is one written step
    max_ops: int = 3
    answers: int = 100  # different final answers; few: wrong steps often end in the right one
    planted: str = "round"  # what the labeller of preferences falls for: none, round, long, refusal
    response: int = 28  # R, tokens of room: 8 a step, 3 for #answer, 1 for EOS
    # the model; defaults are the laptop GPT, 0.16 M parameters
    model: str = ""  # a Hugging Face folder, in place of a base of our own: its sizes and ids hold
    vocab: int = 32
    width: int = 64  # D
    layers: int = 3  # two learn the habits as fast but fewer facts
    heads: int = 4  # H; with 2 x 32 the facts come 100 updates later
    kv_heads: int = 4  # fewer than heads: grouped keys and values
    head_dim: int = 16
    hidden: int = 192  # SwiGLU width
    rope_theta: float = 10_000.0  # base of the rotary frequencies; RoFormer's value
    rope_scaling: str = ""  # Llama 3's factor, low, high and old length: "8 1 4 8192"
    norm_eps: float = 1e-5  # Llama's value
    qkv_bias: bool = False  # Qwen2 has it
    qk_norm: bool = False  # Qwen3 has it
    tied: bool = False  # output matrix = embedding
    causal: bool = True  # False: every position sees every other, a masked-diffusion LM
    pad: int = 0  # four distinct ids; with pad = eos the model never learns to stop
    bos: int = 1
    eos: int = 2
    mask: int = 3
    # supervised training: the base models
    demos: int = 20_000  # demonstrations, drawn once, each seen 2 to 3 times
    base_updates: int = 400  # the facts arrive between 200 and 350
    base_batch: int = 128  # 64 needs as many examples in all, so twice the updates
    base_lr: float = 0.01  # AdamW, all but block matrices; 3e-3 and 0.03 know less after 450
    muon_lr: float = 0.01  # Muon, block matrices; one seed of three never learned + and - at 0.02
    base_warmup: int = 20  # updates; beside it linear decay to zero
    micro: int = 64  # rows of one backward pass: memory and speed, never the result
    recompute: bool = False  # activations, in the backward pass: less memory, a third slower
    bf16: bool = False  # products of the layers; weights, norms, logits and losses stay float32
    compile: bool = False  # the layers, by torch.compile
    clip_grad: float = 1.0  # largest gradient norm
    # the masked-diffusion LM: from the GPT's weights; blocks left to right, any order within one
    diffusion_updates: int = 500
    look_ahead: float = 0.7  # share of them until all ahead is seen; 0: at once, from scratch
    diffusion_lr: float = 0.002  # AdamW; as fast as the GPT's, the facts are lost
    diffusion_muon_lr: float = 0.006  # 0.003 and 0.01 know less after as many
    t_min: float = 0.05  # smallest masking rate: the weight 1/t explodes below
    block: int = 4  # places; blocks are written from left to right, each in block_steps passes
    block_steps: int = 4  # passes a block; fewer: several tokens a pass, chosen independently
    # rollouts
    prompts: int = 64  # N, problems per update
    samples: int = 8  # G, responses per problem; B = N * G
    temperature: float = 1.0  # of sampling, and of log-probs in ratios; those of pairs have 1
    # reinforcement learning
    arm: str = "gae"  # gae, grpo or rloo: which credit and which loss
    updates: int = 40
    lr: float = 5e-4  # AdamW, peak; 3e-3 forgets the facts within 10 updates
    warmup: int = 5  # updates, beside a decay to 0; without it the first steps cost accuracy
    adam_eps: float = 1e-5  # RLHF practice; 1e-8 makes the first steps larger
    epochs: int = 1  # passes over a batch of rollouts
    minibatch: int = 512  # rows of one optimizer step, of one call that samples traces
    clip: float = 0.2  # ratio band of (14); PPO's value
    value_clip: float = 0.2  # value band of (14); 0 = none
    value_coef: float = 0.1  # c_v of (14)
    gamma: float = 1.0  # (13); the answer is worth the same however long the response
    lam: float = 0.95  # (13)
    beta: float = 0.0  # weight of the KL to the reference; the verifier cannot be fooled
    kl_target: float = 0.0  # nats a response; above 0 beta adapts to hold the KL there
    kl_horizon: int = 10_000  # episodes; how slowly beta adapts
    whiten_reward: bool = False  # scale token rewards to variance 1, keeping their mean
    no_eos: float = -1.0  # reward of a response that never ends
    # preference rounds
    preference: str = "dpo_nll"  # dpo_nll (9) or sft_chosen: which loss the pairs are for
    rounds: int = 4
    round_updates: int = 30  # however many pairs a round has
    round_prompts: int = 512  # problems a round, `samples` responses each
    pairs_each: int = 2  # K, pairs of a problem that has right and wrong responses
    pair_batch: int = 64
    late_temperature: float = 1.0  # of the second half of the rounds; the paper: 0.8, later 1.3
    restart: bool = False  # True: every round trains the first model again (ReST-EM)
    dpo_lr: float = 4e-4  # 1e-3 overfits 700 pairs: 62 % where this has 90
    dpo_beta: float = 0.1  # (9); the paper's
    alpha: float = 5.0  # weight of the NLL in (9), 0: plain DPO; 3 ends at 86 % on dev, 5 at 90
    # self-rewarding: rounds with own problems and own scores
    own_rounds: int = 2  # M1 -> M2 -> M3
    candidates: int = 4  # responses a problem
    judgements: int = 3  # J, sampled for each response; their mean is its score
    judge: str = "own"  # or frozen: M1 judges all rounds
    seed_demos: int = 8_000  # what makes the base M1: solving, judging, posing
    judging: float = 0.7  # share of them that judge (0: no EFT); with 0.8 M1 solves 37 %, not 45
    posing: float = 0.07  # share of them that pose a problem
    seed_updates: int = 300  # a right response outscores a wrong one in 80 %; 86 after 400
    # a learned reward (Bradley-Terry) in place of the verifier
    reward: str = "verifier"  # of ppo; or learned, or seq2seq: the rewriter below
    pairs: int = 4_000  # preference pairs of its training; seq2seq: 50 % with 2000, 53 with 4000
    reward_updates: int = 100
    reward_lr: float = 1e-3
    # seq2seq: a rewriting model in place of the verifier, from the same pairs
    rewriter_updates: int = 150
    top: int = 1  # UNKNOWN: which tokens agree; here the rewriter's n likeliest, 1: its argmax
    least: float = 0.0  # UNKNOWN: or what it gives this probability; 0.1 pays for guesses: 15 %
    c_pos: float = 0.1  # UNKNOWN: what a token before the first disagreement earns in (11)
    c_neg: float = 0.1  # UNKNOWN: what a disagreement costs in (11)
    per_token: bool = False  # UNKNOWN: (11) by the length; a refusal then pays as a solution does
    rewriter_beta: float = 0.1  # beta of seq2seq; one seed of two drifted by 5 nats without
    # refine: step labels by rollouts, then who says when, where and how
    expert_prompts: int = 128  # the student learns its own right responses to these, for
    expert_updates: int = 15  # so long: a third of its drafts stay wrong
    expert_lr: float = 1e-3
    drafts: int = 6_144  # problems, one draft each
    continuations: int = 8  # K of (8)
    labels_each: int = 256  # labelled drafts an update; more problems help, more of one do not
    refine_updates: int = 150
    threshold: float = 0.5  # the first step whose SORM probability is below is the error
    # denoise: policy gradient for the diffusion LM, paid for what a stretch of denoising achieves
    credit: str = "process"  # UNKNOWN: what the way earns; outcome: nothing. See CREDITS
    branches: int = 4  # UNKNOWN: N, how many continuations V(x_t) in (6) averages
    process_weight: float = 1.0  # UNKNOWN: what D weighs beside A in (7)
    earliest: float = 0.0  # UNKNOWN: which state is probed; t is drawn between this share
    latest: float = 1.0  # UNKNOWN: and this share of the steps, anew for each response
    hide_prompt: float = 0.0  # a share. DEVIATION: no prompt token is hidden; (2) hides 15 %
    mu: int = 2  # passes over a batch; with hidden prompt tokens each has its own estimate
    denoise_prompts: int = 32
    denoise_updates: int = 25

CONFIGS: dict[str, dict[str, Any]] = {
    "smoke": dict(threads=1, max_ops=1, answers=4, response=12, width=32, layers=1, heads=1,
        kv_heads=1, head_dim=32, hidden=64, demos=1000, base_updates=150, base_batch=32,
        diffusion_updates=40, prompts=8, samples=4, minibatch=16, epochs=2, updates=4, save_every=1,
        eval_every=2, rounds=3, round_updates=2, round_prompts=8, pair_batch=16, seed_demos=200,
        seed_updates=20, eval_problems=50, pairs=200, reward_updates=5, rewriter_updates=5,
        expert_prompts=16, drafts=40, continuations=2, labels_each=16, refine_updates=4,
        denoise_updates=4),
    "laptop": {},
    "sudoku": dict(task="sudoku", response=17, block=17, block_steps=17, t_min=0.4, look_ahead=0.0,
        diffusion_lr=0.01, diffusion_muon_lr=0.02),  # t_min 0.05: 83 % where 0.4 has 97 to 99
    "gpu": dict(max_ops=6, response=52, width=768, layers=12, heads=12, kv_heads=12, head_dim=64,
        hidden=2048, demos=200_000, base_updates=2000, base_lr=1e-3, prompts=128, samples=16,
        minibatch=1024, micro=512, lr=5e-5, updates=100, eval_problems=1000, bf16=True),
    "hf": dict(task="gsm8k", response=384, bf16=True, prompts=32, micro=8, minibatch=64, lr=2e-6,
        base_lr=1e-5, muon_lr=0.0, diffusion_lr=1e-4, diffusion_muon_lr=0.0, dpo_lr=1e-6, alpha=1.0,
        expert_lr=1e-6, reward_lr=1e-5, base_batch=64, eval_problems=200, round_prompts=64,
        drafts=512),  # the papers' rates; 512 rows of SmolLM2-135M have 11 GB of keys and values
    "claims": dict(threads=1, eval_problems=300, prompts=32, updates=20, rounds=2, pairs=2000,
        round_prompts=256, round_updates=20, rewriter_updates=100, reward_updates=60, drafts=1536,
        labels_each=128, refine_updates=80, denoise_prompts=16, denoise_updates=12)}  # fmt: skip

# ==== 2. Letters ================================================================================
# B rollouts   N prompts, in (6) branches   G samples per prompt, B = N * G   P prompt length
# R response length   T = P + R   V vocabulary   D width   H heads   S key positions, or prefixes
# K continuations of a prefix, or pairs of a problem
# Roles: policy (trained), reference (frozen copy it may not leave), scorer (learned reward). b
# is a batch, c the config, u the update. A mask is 1.0 where a token counts. All that follows
# `response_part` is response-aligned: (B, R), position k belongs to response token k.

# ==== 3. Tasks ==================================================================================
# After this section you can write a task of your own: nothing below knows arithmetic.
class Task(Protocol):
    """What loops, seed data and measurements ask of a task. What was sampled stays ids."""
    tokenizer: Any  # tokenizers.Tokenizer; PAD, BOS, EOS, MASK, SEP and [BAD] are single ids
    def encode(self, texts: list[str]) -> list[list[int]]: ...
    def decode(self, ids: list[int]) -> str: ...  # with its EOS, nothing behind it, no PAD and BOS
    def split(self, prompt: str) -> str: ...  # train, dev or test: a function of the problem
    def prompts(self, n: int, generator: torch.Generator, split: str = "train") -> list[str]: ...
    def demo(self, generator: torch.Generator) -> tuple[str, str]: ...  # prompt, response; mixed
    def grade(self, prompt: str, response: str) -> float: ...  # true reward; malformed: 0.0
    def answer(self, response: str) -> str | None: ...  # the final answer, canonical
    def steps(self, response: list[int]) -> list[tuple[str, int]]: ...  # and their last positions
    def result(self, step: str) -> str | None: ...  # what a step claims
    def step_ok(self, prompt: str, steps: list[str]) -> list[bool]: ...  # truth, only to MEASURE
    def chance(self) -> float: ...  # accuracy of the best constant answer
    # (prompt, preferred, other) by a labeller with a planted weakness
    def preferences(self, n: int, generator: torch.Generator) -> list[tuple[str, str, str]]: ...
    def rubric(self, prompt: str, response: str) -> int: ...  # 0..5, by exact rules
    def judge_prompt(self, prompt: list[int], response: list[int]) -> list[int]: ...
    def judge_demo(self, generator: torch.Generator) -> tuple[str, str]: ...  # read, written
    def problem(self, text: str) -> str | None: ...  # a proposal as a training problem, if it is
    def propose_demo(self, generator: torch.Generator) -> tuple[str, str]: ...  # shown, a new one
def left_pad(rows: list[list[int]], pad: int) -> Tensor:
    """Token lists -> (B, P), PAD in front: every prompt ends where its response begins."""
    P = max(map(len, rows))
    return torch.tensor([[pad] * (P - len(row)) + row for row in rows])
def right_pad(rows: list[list[int]], pad: int, R: int) -> Tensor:
    """Token lists -> (B, R), PAD behind. A row longer than R is a UserError."""
    if (longest := max(map(len, rows))) > R:
        raise UserError(f"a response of {longest} tokens needs --response >= that; now {R}")
    return torch.tensor([row + [pad] * (R - len(row)) for row in rows])
def encode_prompts(task: Task, prompts: list[str], config: Config) -> Tensor:
    """Texts -> (B, P): BOS, then the problem."""
    return left_pad([[config.bos, *ids] for ids in task.encode(prompts)], config.pad)
def encode_demos(task: Task, demos: list[tuple[str, str]], config: Config) -> list:
    """(prompt, response) texts -> ids, BOS in front of the prompt."""
    xs, ys = task.encode([x for x, _ in demos]), task.encode([y for _, y in demos])
    return [([config.bos, *x], y) for x, y in zip(xs, ys, strict=True)]
def reread(task: Task, x: list[int], y: list[int], c: Config, bad: int | None = None) -> list[int]:
    """What a model reads that rewrites response y to prompt x, ids in and out: x SEP y SEP, without
    PAD and EOS. bad: how many tokens of y stand before a [BAD] marker."""
    mark, sep = task.encode(["<bad>", "<sep>"])
    x, y = ([i for i in ids if i not in (c.pad, c.eos)] for ids in (x, y))
    return x + sep + (y if bad is None else y[:bad] + mark + y[bad:]) + sep

# ==== 4. Model ==================================================================================
# After this section you have read all of a GPT (causal=True) and a masked-diffusion LM (False).
def rope(position: Tensor, config: Config) -> Pair:
    """Rotary angles, arXiv 2104.09864. (B, T) -> cos, sin, each (B, 1, T, head_dim / 2)."""
    exponent = torch.arange(0, config.head_dim, 2, device=position.device) / config.head_dim
    frequency = config.rope_theta**-exponent
    if config.rope_scaling:  # what turns less than `low` times in `old` places turns slower
        factor, low, high, old = map(float, config.rope_scaling.split())
        keep = ((frequency * old / (2 * pi) - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (keep + (1 - keep) / factor)
    angle = position[:, None, :, None] * frequency
    return angle.cos(), angle.sin()
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + head_dim / 2), Llama's layout. (B, H, T, head_dim) -> the same."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
class Cache:
    """Keys and values of what was read so far: room for `length` positions of `rows` rows."""
    def __init__(self, config: Config, rows: int, length: int, like: Tensor):
        shape = (config.layers, 2, rows, config.kv_heads, length, config.head_dim)
        dtype = torch.bfloat16 if config.bf16 else like.dtype
        self.kv = torch.zeros(shape, dtype=dtype, device=like.device)
        self.real = torch.zeros(rows, length, dtype=torch.bool, device=like.device)
        self.used: Any = 0  # as a tensor (1,): all shapes stay as they are, a CUDA graph can replay
    def room(self, real: Tensor) -> tuple[Any, Tensor]:
        """Where the next tokens go, real (B, T) of them; and which of all places seen are real."""
        fixed = isinstance(self.used, Tensor)
        at = self.used.clone() if fixed else slice(self.used, self.used + real.shape[1])
        self.used += real.shape[1]
        self.real[:, at] = real
        return at, self.real if fixed else self.real[:, : self.used]
    def keep(self, rows: Tensor) -> None:
        """These rows go on, in this order: finished ones cost nothing any more."""
        self.kv, self.real = self.kv[:, :, rows, :, :, :], self.real[rows]
class Attention(nn.Module):
    """Grouped-query attention with optional q/k/v bias (Qwen2) and q/k norm (Qwen3)."""
    def __init__(self, c: Config):
        super().__init__()
        self.head_dim, self.grouped = c.head_dim, c.heads != c.kv_heads
        self.q_proj = nn.Linear(c.width, c.heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.width, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.width, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.width, bias=False)
        self.q_norm = nn.RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, kv: Any, at: Any):
        B, T, _ = x.shape  # mask (B, 1, T, S); kv, at: this layer's cache, and where x goes in it
        shape = (B, T, -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)  # (B, H, T, head_dim)
        k = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if kv is not None:  # this layer's slice of the cache, (2, B, kv_heads, length, head_dim)
            kv[0, :, :, at], kv[1, :, :, at] = k, v
            k, v = kv[:, :, :, : mask.shape[-1]]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=self.grouped)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))
class MLP(nn.Module):
    """SwiGLU. arXiv 2002.05202."""
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = nn.Linear(c.width, c.hidden, bias=False)
        self.up_proj = nn.Linear(c.width, c.hidden, bias=False)
        self.down_proj = nn.Linear(c.hidden, c.width, bias=False)
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
class Block(nn.Module):
    """Pre-norm residual block."""
    def __init__(self, c: Config):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = nn.RMSNorm(c.width, c.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(c.width, c.norm_eps)
    def forward(self, x: Tensor, *context: Any) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *context)
        return x + self.mlp(self.post_attention_layernorm(x))
# A Hugging Face config.json: field of Config -> key; families, what they add; Llama 3's rope
HF_KEYS = dict(vocab="vocab_size", width="hidden_size", layers="num_hidden_layers",
    heads="num_attention_heads", kv_heads="num_key_value_heads", head_dim="head_dim",
    hidden="intermediate_size", rope_theta="rope_theta", norm_eps="rms_norm_eps",
    tied="tie_word_embeddings", pad="pad_token_id", bos="bos_token_id", eos="eos_token_id",
    mask="mask_token_id", causal="is_causal", qkv_bias="qkv_bias", qk_norm="qk_norm")  # fmt: skip
HF_FAMILIES = {"llama": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
def read_hf(folder: Path) -> Config:
    """config.json -> Config. What is not understood is a ValueError: else logits are wrong in
    silence. mask = vocab: there is none. PAD is an id that no text has: it is never attended."""
    only = {"model_type": HF_FAMILIES, "hidden_act": ["silu"], "pretraining_tp": [1],
            "rope_type": ["default"], "layer_types": [{"full_attention"}], "mlp_bias": [False],
            "attention_bias": [False], "use_sliding_window": [False], "rope_interleaved": [False]}
    free = """architectures attention_dropout dtype initializer_range is_llama_config torch_dtype
        max_position_embeddings max_window_layers sliding_window transformers_version use_cache
        transformers.js_config unk_token_id _name_or_path _model_name_or_path""".split()  # no logit
    about = json.loads((folder / "config.json").read_text())
    about = {key: x for key, x in about.items() if x is not None}
    about |= about.pop("rope_scaling", {}) | about.pop("rope_parameters", {})  # old, new spelling
    about["layer_types"] = set(about.get("layer_types", ["full_attention"]))
    scaled = about.get("rope_type") == "llama3" and about.pop("rope_type")
    scaling = " ".join(f"{about.pop(key):g}" for key in LLAMA3) if scaled else ""
    rest = {key: x for key, x in about.items() if key not in {*HF_KEYS.values(), *free}}
    if odd := {key: x for key, x in rest.items() if x not in only.get(key, [])}:
        raise ValueError(f"not understood: {odd}")
    heads, eos = about["num_attention_heads"], about["eos_token_id"]
    eos = eos[0] if isinstance(eos, list) else eos
    usual = {"num_key_value_heads": heads, "head_dim": about["hidden_size"] // heads,
             "rms_norm_eps": 1e-6, "mask_token_id": about["vocab_size"], "bos_token_id": eos,
             "pad_token_id": eos}
    about = usual | about | {"eos_token_id": eos}
    if about["pad_token_id"] == eos:
        words = folder / "tokenizer.json"
        words = json.loads(words.read_text())["added_tokens"] if words.exists() else []
        spare = {x["id"] for x in words if x["special"]} - {eos, about["bos_token_id"]}
        about["pad_token_id"] = max(spare, default=about["vocab_size"] - 1)
    given = {field: about[key] for field, key in HF_KEYS.items() if key in about}
    return Config(**HF_FAMILIES[about["model_type"]] | given, rope_scaling=scaling)

class Transformer(nn.Module):
    """ids (B, T) -> logits (B, T, V). `hidden` gives the states (B, T, D) that heads read."""
    def __init__(self, config: Config, generator: torch.Generator | None = None):
        super().__init__()
        self.config = c = config
        self.ahead = 0.0 if c.causal else 1.0  # how much of what comes after it a position sees
        self.embed_tokens = nn.Embedding(c.vocab, c.width)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.width, c.norm_eps)
        self.lm_head = nn.Linear(c.width, c.vocab, bias=False)
        if c.tied:
            self.lm_head.weight = self.embed_tokens.weight
        for name, p in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "bias")):
                nn.init.zeros_(p)  # blocks start as the identity
            elif p.dim() == 2:  # embeddings of 0.1 learned most of 0.02 .. 1
                std = {"embed_tokens.weight": 0.1, "lm_head.weight": 0.02}.get(name)
                nn.init.normal_(p, std=std or p.shape[1] ** -0.5, generator=generator)
    def hidden(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """ids (B, T) -> (B, T, D). With a cache, ids continue what it holds."""
        real = ids != self.config.pad
        at, real = (slice(None), real) if cache is None else cache.room(real)  # (B, S)
        position = (real.cumsum(1) - 1).clamp(min=0)[:, at]  # PAD in front does not count
        key = torch.arange(real.shape[1], device=ids.device)
        query = key[at, None]  # (T, 1)
        mask = real[:, None, None, :]  # (B, 1, 1, S); PAD is never attended
        if self.ahead == 0:
            mask = mask & (key <= query)  # the one line that makes it a GPT
        mask = (mask | (key == query)).log()  # 0 or -inf; PAD sees itself, else a softmax is NaN
        if 0 < self.ahead < 1:  # on the way from a GPT to a diffusion LM
            mask = mask + (key > query) * log(self.ahead)
        x, (cos, sin) = self.embed_tokens(ids), rope(position, self.config)
        again = self.config.recompute and torch.is_grad_enabled()
        with torch.autocast(ids.device.type, torch.bfloat16, self.config.bf16):
            for i, layer in enumerate(self.layers):
                args = (x, cos, sin, mask, None if cache is None else cache.kv[i], at)
                x = checkpoint(layer, *args, use_reentrant=False) if again else layer(*args)
        return self.norm(x)
    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.hidden(ids))
    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, as Hugging Face names them."""
        folder, c = Path(folder), self.config
        family = "qwen3" if c.qk_norm else "qwen2" if c.qkv_bias else "llama"
        about = {"model_type": family, "architectures": [family.capitalize() + "ForCausalLM"]}
        about |= {key: getattr(c, field) for field, key in HF_KEYS.items()} | {"dtype": "float32"}
        if c.rope_scaling:
            scaling = zip(LLAMA3, map(float, c.rope_scaling.split()), strict=True)
            about["rope_scaling"] = {"rope_type": "llama3", **dict(scaling)}
        weights = {"model." * (k != "lm_head.weight") + k: x.contiguous()
                   for k, x in self.state_dict().items() if not (c.tied and k == "lm_head.weight")}
        write_whole(folder / "config.json", lambda p: p.write_text(json.dumps(about, indent=1)))
        write_whole(folder / "model.safetensors", lambda p: save_file(weights, p))
    @classmethod
    def load(cls, folder: str | Path) -> Transformer:
        """A Llama, SmolLM2, Qwen2, Qwen2.5 or Qwen3 folder, or what `save` wrote, in fp32. Raises
        UserError on what is missing, damaged or not understood, before memory is spent."""
        folder, index = Path(folder), Path(folder) / "model.safetensors.index.json"
        try:
            with torch.device("meta"):
                model = cls(read_hf(folder))
            names = json.loads(index.read_text())["weight_map"].values() if index.exists() else ()
            files = [safe_open(folder / x, "pt") for x in sorted({*names}) or ["model.safetensors"]]
            where = {key.removeprefix("model."): (f, key) for f in files for key in f.offset_keys()}
            if model.config.tied:
                where["lm_head.weight"] = where["embed_tokens.weight"]
            shapes = {name: f.get_slice(key).get_shape() for name, (f, key) in where.items()}
            model.load_state_dict({k: torch.empty(x, device="meta") for k, x in shapes.items()})
            weights = {name: f.get_tensor(key).float() for name, (f, key) in where.items()}
            model.load_state_dict(weights, assign=True)
        except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{folder} is no model folder to read: {error!r:.200}") from error
        if model.config.tied:
            model.lm_head.weight = model.embed_tokens.weight
        return model
class Head(nn.Module):
    """A scalar per position: (..., D) -> (...). std=0 for values, 1/sqrt(D+1) for reward models."""
    def __init__(self, config: Config, std: float = 0.0, generator: torch.Generator | None = None):
        super().__init__()
        self.linear = nn.Linear(config.width, 1)
        nn.init.zeros_(self.linear.bias)
        nn.init.normal_(self.linear.weight, std=std, generator=generator)
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)[..., 0]
def frozen_copy(model: Transformer) -> Transformer:
    """The reference: same weights now, no gradient ever."""
    return deepcopy(model).requires_grad_(False)

# ==== 5. Kernel =================================================================================
# Shift, mask, EOS, sign: after this section you can trust every tensor below.
def rng(seed: int, purpose: str, step: int = 0) -> torch.Generator:
    """A CPU generator for one purpose at one step: nothing to save, so a resume is bit-exact."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{step}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
def own(x: Tensor) -> Tensor:
    """The rows that this process works on: under torchrun all hold one batch and share the work."""
    return x[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else x
def over_ranks(x: Tensor) -> Tensor:
    """The sum over all processes, in place: so every count, mean and moment is global."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x
@dataclass
class Rollout:
    """What was sampled, and what a loop learns of it. rollout[rows] selects rows of everything."""
    prompt: Tensor  # (B, P) left-padded
    response: Tensor  # (B, R) tokens incl. EOS, then PAD
    mask: Tensor  # (B, R) 1.0 = counts: up to and including the first EOS
    order: Tensor  # (B, R) step at which a token was fixed; -1 = given, or never written
    group: Tensor  # (B,) prompt index
    logp: Tensor | None = None  # (B, R) under the policy that sampled
    ref_logp: Tensor | None = None  # (B, R)
    value: Tensor | None = None  # (B, R)
    adv: Tensor | None = None  # (B, R)
    ret: Tensor | None = None  # (B, R)
    hidden: Tensor | None = None  # (B, P) what a diffusion LM's likelihood may not see
    def __getitem__(self, rows: Tensor) -> Rollout:
        # columns of PAD alone change nothing and cost time; a diffusion LM's canvas has none
        R = int(((self.mask > 0) | (self.order >= 0))[rows].any(0).nonzero().max()) + 1
        return Rollout(**{k: x[rows] if k in ("prompt", "group", "hidden") else x[rows, :R]
                          for k, x in vars(self).items() if x is not None})
def up_to_eos(response: Tensor, config: Config) -> Tensor:
    """(B, R) ids -> (B, R) mask of the tokens up to and including the first EOS."""
    eos = response == config.eos
    before = (eos.cumsum(1) - eos.long()) == 0
    return (before & (response != config.pad)).float()
def response_part(x: Tensor, P: int) -> Tensor:
    """(B, T, ...) -> (B, R, ...). THE shift, and the only one: position t - 1 predicts token t."""
    return x[:, P - 1 : -1]
def log_softmax(logits: Tensor, temperature: float, config: Config) -> Tensor:
    """Log-probs of what may be produced: PAD and MASK never, in sampler, scorer and loss alike."""
    never = torch.zeros(config.mask + logits.shape[-1], device=logits.device)  # mask may be V: none
    never[[config.pad, config.mask]] = -torch.inf
    return (logits / temperature + never[: logits.shape[-1]]).log_softmax(-1)
def predictive_states(model: Transformer, prompt: Tensor, response: Tensor) -> Tensor:
    """(B, P), (B, R) -> (B, R, D): what predicts each response token; both models are shifted."""
    return response_part(model.hidden(torch.cat([prompt, response], dim=1)), prompt.shape[1])
def gather_logprobs(model: Transformer, states: Tensor, response: Tensor,
                    temperature: float) -> Tensor:
    """Hidden states (B, R, D) -> log-probs of the response tokens (B, R); 0 where PAD."""
    logp = log_softmax(model.lm_head(states), temperature, model.config)
    logp = logp.gather(-1, response[..., None])[..., 0]
    return logp.masked_fill(response == model.config.pad, 0.0)  # not -inf: 0 * inf is NaN
def token_logprobs(model: Transformer, prompt: Tensor, response: Tensor,
                   temperature: float) -> Tensor:
    """log pi(y_k | x, y_<k), (B, R), at the sampler's temperature: else no ratio starts at 1."""
    return gather_logprobs(model, predictive_states(model, prompt, response), response, temperature)
def hide(b: Rollout, c: Config, generator: torch.Generator) -> Tensor:
    """Which prompt tokens one estimate may not see, (B, P): a random share, not PAD or BOS."""
    hidden = torch.rand(b.prompt.shape, generator=generator).to(b.prompt.device) < c.hide_prompt
    return hidden & (b.prompt != c.pad) & (b.prompt != c.bos)
def likelihood(model: Transformer, b: Rollout, c: Config) -> Pair:
    """log pi of each response token (B, R), and the states (B, R, D) that it is read from. For a
    diffusion LM the mean field of arXiv 2504.12216, one pass over a canvas of MASKs: biased."""
    prompt, response = b.prompt, b.response
    if not model.config.causal:
        prompt, response = prompt.masked_fill(b.hidden, c.mask), torch.full_like(response, c.mask)
    states = predictive_states(model, prompt, response)
    return gather_logprobs(model, states, b.response, c.temperature), states
def draw(logits: Tensor, uniform: Tensor, config: Config) -> Tensor:
    """Inverse CDF: logits (..., V), one uniform number each (...) -> token (...). T = 0: greedy."""
    if config.temperature == 0:
        return log_softmax(logits, 1.0, config).argmax(-1)
    cdf = log_softmax(logits, config.temperature, config).to(uniform.dtype).exp().cumsum(-1)
    return (cdf <= uniform[..., None] * cdf[..., -1:]).sum(-1)  # probability 0 has no width

def write_forward(model: Transformer, prompt: Tensor, canvas: Tensor, config: Config,
                  uniform: Tensor) -> Pair:
    """GPT: left to right behind what each canvas (B, R) holds -> canvas, order, each (B, R)."""
    R = canvas.shape[1]
    given, order = canvas != config.pad, torch.full_like(canvas, -1)
    # prompt and prefix move right together, so that all rows write their next token at once
    context = torch.cat([prompt, canvas], dim=1)
    context = context.gather(1, (context != config.pad).int().argsort(dim=1, stable=True))
    context = context[:, (context != config.pad).any(0)]
    rows = (~((canvas == config.eos) | given[:, -1:]).any(1)).nonzero()[:, 0]  # not ended: go on
    if len(rows) == 0:
        return canvas, order
    place, live = given.sum(1)[rows], torch.ones_like(rows, dtype=torch.bool)
    # equal prompts and prefixes are read once, then each row gets its own keys and values
    seen, which = context[rows].unique(dim=0, return_inverse=True)
    cache = Cache(model.config, len(seen), context.shape[1] + R, model.lm_head.weight)
    states = model.hidden(seen, cache)[which, -1]
    cache.keep(which)
    for k in range(R):
        token = draw(model.lm_head(states), uniform[rows, place], config)
        canvas[rows[live], place[live]] = token[live]
        order[rows[live], place[live]] = k
        live = live & (token != config.eos) & (place + 1 < R)
        if not live.any():
            break
        place = (place + 1).clamp(max=R - 1)
        if prompt.is_cuda and k == 0:  # [gpu] from here on all shapes stay as they are
            cache.used = torch.tensor([cache.used], device=prompt.device)  # [gpu]
        elif prompt.is_cuda:  # [gpu] one step is captured, then replayed on the same tensors
            if k == 1:  # [gpu]
                graph, last = torch.cuda.CUDAGraph(), token.clone()  # [gpu]
                with torch.cuda.graph(graph):  # [gpu]
                    states = model.hidden(last[:, None], cache)[:, -1]  # [gpu]
            last.copy_(token)  # [gpu]
            graph.replay()  # [gpu]
            continue  # [gpu]
        elif live.float().mean() < 0.9:  # finished rows leave, once copying the cache pays
            rows, place, token = rows[live], place[live], token[live]
            cache.keep(live)
            live = live[live]
        states = model.hidden(token[:, None], cache)[:, -1]
    return canvas, order
def open_places(block: int, steps: int) -> list[int]:
    """Places of a block open before each of its steps, and at the end: 10, 4 -> 10, 7, 4, 2, 0."""
    return [block - i * (block // steps) - min(i, block % steps) for i in range(steps + 1)]
def unmask(model: Transformer, prompt: Tensor, canvas: Tensor, c: Config, uniform: Tensor) -> Pair:
    """Diffusion LM: blocks from left to right, in each the surest places first (LLaDA, arXiv
    2502.09992). canvas (B, R), MASK = open -> canvas, order, each (B, R).
    A half-open block goes on at its rung of `open_places`: the steps left share what is open."""
    R, b, n = canvas.shape[1], uniform.shape[2], c.block_steps
    ladder = torch.tensor(open_places(b, n), device=prompt.device)
    order = torch.full_like(canvas, -1)
    while (rows := (canvas == c.mask).any(1).nonzero()).numel():  # (B', 1): full rows leave
        y = canvas[rows[:, 0]]
        first = (y == c.mask).int().argmax(1, keepdim=True)  # (B', 1)
        place = (first // b * b).clamp(max=R - b) + torch.arange(b, device=y.device)  # (B', b)
        is_open = y.gather(1, place) == c.mask
        m = is_open.sum(1, keepdim=True)  # (B', 1), how many of its places are open
        below = ladder < m  # (B', n + 1), the rungs that are left
        now = first // b * n + n - below.sum(1, keepdim=True)  # n a block before, and rungs passed
        # equal rows are read once: at first all samples of a prompt are
        seen, which = torch.cat([prompt[rows[:, 0]], y], 1).unique(dim=0, return_inverse=True)
        states = response_part(model.hidden(seen), prompt.shape[1])[which[:, None], place]
        logits = model.lm_head(states)  # (B', b, V)
        token = draw(logits, uniform[rows[:, 0], now[:, 0]], c)
        # sure = the untempered probability of what was drawn, not of a perturbed logit
        sure = log_softmax(logits, 1.0, c).gather(-1, token[..., None])[..., 0]
        rank = sure.masked_fill(~is_open, -torch.inf).argsort(dim=1, descending=True, stable=True)
        chosen = rank.argsort(1) < m - (ladder * below).amax(1, keepdim=True)  # to the next rung
        canvas[rows, place] = torch.where(chosen, token, canvas[rows, place])
        order[rows, place] = torch.where(chosen, now, order[rows, place])
    return canvas, order

@torch.no_grad()
def sample(model: Transformer, prompt: Tensor, config: Config, start: Tensor | None = None,
           group: Tensor | None = None, generator: torch.Generator | None = None) -> Rollout:
    """Write a response to each row of prompt (B, P), or fill the PAD and MASK of `start` (B, R).
    Uniform numbers are drawn first: no row's sample depends on another's. T = 0 is greedy."""
    writer, hole = (write_forward, config.pad) if model.config.causal else (unmask, config.mask)
    start = prompt.new_full((len(prompt), config.response), hole) if start is None else start
    start = start.masked_fill((start == config.pad) | (start == config.mask), hole)
    R, b = start.shape[1], min(config.block, start.shape[1])
    numbers = (R,) if model.config.causal else (-(-R // b) * config.block_steps, b)
    uniform = torch.rand(len(start), *numbers, dtype=torch.float64, generator=generator)
    uniform = (uniform.float() * (1 - 1e-6) if prompt.is_mps else uniform).to(prompt.device)
    written = start.new_zeros(len(start), 2, R)
    own(written)[:] = torch.stack(writer(model, own(prompt), own(start), config, own(uniform)), 1)
    canvas, order = over_ranks(written).unbind(1)
    group = torch.arange(len(prompt), device=prompt.device) if group is None else group
    return Rollout(prompt, canvas, up_to_eos(canvas, config), order, group)
def state_at(response: Tensor, order: Tensor, step: Tensor, config: Config) -> Tensor:
    """The canvas (B, R) before `step` (B,): what was fixed then or later is MASK again."""
    return response.masked_fill(order >= step[:, None], config.mask)
def k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Log-ratio = policy - reference, on the policy's samples. E[k1] = KL(policy, reference).
    Can be negative. As a loss its expected gradient is zero, unlike k3's: use it in the reward."""
    return logp - ref_logp
def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """exp(-k1) - 1 + k1: the same expectation as k1, never negative. As a loss its gradient pulls
    towards the reference, but is that of KL(reference, policy), not of KL(policy, reference)."""
    return (ref_logp - logp).exp() - 1 - (ref_logp - logp)

def gae(reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float) -> Pair:
    """(13) generalized advantage estimation, arXiv 1506.02438. All (B, R) -> advantage, return.
    delta_k = r_k + gamma V_{k+1} - V_k, with V = 0 behind the last counted token
    A_k     = delta_k + gamma lam A_{k+1};   R_k = A_k + V_k, before any whitening"""
    value = value * mask
    adv, later, next_value = [], torch.zeros_like(value[:, 0]), torch.zeros_like(value[:, 0])
    for k in reversed(range(value.shape[1])):
        delta = reward[:, k] + gamma * next_value - value[:, k]
        later = (delta + gamma * lam * later) * mask[:, k]
        next_value = value[:, k]
        adv.append(later)
    adv = torch.stack(adv[::-1], dim=1)
    return adv, adv + value
def whiten(x: Tensor, mask: Tensor, shift: bool = True) -> Tensor:
    """Variance 1 over counted tokens, mean 0 too with shift. (B, R) -> (B, R), 0 off the mask.
    Population variance (divide by n), as in the original RLHF code; several libraries use n - 1."""
    n = mask.sum()
    mean = (x * mask).sum() / n
    variance = ((x - mean) ** 2 * mask).sum() / n
    white = (x - mean) * (variance + 1e-8).rsqrt()
    return (white if shift else white + mean) * mask
def group_advantage(reward: Tensor, group: Tensor, kind: str) -> Tensor:
    """Reward (B,) against the other samples of the same prompt, group (B,) -> (B,).
    mean: r - mean.   grpo (15): over (unbiased std + 1e-4).   rloo (16): r - mean of the others.
    Equal rewards in a group give exactly zero; so does a group of one."""
    def total(x: Tensor) -> Tensor:  # sum over the own group, (B,)
        return x.new_zeros(int(group.max()) + 1).index_add(0, group, x)[group]
    count = total(torch.ones_like(reward))
    adv = reward - total(reward) / count
    adv = adv.masked_fill(adv.abs() < 1e-6, 0.0)  # rounding is no reward
    if kind == "grpo":
        std = (total(adv**2) / (count - 1).clamp(min=1)).sqrt()
        adv = adv / (std + 1e-4)
    if kind == "rloo":
        adv = adv * count / (count - 1).clamp(min=1)
    return adv

# ==== 6. Losses =================================================================================
# Pure functions of tensors. `denom` counts the WHOLE optimizer step: a mean of micro-batch means is
# another loss. After this every loop reads as signal -> credit -> loss.
def nll_loss(logp: Tensor, mask: Tensor, denom: Tensor | int) -> Tensor:
    """Maximum likelihood: logp, mask (B, R) -> scalar; prompt tokens never enter."""
    return -(logp * mask).sum() / denom
def ppo_loss(logp: Tensor, old_logp: Tensor, adv: Tensor, mask: Tensor, denom: Tensor,
             clip: float) -> Tensor:
    """(14) clipped surrogate, arXiv 1707.06347. logp, old_logp, adv, mask (B, R) -> scalar."""
    # 1/denom sum_k min( rho_k A_k, clip(rho_k, 1-e, 1+e) A_k )
    ratio = (logp - old_logp).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    objective = torch.minimum(ratio * adv, clipped * adv)  # the min only ever lowers the promise
    return -(objective * mask).sum() / denom
def value_loss(value: Tensor, old_value: Tensor, ret: Tensor, mask: Tensor, denom: Tensor,
               clip: float | None) -> Tensor:
    """(14) value part with its 1/2, without c_v. All (B, R) -> scalar. clip=None: plain squares."""
    # 1/2 1/denom sum_k max( (V - R)^2, (clip(V, V_old-e, V_old+e) - R)^2 )
    error = (value - ret) ** 2
    if clip is not None:
        near = old_value + (value - old_value).clamp(-clip, clip)
        error = torch.maximum(error, (near - ret) ** 2)  # max, not min: pessimistic
    return 0.5 * (error * mask).sum() / denom
def dpo_loss(logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor, len_w: Tensor,
             beta: float, alpha: float) -> Pair:
    """(9) iterative reasoning preference optimization, arXiv 2404.19733v3. alpha=0 is plain DPO.
    All (B,) -> scalar, margin (B,). Log-probs are SUMS over tokens; only the NLL is divided by its
    own length, and alpha multiplies the NLL (version 1 had it on the other term)."""
    # log sigma( beta [ (logp_w - ref_w) - (logp_l - ref_l) ] ) + alpha logp_w / |y_w|
    margin = (logp_w - ref_w) - (logp_l - ref_l)
    objective = (F.logsigmoid(beta * margin) + alpha * logp_w / len_w).mean()
    return -objective, margin.detach()
def rate_masks(like: Tensor, generator: torch.Generator, t_min: float) -> Pair:
    """What (1) hides of like (B, R), each row at its rate t -> hidden (B, R), 1/t (B, 1)."""
    B, device = len(like), like.device
    # stratified, a row in each B-th part of [t_min, 1]; in random order, as rows may be sorted
    t = (torch.randperm(B, generator=generator) + torch.rand(B, generator=generator)) / B
    t = t_min + (1 - t_min) * t[:, None]
    return (torch.rand(like.shape, generator=generator) < t).to(device), (1 / t).to(device)
def masked_nll(model: Transformer, prompt: Tensor, response: Tensor, hidden: Tensor,
               weight: Tensor) -> Tensor:
    """The integrand of (1): weight * sum over hidden tokens of -log p(y_k | x, rest) -> (B,)."""
    states = predictive_states(model, prompt, response.masked_fill(hidden, model.config.mask))
    logp = gather_logprobs(model, states, response, temperature=1.0)
    return -(logp * hidden * weight).sum(1)
def diffusion_loss(model: Transformer, prompt: Tensor, response: Tensor, generator: torch.Generator,
                   rows: Tensor | slice = slice(None)) -> Tensor:
    """(1) masked diffusion, arXiv 2502.09992: (B, P), (B, R) -> scalar, nats a place.
    The prompt is never hidden. PAD behind the end becomes EOS and is learned: so the model stops.
    rows: a micro-batch; what is hidden is drawn for all B, so the parts sum up to the whole."""
    # E_t E_hidden [ 1/t sum_k 1[hidden] log p(y_k | x, the rest) ] / R: by R, not by the hidden
    c = model.config
    response = response.masked_fill(response == c.pad, c.eos)
    hidden, weight = rate_masks(response, generator, c.t_min)
    nll = masked_nll(model, prompt[rows], response[rows], hidden[rows], weight[rows])
    return nll.sum() / response.numel()
def preference_loss(score_w: Tensor, score_l: Tensor) -> Tensor:
    """Bradley-Terry: scores (B,) of preferred and other -> scalar -log sigma(s_w - s_l)."""
    return -F.logsigmoid(score_w - score_l).mean()
def binary_loss(score: Tensor, label: Tensor, mask: Tensor, denom: Tensor | int) -> Tensor:
    """Cross-entropy of sigmoid(score) against labels 0 or 1; all (...) -> scalar."""
    # 1/denom sum [ y log sigma(s) + (1 - y) log sigma(-s) ]
    objective = label * F.logsigmoid(score) + (1 - label) * F.logsigmoid(-score)
    return -(objective * mask).sum() / denom

# ==== 7. Training ===============================================================================
# After this section nothing between a loss and a changed weight is unknown.
Loss = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]  # row indices -> scalar, metrics
Batches = Callable[[int], tuple[Tensor, Loss]]  # update -> row indices, their loss

class Muon(torch.optim.Optimizer):
    """W <- W - lr sqrt(max(1, rows/cols)) UV' for momentum M = USV' (Jordan et al. 2024), fp32, all
    matrices of one shape at once: torch.optim.Muon's bf16 takes ten times as long on a CPU."""
    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95):
        shapes = dict.fromkeys(p.shape for p in params)
        groups = [{"params": [p for p in params if p.shape == shape]} for shape in shapes]
        super().__init__(groups, dict(lr=lr, peak_lr=lr, momentum=momentum))
    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            grad = torch.stack([p.grad for p in group["params"]])  # (n, rows, cols)
            smooth = self.state[group["params"][0]].setdefault("smooth", torch.zeros_like(grad))
            smooth.lerp_(grad, 1 - group["momentum"])
            x = grad.lerp(smooth, group["momentum"])  # Nesterov: look one step ahead
            tall = x.shape[1] > x.shape[2]
            x = x.mT if tall else x  # the shorter side makes the cheaper x x'
            x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
            # s <- 3.4445 s - 4.7750 s^3 + 2.0315 s^5 sends singular values near 1
            for _ in range(5):
                gram = x @ x.mT
                x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
            scale = group["lr"] * max(1.0, grad.shape[1] / grad.shape[2]) ** 0.5
            for p, update in zip(group["params"], x.mT if tall else x, strict=True):
                p.sub_(scale * update)
def optimizers(modules: list[nn.Module], lr: float, config: Config, muon_lr: float = 0.0) -> list:
    """AdamW for everything; with a muon_lr, Muon for the matrices of the blocks."""
    named = [pair for module in modules for pair in module.named_parameters()]
    blocks = [p for name, p in named if muon_lr and name.startswith("layers") and p.dim() == 2]
    rest = [p for _, p in named if all(p is not chosen for chosen in blocks)]
    adamw = torch.optim.AdamW([{"params": rest, "peak_lr": lr}], lr, betas=(0.9, 0.95),
                              eps=config.adam_eps, weight_decay=0.0, fused=rest[0].is_cuda or None)
    return [Muon(blocks, muon_lr), adamw] if blocks else [adamw]
def schedule(update: int, updates: int, warmup: int) -> float:
    """Linear warm-up times a linear decay that starts at once: the peak itself is not reached."""
    return min(1.0, (update + 1) / warmup) * (1 - update / updates)
def step(state: dict, loss: Loss, rows: Tensor, config: Config, share: float = 1.0) -> dict:
    """One optimizer step over `rows`: accumulate, clip, update -> metrics. loss(micro) and
    its metrics are summed: divide by the count of the whole step, then micro changes nothing."""
    metrics: dict[str, Tensor] = {}
    if dist.is_initialized() and len(rows) < dist.get_world_size():
        raise UserError(f"an optimizer step over {len(rows)} rows is too small for all processes")
    for micro in own(rows).split(config.micro):
        value, more = loss(micro)
        value.backward()
        for name, x in {"loss": value.detach(), **more}.items():
            metrics[name] = metrics.get(name, 0.0) + x
    groups = [group for optimizer in state["optimizers"] for group in optimizer.param_groups]
    params = [p for group in groups for p in group["params"]]
    for p in params:  # a sum, as denom is global; DDP's mean would need the count of one process
        p.grad = over_ranks(torch.zeros_like(p) if p.grad is None else p.grad)
    metrics = {name: over_ranks(torch.as_tensor(x)) for name, x in metrics.items()}
    metrics["grad_norm"] = nn.utils.clip_grad_norm_(params, config.clip_grad)
    if not metrics["grad_norm"].isfinite():  # one such step would make every weight NaN
        raise UserError("training diverged: the gradient is not finite; lower the learning rate")
    for group in groups:
        group["lr"] = group["peak_lr"] * share
    for optimizer in state["optimizers"]:
        optimizer.step()
        optimizer.zero_grad()
    return {name: float(x) for name, x in metrics.items()} | {"lr": groups[-1]["lr"]}

def fit(state: dict, batch: Batches, updates: int, config: Config) -> Iterator[dict[str, float]]:
    """Supervised training of what state["optimizers"] holds; yields metrics after each update."""
    while (u := state["update"]) < updates:
        rows, loss = batch(u)
        metrics = step(state, loss, rows, config, schedule(u, updates, config.base_warmup))
        state["update"] += 1
        yield metrics

def demonstrations(model: Transformer, task: Task, c: Config, demos: list | None = None) -> Batches:
    """Batches of ids (prompt, response) for `fit`, by default the task's own; EOS is trained too.
    The diffusion LM looks ahead a little, then more (attention annealing, arXiv 2410.17891), and
    rehearses as a GPT in every second update: 40 % greedy, 29 % without, 4 % with neither."""
    generator, device = rng(c.seed, "demonstrations"), model.lm_head.weight.device
    if demos is not None and not demos:
        raise UserError("of the responses drawn none was right, nothing to learn: more prompts")
    demos = demos or encode_demos(task, [task.demo(generator) for _ in range(c.demos)], c)
    prompt = left_pad([x for x, _ in demos], c.pad).to(device)
    response = right_pad([y for _, y in demos], c.pad, c.response).to(device)
    asked, length = ((ids != c.pad).sum(1).cpu() for ids in (prompt, response))  # CPU, as rows
    def batch(u: int) -> tuple[Tensor, Loss]:
        rows = torch.randint(len(demos), (c.base_batch,), generator=rng(c.seed, "batch", u))
        rows = rows[(asked + length)[rows].argsort(stable=True)]  # like lengths: little PAD
        x, y, denom = prompt[rows], response[rows], int(length[rows].sum())
        rehearses = c.look_ahead > 0 and (c.diffusion_updates - u) % 2 == 0  # never the last update
        as_gpt, until = model.config.causal or rehearses, c.look_ahead * c.diffusion_updates
        model.ahead = 0.0 if as_gpt else min(1.0, (u + 1) / until) ** 2 if until else 1.0
        def next_token(micro: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            P, R = (int(n[rows[micro]].max()) for n in (asked, length))  # no column of PAD alone
            logp = token_logprobs(model, x[micro, -P:], y[micro, :R], temperature=1.0)
            return nll_loss(logp, y[micro, :R] != c.pad, denom), {}
        def unmasking(micro: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return diffusion_loss(model, x, y, rng(c.seed, "hidden", u), micro), {}
        return torch.arange(len(rows)), next_token if as_gpt else unmasking
    return batch

# ==== 8. Evaluation =============================================================================
# After this section the numbers in the tables have a definition.
def respond(model: Transformer, task: Task, prompts: list[str], config: Config,
            generator: torch.Generator | None = None) -> list[str]:
    """One response text a prompt, at config.temperature (0: greedy)."""
    prompt = encode_prompts(task, prompts, config).to(model.lm_head.weight.device)
    response = sample(model, prompt, config, generator=generator).response
    return [task.decode(ids) for ids in response.tolist()]
def accuracy(model: Transformer, task: Task, prompts: list[str], config: Config,
             temperature: float = 0.0) -> float:
    """Mean true reward of one response to each prompt; temperature 0 is greedy."""
    config = replace(config, temperature=temperature)
    texts = respond(model, task, prompts, config, rng(config.seed, "evaluate"))
    return sum(task.grade(x, y) for x, y in zip(prompts, texts, strict=True)) / len(prompts)
def pass_at_k(n: int, c: int, k: int) -> float:
    """P(one of k samples is right), unbiased from c right ones of n. arXiv 2107.03374, eq. 1."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    return 1 - comb(n - c, k) / comb(n, k)
def majority(answers: list[str | None]) -> str | None:
    """The most frequent answer, ties broken by first seen; None (no answer) never wins over one."""
    given = [a for a in answers if a is not None]
    return max(dict.fromkeys(given), key=given.count) if given else None

# ==== 9. State ==================================================================================
# After this section you know why a killed run goes on bit for bit.
def save_state(folder: str | Path, state: dict) -> None:
    """All that lives across updates -> folder/state.pt. No generators are in it: see `rng`."""
    def plain(x: Any) -> Any:
        if isinstance(x, dict):
            return {name: plain(y) for name, y in x.items()}
        if isinstance(x, list):
            return [plain(y) for y in x]
        return x.state_dict() if isinstance(x, (nn.Module, torch.optim.Optimizer)) else x
    write_whole(Path(folder) / "state.pt", lambda path: torch.save(plain(state), path))
def load_state(folder: str | Path, into: dict | None = None) -> dict:
    """What save_state wrote; with `into`, its modules and optimizers are filled, the rest replaced.
    Raises UserError if the file is missing or damaged. weights_only: no code in it is ever run."""
    path, parts = Path(folder) / "state.pt", (nn.Module, torch.optim.Optimizer)
    if not path.exists():
        raise UserError(f"{folder} holds no state.pt; name the folder of a run that was started")
    def fill(mine: Any, theirs: Any) -> Any:
        if isinstance(mine, list) and mine and isinstance(mine[0], parts):
            return [fill(x, y) for x, y in zip(mine, theirs, strict=True)]
        if isinstance(mine, parts):
            mine.load_state_dict(theirs)
        elif isinstance(mine, dict):
            mine.update({name: fill(mine.get(name), x) for name, x in theirs.items()})
        return mine if isinstance(mine, (dict, *parts)) else theirs
    where = into["policy"].lm_head.weight.device if into and "policy" in into else "cpu"
    try:
        return fill(into or {}, torch.load(path, weights_only=True, map_location=where))
    except Exception as error:  # torch.load may raise almost anything
        raise UserError(f"{path} is damaged or of other code, delete it: {error!r:.100}") from error

# ==== 10. Reward models =========================================================================
# After this section "the reward" is a tensor (B, R), whoever gave it.
# each signal: state, task, b, truth (B,) -> reward (B, R)
def grades(task: Task, rollout: Rollout) -> Tensor:
    """The true reward of each response, (B,): always logged, learned from or not."""
    both = zip(rollout.prompt.tolist(), rollout.response.tolist(), strict=True)
    scores = [task.grade(task.decode(x), task.decode(y)) for x, y in both]
    return torch.tensor(scores, device=rollout.prompt.device)
def at_end(score: Tensor, rollout: Rollout, config: Config) -> Tensor:
    """Score (B,) -> (B, R), on the last REAL token, not the PAD behind it; no EOS: the penalty."""
    ended = ((rollout.response == config.eos) & (rollout.mask > 0)).any(1)
    last = rollout.mask.sum(1).long() - 1
    reward = torch.zeros_like(rollout.mask)
    return reward.scatter(1, last[:, None], torch.where(ended, score, config.no_eos)[:, None])
def response_score(scorer: Transformer, head: Head, prompt: Tensor, response: Tensor) -> Tensor:
    """(B, P), (B, R) -> (B,): the head, unshifted, on the last real token, prompt read."""
    states = scorer.hidden(torch.cat([prompt, response], dim=1))
    last = prompt.shape[1] + up_to_eos(response, scorer.config).sum(1).long() - 1
    return head(states[torch.arange(len(last), device=last.device), last])
def verifier(state: dict, task: Task, b: Rollout, truth: Tensor, c: Config) -> Tensor:
    """The task's own grader as reward."""
    return at_end(truth, b, c)
@torch.no_grad()
def learned(state: dict, task: Task, b: Rollout, truth: Tensor, c: Config) -> Tensor:
    """A Bradley-Terry model's score (train_small.py trains it), whatever the truth."""
    return at_end(response_score(state["scorer"], state["scorer_head"], b.prompt, b.response), b, c)
def agreement_reward(logits: Tensor, response: Tensor, mask: Tensor, top: int = 1,
                     least: float = 0.0, c_pos: float = 1.0, c_neg: float = 1.0) -> Tensor:
    """(11) sequence-to-sequence reward, arXiv 2409.00162: the rewriter's logits (B, R, V) of each
    response token, given the response before it; response, mask (B, R) -> (B, R)."""
    # m_k = 1[y_k = argmax_v g(v | x, y, y_<k)];  d = the first k with m_k = 0
    # r_k = c_pos for k < d, -c_neg (1 - m_k) from d on
    mine = logits.gather(-1, response[..., None])
    disagrees = (logits > mine).sum(-1) >= top
    if least > 0:
        disagrees = (mine - logits.logsumexp(-1, keepdim=True))[..., 0] < log(least)
    off = disagrees.float() * mask
    return (c_pos * (off.cumsum(1) == 0) - c_neg * off) * mask
@torch.no_grad()
def agreement(state: dict, task: Task, b: Rollout, truth: Tensor, c: Config) -> Tensor:
    """(11) by the rewriter, one teacher-forced pass. DEVIATION: no EOS costs no_eos here too."""
    both = zip(b.prompt.tolist(), b.response.tolist(), strict=True)
    asked = left_pad([reread(task, x, y, c) for x, y in both], c.pad).to(b.prompt.device)
    reward, length = at_end(torch.zeros_like(truth), b, c), b.mask.sum(1, keepdim=True)
    for rows in torch.arange(len(asked)).split(c.micro):
        y, mask, rewriter = b.response[rows], b.mask[rows], state["rewriter"]
        logits = log_softmax(rewriter.lm_head(predictive_states(rewriter, asked[rows], y)), 1.0, c)
        score = agreement_reward(logits, y, mask, c.top, c.least, c.c_pos, c.c_neg)
        reward[rows] += score / length[rows] if c.per_token else score
    return reward
SIGNALS = {"verifier": verifier, "learned": learned, "seq2seq": agreement}
def rewriting_demos(task: Task, pairs: list[tuple[str, str, str]], config: Config) -> list:
    """(10) what the rewriter learns, in ids: (x, other) and (x, preferred) -> preferred."""
    x, w, y = (task.encode([pair[i] for pair in pairs]) for i in range(3))
    rows = [*zip(x, y, w, strict=True), *zip(x, w, w, strict=True)]
    return [(reread(task, [config.bos, *ids], given, config), to) for ids, given, to in rows]
def rollout_labels(success: Tensor, uses: Tensor | None = None) -> Tensor:
    """(8) GLoRe, arXiv 2402.10963: success of K continuations of each prefix (B, S, K) -> (B, S).
    uses: if they use its last result, else they do not count. The first bad one is the error."""
    # y_s = 1[any_k success_sk];  y_s = 1 => y_j = 1 for j <= s
    good = (success if uses is None else success & uses).any(-1)
    return good.flip(1).cummax(1).values.flip(1)
def balance(labels: Tensor, position: Tensor, generator: torch.Generator) -> Tensor:
    """Keep (n,) as many good as bad examples of each position, else "late is bad" is learned."""
    keep = torch.zeros_like(labels, dtype=torch.bool)
    for p in position.unique():
        at = (position == p).nonzero()[:, 0]
        at = at[torch.randperm(len(at), generator=generator).to(at.device)]
        good, bad = at[labels[at] > 0], at[labels[at] <= 0]
        n = min(len(good), len(bad))
        keep[torch.cat([good[:n], bad[:n]])] = True
    return keep
def first_error(scores: Tensor, threshold: float) -> int:
    """The first step whose score is below the threshold; (S,) -> 0..S, S if none is."""
    return int((scores >= threshold).cumprod(0).sum())  # how many stand before it
def prefix_ends(task: Task, b: Rollout) -> Tensor:
    """How many tokens each prefix of a response has, (B, S): 0, up to each step, all; then -1."""
    lengths = b.mask.sum(1).long().tolist()
    rows = [list(dict.fromkeys([0, *(end + 1 for _, end in task.steps(y[:n])), n]))
            for y, n in zip(b.response.tolist(), lengths, strict=True)]  # n may end a step
    return right_pad(rows, -1, max(map(len, rows))).to(b.response.device)
def step_scores(state: dict, prompt: Tensor, response: Tensor, ends: Tensor) -> Tensor:
    """Logits of ORM and SORM, unshifted, on the last token of every prefix: -> (2, B, S)."""
    states = state["scorer"].hidden(torch.cat([prompt, response], dim=1))
    at = (prompt.shape[1] + ends - 1).clamp(min=0)[..., None]  # the empty prefix: the prompt's end
    states = states.gather(1, at.expand(-1, -1, states.shape[2]))
    return torch.stack([state["orm"](states), state["sorm"](states)])
def step_batches(state: dict, b: dict[str, Tensor], c: Config) -> Batches:
    """Batches of labelled drafts for `fit`: one trunk, two heads, each with its own labels.
    b: prompt (B, P), response (B, R), ends (B, S); label, keep (2, B, S) for ORM and SORM."""
    length = b["ends"].amax(1).cpu()
    def batch(u: int) -> tuple[Tensor, Loss]:
        rows = torch.randint(len(length), (c.labels_each,), generator=rng(c.seed, "step batch", u))
        rows = rows[length[rows].argsort(stable=True)]
        denom = b["keep"][:, rows].sum((1, 2), keepdim=True).clamp(min=1)
        def loss(micro: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            y = b["response"][micro, : int(length[micro].max())]
            score = step_scores(state, b["prompt"][micro], y, b["ends"][micro])
            label, weight = b["label"][:, micro], b["keep"][:, micro] / denom
            right = (((score > 0) == (label > 0)) * weight).sum((1, 2))
            return binary_loss(score, label, weight, 1), {"orm": right[0], "sorm": right[1]}
        return rows, loss
    return batch
def preference_batches(scorer: Transformer, head: Head, pairs: list, task: Task,
                       c: Config) -> Batches:
    """Batches of (prompt, preferred, other) texts for `fit`, Bradley-Terry loss."""
    x, *both = (list(texts) for texts in zip(*pairs, strict=True))
    prompt = encode_prompts(task, x, c).to(scorer.lm_head.weight.device)
    both = [right_pad(task.encode(y), c.pad, c.response).to(prompt.device) for y in both]
    def batch(u: int) -> tuple[Tensor, Loss]:
        rows = torch.randint(len(x), (c.base_batch,), generator=rng(c.seed, "pairs", u))
        def loss(micro: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            score_w, score_l = (response_score(scorer, head, prompt[micro], y[micro]) for y in both)
            share = len(micro) / len(rows)
            right = (score_w > score_l).float().mean()
            return preference_loss(score_w, score_l) * share, {"pair_accuracy": right * share}
        return rows, loss
    return batch
@torch.no_grad()
def normalize_head(scorer: Transformer, head: Head, rollout: Rollout) -> None:
    """Gain and bias for mean 0 and variance 1 over the reference's samples.
    DEVIATION: scores are normalized after training only; the original code also does it before."""
    score = response_score(scorer, head, rollout.prompt, rollout.response)
    gain = 1 / score.std(unbiased=False).clamp(min=1e-4)
    head.linear.weight.mul_(gain)
    head.linear.bias.sub_(score.mean()).mul_(gain)

# ==== 11. Loops =================================================================================
# Generators of four phases: all that lives across updates is in `state`, each update yields its
# metrics. To log, save and draw bars is train_small.py's part.
def in_groups(task: Task, texts: list[str], config: Config) -> Pair:
    """Problems, each G times: prompt (B, P), group (B,)."""
    group = torch.arange(len(texts)).repeat_interleave(config.samples)
    return encode_prompts(task, texts, config)[group], group
def rollout_metrics(rollout: Rollout, reward: Tensor, truth: Tensor, config: Config) -> dict:
    """What to watch: masked means over all responses; a diffusion LM's entropy is mean field."""
    score = reward.sum(1)
    low, high = score.view(-1, config.samples).aminmax(dim=1)
    return {"reward": float(score.mean()), "truth": float(truth.mean()),
            "entropy": float(-(rollout.logp * rollout.mask).sum() / rollout.mask.sum()),
            "length": float(rollout.mask.sum(1).mean()),
            "ended": float((rollout.response == config.eos).any(1).float().mean()),
            "flat_groups": float((high == low).float().mean())}  # 1: grpo and rloo learn nothing

# ---- ppo: three credits, three losses ----------------------------------------------------------
def gae_credit(b: Rollout, reward: Tensor, c: Config) -> Pair:
    """Critic: per-token KL in the reward (12), advantages by (13), whitened. -> adv, ret (B, R)."""
    # (12) r_k = -beta (logp_k - ref_logp_k) + 1[k = last] score
    reward = (reward - c.beta * k1(b.logp, b.ref_logp)) * b.mask
    if c.whiten_reward:
        reward = whiten(reward, b.mask, shift=False)  # a shifted mean would pay for length
    adv, ret = gae(reward, b.value, b.mask, c.gamma, c.lam)
    return whiten(adv, b.mask), ret
def grpo_credit(b: Rollout, reward: Tensor, c: Config) -> Pair:
    """(15) one number a response, against its group; the KL is in the loss, not here."""
    adv = group_advantage(reward.sum(1), b.group, "grpo")
    return adv[:, None] * b.mask, torch.zeros_like(reward)
def rloo_credit(b: Rollout, reward: Tensor, c: Config) -> Pair:
    """(16) R_i = r_i - beta sum_k k1, KL before the baseline; A_i = R_i - mean of the other R_j."""
    total = (reward - c.beta * k1(b.logp, b.ref_logp) * b.mask).sum(1)
    adv = group_advantage(total, b.group, "rloo")
    return adv[:, None] * b.mask, torch.zeros_like(reward)
# each objective: logp, value (B, R) by the policy now, b as it was sampled, denom -> scalar
def critic_objective(logp: Tensor, value: Tensor, b: Rollout, denom: Tensor, c: Config) -> Tensor:
    """(14) L = L_pi + c_v L_V."""
    # DEVIATION: no value band once rewards are rescaled to variance 1; 0.2 would be absurd
    band = None if c.whiten_reward or not c.value_clip else c.value_clip
    policy_part = ppo_loss(logp, b.logp, b.adv, b.mask, denom, c.clip)
    return policy_part + c.value_coef * value_loss(value, b.value, b.ret, b.mask, denom, band)
def grpo_objective(logp: Tensor, value: Tensor, b: Rollout, denom: Tensor, c: Config) -> Tensor:
    """(2), and (15) with a DEVIATION: one mean over all tokens, not one per response."""
    kl = (k3(logp, b.ref_logp) * b.mask).sum() / denom
    return ppo_loss(logp, b.logp, b.adv, b.mask, denom, c.clip) + c.beta * kl
def rloo_objective(logp: Tensor, value: Tensor, b: Rollout, denom: Tensor, c: Config) -> Tensor:
    """(16) DEVIATION: clipped token ratios; on-policy that is REINFORCE over the token count."""
    return ppo_loss(logp, b.logp, b.adv, b.mask, denom, c.clip)
ARMS = {"gae": (gae_credit, critic_objective), "grpo": (grpo_credit, grpo_objective),
        "rloo": (rloo_credit, rloo_objective)}
def start_ppo(policy: Transformer, config: Config) -> dict[str, Any]:
    """A fresh state: policy and value head, frozen reference, optimizer, counters."""
    head = Head(config).to(policy.lm_head.weight.device)  # zero: the first critic expects nothing
    return {"policy": policy, "head": head, "reference": frozen_copy(policy),
            "optimizers": optimizers([policy, head], config.lr, config), "beta": config.beta,
            "samples": 0, "update": 0, "updates": config.updates}

@torch.no_grad()
def annotate(state: dict, rollout: Rollout, c: Config, estimate: Callable = likelihood) -> Rollout:
    """Log-probs of policy and reference and values, once a batch, at the sampling temperature."""
    found = rollout.mask.new_zeros(3, *rollout.mask.shape)
    by_length = rollout.mask.sum(1).cpu().argsort(stable=True)  # like lengths together: little PAD
    for rows in own(by_length).split(c.micro):
        part = rollout[rows]
        logp, states = estimate(state["policy"], part, c)
        ref_logp = estimate(state["reference"], part, c)[0]
        found[:, rows, : logp.shape[1]] = torch.stack([logp, ref_logp, state["head"](states)])
    logp, ref_logp, value = over_ranks(found)
    return replace(rollout, logp=logp, ref_logp=ref_logp, value=value)
def adapt_beta(beta: float, kl: float, episodes: int, config: Config) -> float:
    """KL controller, arXiv 1909.08593; kl and target in nats a response, target 0: unchanged."""
    # beta <- beta (1 + clip(KL / target - 1, -.2, .2) n / horizon)
    error = max(-0.2, min(0.2, kl / config.kl_target - 1)) if config.kl_target else 0.0
    return beta * (1 + error * episodes / config.kl_horizon)

def policy_update(state: dict, views: list[Rollout], objective: Callable, c: Config,
                  estimate: Callable = likelihood) -> dict[str, float]:
    """`epochs` passes over a batch, each over its next view: the same samples, other log-probs."""
    policy, head, u, logs = state["policy"], state["head"], state["update"], []
    share, length = schedule(u, state["updates"], c.warmup), views[0].mask.sum(1).cpu()
    for i in range(c.epochs):
        seen, generator = views[i % len(views)], rng(c.seed, "minibatch", u * c.epochs + i)
        for rows in torch.randperm(len(length), generator=generator).split(c.minibatch):
            rows = rows[length[rows].argsort(stable=True)]  # like lengths together: little PAD
            denom = seen.mask[rows].sum()
            def loss(micro: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
                b = seen[micro]
                logp, states = estimate(policy, b, c)
                off = (((logp - b.logp).exp() - 1).abs() > c.clip) * b.mask
                return objective(logp, head(states), b, denom, c), {"clipfrac": off.sum() / denom}
            logs.append(step(state, loss, rows, c, share))
    kl = float((k1(views[0].logp, views[0].ref_logp) * views[0].mask).sum(1).mean())
    mean = {name: sum(log[name] for log in logs) / len(logs) for name in logs[0]}
    return mean | {"kl": kl, "beta": c.beta}

def ppo(state: dict, task: Task, config: Config) -> Iterator[dict[str, Any]]:
    """Proximal policy optimization: sample, score the end, spread the credit, clip the update."""
    signal, (credit, objective) = SIGNALS[config.reward], ARMS[config.arm]
    policy, device = state["policy"], state["policy"].lm_head.weight.device
    while (u := state["update"]) < state["updates"]:
        c = replace(config, beta=state["beta"])
        # 1. sample
        texts = task.prompts(c.prompts, rng(c.seed, "prompts", u))
        prompt, group = (x.to(device) for x in in_groups(task, texts, c))
        b = sample(policy, prompt, c, group=group, generator=rng(c.seed, "sample", u))
        b = annotate(state, b, c)
        # 2. score
        truth = grades(task, b)
        reward = signal(state, task, b, truth, c)
        # 3. credit
        b.adv, b.ret = credit(b, reward, c)
        # 4. update
        metrics = policy_update(state, [b], objective, c)
        state["update"] += 1
        state["samples"] += len(prompt)
        state["beta"] = adapt_beta(state["beta"], metrics["kl"], len(prompt), c)
        yield metrics | rollout_metrics(b, reward, truth, c) | {"samples": state["samples"]}

# ---- iterative_dpo: right against wrong, round after round --------------------------------------
def pair_up(score: Tensor, group: Tensor, config: Config) -> Tensor:
    """Score (B,) 1 = right, group (B,) -> rows (n, 2): right, wrong. K pairs a prompt: walk through
    both lists at once, the shorter one starting again. A prompt with an empty side gives none.
    DEVIATION: the paper also counts the gold solution as a right response on GSM8K."""
    pairs = []
    for rows in group.argsort(stable=True).split(group.bincount().tolist()):
        good, bad = rows[score[rows] > 0.5].tolist(), rows[score[rows] <= 0.5].tolist()
        if good and bad:
            pairs += [(good[k % len(good)], bad[k % len(bad)]) for k in range(config.pairs_each)]
    return torch.tensor(pairs, dtype=torch.long).view(-1, 2)
def dpo_nll(logp: Tensor, ref: Tensor, length: Tensor, c: Config) -> Pair:
    """(9) for (n, 2) summed log-probs of chosen and rejected -> per-pair mean, margin (n,)."""
    return dpo_loss(*logp.unbind(1), *ref.unbind(1), length[:, 0], c.dpo_beta, c.alpha)
def sft_chosen(logp: Tensor, ref: Tensor, length: Tensor, c: Config) -> Pair:
    """The NLL of (9) alone: a round of STaR, arXiv 2203.14465, that goes on from the last one."""
    margin = (logp - ref).detach()
    return -(logp[:, 0] / length[:, 0]).mean(), margin[:, 0] - margin[:, 1]
PREFERENCES = {"dpo_nll": dpo_nll, "sft_chosen": sft_chosen}
def pair_logprobs(policy: Transformer, pairs: dict[str, Tensor], rows: Tensor) -> Tensor:
    """log pi(y | x) of chosen and rejected, summed over tokens and untempered, (n, 2)."""
    prompt, y = pairs["prompt"][rows].repeat_interleave(2, 0), pairs["response"][rows].flatten(0, 1)
    y = y[:, : int((y != policy.config.pad).sum(1).max())]  # columns of PAD alone change nothing
    return token_logprobs(policy, prompt, y, temperature=1.0).sum(1).view(-1, 2)
def pair_update(state: dict, c: Config) -> dict[str, float]:
    """One update on a batch of state["pairs"]. Watch chosen: under plain DPO its log-prob falls."""
    pairs, u, n = state["pairs"], state["update"], len(state["pairs"]["prompt"])
    rows = torch.randint(n, (c.pair_batch,), generator=rng(c.seed, "pair batch", u))
    length = (pairs["response"] != c.pad).sum(2)  # (n, 2)
    rows = rows[length[rows].amax(1).cpu().argsort(stable=True)]
    def loss(micro: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logp, size = pair_logprobs(state["policy"], pairs, micro), length[micro]
        value, margin = PREFERENCES[c.preference](logp, pairs["ref"][micro], size, c)
        logp = logp.detach()
        seen = {"margin": margin.mean(), "pair_accuracy": (margin > 0).float().mean()}
        for i, name in enumerate(("chosen", "rejected")):
            seen |= {name: logp[:, i].mean(), name + "_per_token": (logp / size)[:, i].mean()}
        share = len(micro) / len(rows)
        return value * share, {name: x * share for name, x in seen.items()}
    return step(state, loss, rows, c, schedule(u % c.round_updates, c.round_updates, c.warmup))
def start_rounds(policy: Transformer, config: Config) -> dict[str, Any]:
    """A fresh state. No reference model: its log-probs are kept with the pairs of the round."""
    first = {name: x.clone() for name, x in policy.state_dict().items()} if config.restart else {}
    updates = config.rounds * config.round_updates
    return {"policy": policy, "optimizers": optimizers([policy], config.dpo_lr, config),
            "pairs": {}, "drawn": {}, "first": first, "samples": 0, "update": 0, "updates": updates}
def posed(state: dict, task: Task, config: Config, u: int) -> tuple[list[str], dict]:
    """DEVIATION: new problems each round; the paper draws new responses to the same ones."""
    return task.prompts(config.prompts, rng(config.seed, "prompts", u)), {}
def verified(state: dict, task: Task, rollout: Rollout, c: Config, u: int) -> tuple[Tensor, dict]:
    """Scores (B,): the true reward."""
    truth = grades(task, rollout)
    return truth, {"truth": float(truth.mean())}

def iterative_dpo(state: dict, task: Task, config: Config, pose: Callable = posed,
                  judge: Callable = verified, pair: Callable = pair_up) -> Iterator[dict[str, Any]]:
    """Iterative reasoning preference optimization, arXiv 2404.19733v3: each round draws new
    responses, pairs right with wrong ones and goes on from where the last round ended."""
    policy, n, device = state["policy"], config.round_updates, state["policy"].lm_head.weight.device
    while (u := state["update"]) < state["updates"]:
        if u % n == 0:
            hot = config.late_temperature if 2 * u >= state["updates"] else config.temperature
            c = replace(config, prompts=config.round_prompts, temperature=hot)  # of this round only
            # 1. sample
            texts, drawn = pose(state, task, c, u)
            prompt, group = (x.to(device) for x in in_groups(task, texts, c))
            b = sample(policy, prompt, c, group=group, generator=rng(c.seed, "sample", u))
            # 2. score
            score, seen = judge(state, task, b, c, u)
            # 3. credit
            rows = pair(score, group, c)
            pairs = {"prompt": prompt[rows[:, 0]], "response": b.response[rows]}
            if c.restart:  # ReST-EM, arXiv 2312.06585: every round trains the first model
                policy.load_state_dict(state["first"])
                state["optimizers"] = optimizers([policy], c.dpo_lr, c)
            with torch.no_grad():  # the reference is the model that this round starts from
                parts = torch.arange(len(rows)).split(c.micro) if len(rows) else []
                ref = [pair_logprobs(policy, pairs, part) for part in parts]
            state["pairs"] = pairs | {"ref": torch.cat([*ref, torch.empty(0, 2, device=device)])}
            drawn |= {"pairs": len(rows), "round": u // n}
            state["drawn"] = drawn | seen | {"length": float(b.mask.sum(1).mean())}
            state["samples"] += len(prompt)
        # 4. update; a round without pairs teaches nothing and is over at once
        some = state["drawn"]["pairs"] > 0
        metrics = pair_update(state, config) if some else {}
        state["update"] += 1 if some else n
        yield metrics | state["drawn"] | {"samples": state["samples"]}

# ---- self_rewarding: the same weights pose, solve and judge -------------------------------------
SCORE = re.compile(r"(?:^|!|score[\s:=]*)([0-9]+(?:\.[0-9]+)?)(?:\s*/\s*5)?$", re.I | re.A)
def parse_score(text: str) -> float | None:
    """The score that a judgement ends with, 0..5: `3`, `!3`, `Score: 3.5`, `score 4/5`; else None.
    Never raises. Only the very end counts, so a score that is quoted before it is not taken."""
    found = SCORE.search(text.strip().removesuffix("<eos>").rstrip(". "))
    score = float(found[1]) if found else -1.0
    return score if 0 <= score <= 5 else None
def propose(state: dict, task: Task, config: Config, u: int) -> tuple[list[str], dict]:
    """Shown three, a new one. DEVIATION: the policy poses them; in the paper a fixed model does."""
    generator = rng(config.seed, "propose", u)  # two tries each, then the task fills up
    shown = [task.propose_demo(generator)[0] for _ in range(2 * config.prompts)]
    found = zip(shown, respond(state["policy"], task, shown, config, generator), strict=True)
    fresh = [task.problem(y) for x, y in found if y.removesuffix("<eos>").strip() not in x]
    new = [x for x in dict.fromkeys(fresh) if x and x not in state["posed"]][: config.prompts]
    state["posed"] |= dict.fromkeys(new)
    texts = new + task.prompts(config.prompts - len(new), generator)
    return texts, {"valid": sum(map(bool, fresh)) / len(shown), "proposed": len(new) / len(texts)}
def judged(state: dict, task: Task, rollout: Rollout, c: Config, u: int) -> tuple[Tensor, dict]:
    """Scores (B,): the mean of J sampled judgements by the policy; NaN if none can be read."""
    generator, J, device = rng(c.seed, "judge", u), c.judgements, rollout.prompt.device
    pairs = zip(rollout.prompt.tolist(), rollout.response.tolist(), strict=True)
    asked = left_pad([[c.bos, *task.judge_prompt(x, y)] for x, y in pairs], c.pad).to(device)
    scores = []
    for part in asked.split(c.minibatch):
        written = sample(state["judge"], part.repeat_interleave(J, 0), c, generator=generator)
        scores += [parse_score(task.decode(y)) for y in written.response.tolist()]
    score = torch.tensor([float("nan") if s is None else s for s in scores], device=device)
    quoted = [parse_score(task.decode(y)) is not None for y in rollout.response.tolist()]
    mean = float(score.nanmean())
    return score.view(-1, J).nanmean(1), {
        "score": mean, "spread": float(score.nan_to_num(mean).std(correction=0)),
        "unread": float(score.isnan().float().mean()), "quoted": sum(quoted) / len(quoted)}
def best_and_worst(score: Tensor, group: Tensor, config: Config) -> Tensor:
    """Score (B,), NaN = none, group (B,) -> rows (n, 2): best and worst; a tie gives none."""
    pairs = []
    for rows in group.argsort(stable=True).split(group.bincount().tolist()):
        rows = rows[~score[rows].isnan()]
        if len(rows) and score[rows].max() > score[rows].min():
            pairs.append((int(rows[score[rows].argmax()]), int(rows[score[rows].argmin()])))
    return torch.tensor(pairs, dtype=torch.long).view(-1, 2)
def start_self_rewarding(policy: Transformer, c: Config) -> dict[str, Any]:
    """M1 solves, poses and judges already; its judge is itself, or the frozen M1."""
    judge = frozen_copy(policy) if c.judge == "frozen" else policy
    return start_rounds(policy, replace(c, rounds=c.own_rounds)) | {"judge": judge, "posed": {}}
def self_rewarding(state: dict, task: Task, config: Config) -> Iterator[dict[str, Any]]:
    """Self-Rewarding LMs, arXiv 2401.10020: `iterative_dpo` on its own problems and scores.
    DEVIATION: the loss is DPO + NLL (9); the paper's is --alpha 0, which loses accuracy here."""
    config = replace(config, samples=config.candidates)
    return iterative_dpo(state, task, config, propose, judged, best_and_worst)

# ---- seq2seq: ppo with a rewriter's agreement as reward -----------------------------------------
def start_seq2seq(policy: Transformer, config: Config) -> dict[str, Any]:
    """As `ppo`, with a leash: whatever is learned can be fooled."""
    return start_ppo(policy, replace(config, beta=config.rewriter_beta))
def seq2seq(state: dict, task: Task, config: Config) -> Iterator[dict[str, Any]]:
    """Sequence-to-sequence reward modelling, arXiv 2409.00162: `ppo`, another reward tensor."""
    return ppo(state, task, replace(config, reward="seq2seq"))

# ---- refine: SORM says where, the refiners how, ORM when ----------------------------------------
def continuations_of(student: Transformer, draft: Rollout, ends: Tensor, c: Config) -> Pair:
    """K ways to go on from each unfinished prefix: -> which (n, 2), row and prefix; (n, K, R)."""
    which = ((ends >= 0) & (ends < ends.amax(1, keepdim=True))).nonzero()
    which = which[ends[tuple(which.T)].argsort(stable=True)]  # like lengths are written together
    place, generator, traces = torch.arange(c.response).to(ends.device), rng(c.seed, "continue"), []
    for part in which.split(max(1, c.minibatch // c.continuations)):
        row, s = part.repeat_interleave(c.continuations, 0).unbind(1)
        start = draft.response[row].masked_fill(place >= ends[row, s, None], c.pad)
        traces.append(sample(student, draft.prompt[row], c, start, generator=generator).response)
    return which, torch.cat(traces).view(len(which), c.continuations, c.response)
def check_traces(task: Task, draft: Rollout, ends: Tensor, which: Tensor, traces: Tensor) -> Pair:
    """Whether each trace (n, K, R) is right, and whether it uses the last result of its prefix."""
    right, uses = [], []
    for (row, s), several in zip(which.tolist(), traces.tolist(), strict=True):
        prompt, end = task.decode(draft.prompt[row].tolist()), int(ends[row, s])
        last = draft.response[row, int(ends[row, s - 1]) if s else 0 : end].tolist()
        result = task.result(task.decode(last))
        number = re.compile(rf"(?<![0-9]){re.escape(result or '')}(?![0-9])")
        right += [task.grade(prompt, task.decode(y)) > 0.5 for y in several]
        uses += [result is None or bool(number.search(task.decode(y[end:]))) for y in several]
    return tuple(torch.tensor(x, dtype=torch.bool).view(traces.shape[:2]) for x in (right, uses))
def step_labels(right: Tensor, ends: Tensor, which: Tensor, success: Tensor, uses: Tensor,
                c: Config) -> dict[str, Tensor]:
    """label, keep (2, B, S): for the ORM the draft's end, for the SORM (8), equally many examples.
    The whole draft is its own verifying trace. DEVIATION: a right draft counts unchecked."""
    table = torch.zeros(2, *ends.shape, c.continuations, dtype=torch.bool, device=ends.device)
    table[:, which[:, 0], which[:, 1]] = torch.stack([success, uses]).to(ends.device)
    table[:, torch.arange(len(ends)), ends.argmax(1)] = right[:, None]
    sorm, some, generator = rollout_labels(*table), ends > 0, rng(c.seed, "balance")
    position, keep = some.cumsum(1), torch.zeros_like(table[..., 0])
    keep[1, some] = balance(sorm[some], position[some], generator)
    same = torch.randperm(int(some.sum()), generator=generator) < keep[1].sum().cpu()
    keep[0, some] = same.to(ends.device)
    label = torch.stack([right[:, None].expand_as(sorm), sorm])
    return {"ends": ends, "label": label.float(), "keep": keep.float()}
def repair_demos(task: Task, draft: Rollout, b: dict, which: Tensor, traces: Tensor, good: Tensor,
                 c: Config) -> tuple[list, list]:
    """What the refiners learn, ids for `demonstrations`. Global: a draft -> a right trace from the
    problem. Local: [BAD] before the first error -> the rest of a right trace from there."""
    whole, rest, good = [], [], good.tolist()
    for (row, s), several, ok in zip(which.tolist(), traces.tolist(), good, strict=True):
        if not any(ok):
            continue
        x, y = draft.prompt[row].tolist(), draft.response[row].tolist()
        trace = [i for i in several[ok.index(True)] if i != c.pad]
        if s == 0:
            whole.append((reread(task, x, y, c), trace))
        if s + 1 == first_error(b["label"][1, row], 0.5):  # prefix 0 counts: s is the last good
            end = int(b["ends"][row, s])
            rest.append((reread(task, x, y, c, end), trace[end:]))
    return whole, rest
def start_refine(policy: Transformer, config: Config) -> dict[str, Any]:
    """The policy is the student, and stays; what learns starts as a copy of it.
    DEVIATION: ORM and SORM are two heads of one trunk; the paper trains two models."""
    c, device = config, policy.lm_head.weight.device
    parts: dict[str, Any] = {name: deepcopy(policy) for name in ("scorer", "global", "local")}
    heads = {k: Head(c, (c.width + 1) ** -0.5, rng(c.seed, k)).to(device) for k in ("orm", "sorm")}
    fits = {}
    for name, model in parts.items():
        learns = [model, *heads.values()] if name == "scorer" else [model]
        fits[name] = {"optimizers": optimizers(learns, c.base_lr, c, c.muon_lr), "update": 0}
    return {"policy": policy, **parts, **heads, "fits": fits, "data": {}, "seen": {},
            "samples": 0, "update": 0, "updates": c.refine_updates}  # fmt: skip

def refine(state: dict, task: Task, config: Config) -> Iterator[dict[str, Any]]:
    """GLoRe, arXiv 2402.10963: drafts and continuations teach two heads and two refiners."""
    student, c, device = state["policy"], config, state["policy"].lm_head.weight.device
    if not state["data"]:
        # 1. sample: a draft a problem; from each prefix of a wrong one, K ways to go on
        prompt = encode_prompts(task, task.prompts(c.drafts, rng(c.seed, "prompts")), c).to(device)
        draft = sample(student, prompt, c, generator=rng(c.seed, "sample"))
        right, ends = grades(task, draft) > 0.5, prefix_ends(task, draft)
        which, traces = continuations_of(student, draft, ends.masked_fill(right[:, None], -1), c)
        # 2. score
        success, uses = check_traces(task, draft, ends, which, traces)
        # 3. credit: which step was the error, and who got from there to the answer
        b = step_labels(right, ends, which, success, uses, c)
        b |= {"prompt": prompt, "response": draft.response}
        whole, rest = repair_demos(task, draft, b, which, traces, success & uses, c)
        state["data"] = {"steps": b, "global": whole, "local": rest}
        state["samples"] = len(prompt) + success.numel()
        state["seen"] = {"truth": float(right.float().mean()), "pairs": len(rest)}
    # 4. update: what is bad, and how to mend it
    few, data = replace(c, base_batch=c.pair_batch), state["data"]
    batches = {"scorer": step_batches(state, data["steps"], c)}
    mended = [k for k in ("global", "local") if data[k]]  # without examples a refiner stays
    batches |= {k: demonstrations(state[k], task, few, data[k]) for k in mended}
    learning = [fit(state["fits"][k], batch, c.refine_updates, c) for k, batch in batches.items()]
    for logs in zip(*learning, strict=True):
        state["update"] += 1
        metrics = {"orm": logs[0]["orm"], "sorm": logs[0]["sorm"], "samples": state["samples"]}
        losses = {k + "_loss": log["loss"] for k, log in zip(batches, logs, strict=True)}
        yield metrics | losses | state["seen"]

@torch.no_grad()
def refinements(state: dict, task: Task, prompts: list[str], config: Config,
                generator: Any = None) -> dict[str, Any]:
    """Draft, global and local refinement: response (3, B, R), the ORM's logits (3, B), and bad:
    the token where the step begins that the SORM blames, None for none (then local = draft)."""
    prompt = encode_prompts(task, prompts, config).to(state["policy"].lm_head.weight.device)
    draft = sample(state["policy"], prompt, config, generator=generator)
    ends, x, y = prefix_ends(task, draft), prompt.tolist(), draft.response.tolist()
    bad: list[int | None] = []
    for score, end in zip(step_scores(state, prompt, draft.response, ends)[1], ends, strict=True):
        end = end[end >= 0].tolist()
        step = first_error(score[1 : len(end)].sigmoid(), config.threshold)
        bad.append(end[step] if step < len(end) - 1 else None)
    def rewritten(name: str, marks: list[int | None]) -> list[list[int]]:
        asked = [reread(task, *both, config, at) for *both, at in zip(x, y, marks, strict=True)]
        asked = left_pad(asked, config.pad).to(prompt.device)
        return sample(state[name], asked, config, generator=generator).response.tolist()
    rest = rewritten("local", [at or 0 for at in bad])
    local = [ids if at is None else (ids[:at] + tail)[: config.response]
             for ids, tail, at in zip(y, rest, bad, strict=True)]
    response = torch.tensor([y, rewritten("global", [None] * len(y)), local], device=prompt.device)
    score = [response_score(state["scorer"], state["orm"], prompt, each) for each in response]
    return {"response": response, "score": torch.stack(score), "bad": bad}
def refined(state: dict, task: Task, prompts: list[str], config: Config,
            generator: Any = None) -> list[str]:
    """Of draft and two refinements the one that the ORM likes best, as text."""
    found = refinements(state, task, prompts, config, generator)
    best = found["score"].argmax(0), torch.arange(len(prompts))
    return [task.decode(ids) for ids in found["response"][best].tolist()]

# ---- denoise: a diffusion LM, paid for what a stretch of denoising achieves ---------------------
def some_step(b: Rollout, c: Config, generator: torch.Generator) -> Tensor:
    """t (B,): a step up to EOS but the first, 1 if there is no other; share 1: behind the last."""
    last = (b.order * b.mask).amax(1)
    share = c.earliest + (c.latest - c.earliest) * torch.rand(len(last), generator=generator)
    return 1 + (share.to(last.device) * last).long()
def go_on(policy: Transformer, b: Rollout, t: Tensor, n: int, c: Config,
          generator: torch.Generator) -> Rollout:
    """n ways to go on from the state before step t of each response, all in one `sample` call."""
    start = state_at(b.response, b.order, t, c)
    prompt, start, group = (x.repeat_interleave(n, 0) for x in (b.prompt, start, b.group))
    return sample(policy, prompt, c, start, group, generator)
def probe(state: dict, task: Task, b: Rollout, rows: Tensor, c: Config) -> Pair:
    """t (B,), drawn anew for each response, and V(x_t) of (6), (B,): the mean reward of N fresh
    continuations of the state before step t; NaN but for these rows (B,)."""
    u, value = state["update"], torch.full(rows.shape, torch.nan, device=rows.device)
    t = some_step(b, c, rng(c.seed, "state", u))
    if rows.any():
        more = go_on(state["policy"], b[rows], t[rows], c.branches, c, rng(c.seed, "branch", u))
        reward = verifier(state, task, more, grades(task, more), c).sum(1)
        value[rows] = reward.view(-1, c.branches).mean(1)
        state["samples"] += len(reward)
    return t, value
def denoise_advantage(reward: Tensor, branch_reward: Tensor, group: Tensor,
                      weight: float) -> Tensor:
    """Denoising process reward; all (B,). branch_reward = V(x_t), not read unless A > 0."""
    # A_i = r_i - V(x_T);  (6) D_i = V(x_t) - V(x_T);  (7) A~_i = A_i + 1[A_i > 0] weight D_i
    base = group_advantage(reward, group, "mean")  # V(x_T): the mean of the group
    return torch.where(base > 0, base + weight * (branch_reward - (reward - base)), base)
# each credit: state, task, b, reward (B,) -> advantage (B, R)
def outcome(state: dict, task: Task, b: Rollout, reward: Tensor, c: Config) -> Tensor:
    """(2) diffu-GRPO, arXiv 2504.12216: the end alone, against the mean of the group."""
    return group_advantage(reward, b.group, "mean")[:, None] * b.mask
def process(state: dict, task: Task, b: Rollout, reward: Tensor, c: Config) -> Tensor:
    """(7): what beats its group is worth more where the state before made that likelier."""
    _, value = probe(state, task, b, group_advantage(reward, b.group, "mean") > 0, c)
    return denoise_advantage(reward, value, b.group, c.process_weight)[:, None] * b.mask
CREDITS = {"outcome": outcome, "process": process}
def start_denoise(policy: Transformer, config: Config) -> dict[str, Any]:
    """As `ppo`, but beta stays; the policy is a diffusion LM, and the value head idle."""
    return start_ppo(policy, replace(config, updates=config.denoise_updates))

def denoise(state: dict, task: Task, config: Config, estimate: Callable = likelihood,
            roll: Callable = sample) -> Iterator[dict[str, Any]]:
    """Denoising process reward, arXiv 2510.01544: policy gradient for a diffusion LM, credit (7).
    Reconstructed from abstracts and reviews; what is not known is a field tagged UNKNOWN."""
    c = replace(config, prompts=config.denoise_prompts, epochs=config.mu)
    policy, device = state["policy"], state["policy"].lm_head.weight.device
    while (u := state["update"]) < state["updates"]:
        # 1. sample
        texts = task.prompts(c.prompts, rng(c.seed, "prompts", u))
        prompt, group = (x.to(device) for x in in_groups(task, texts, c))
        b = roll(policy, prompt, c, group=group, generator=rng(c.seed, "sample", u))
        # 2. score
        truth = grades(task, b)
        reward = verifier(state, task, b, truth, c)
        # 3. credit
        b.adv = CREDITS[c.credit](state, task, b, reward.sum(1), c)
        # 4. update: each pass over the batch has its own estimate of all log-probs
        hidden = [hide(b, c, rng(c.seed, "hidden", u * c.mu + i)) for i in range(c.mu)]
        views = [annotate(state, replace(b, hidden=x), c, estimate) for x in hidden]
        metrics = policy_update(state, views, grpo_objective, c, estimate)
        state["update"] += 1
        state["samples"] += len(prompt)
        yield metrics | rollout_metrics(views[0], reward, truth, c) | {"samples": state["samples"]}

LOOPS = {"ppo": (start_ppo, ppo), "iterative_dpo": (start_rounds, iterative_dpo),
    "self_rewarding": (start_self_rewarding, self_rewarding), "seq2seq": (start_seq2seq, seq2seq),
    "refine": (start_refine, refine), "denoise": (start_denoise, denoise)}  # fmt: skip
