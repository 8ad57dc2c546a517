"""nanoreward: how rewards teach language models, in one file that a person can read.

A small GPT imitates a careless teacher of arithmetic and gets 44 % of its problems right. From then
on rewards make it better. The true reward is known exactly, and nothing is hidden in a framework:
each equation is a function that stands below it, and each method is a loop of four phases: sample,
score, give credit, update.

    python nanoreward.py              the smallest example: PPO, one problem before and after
    python train_small.py ppo         one method;  without a name all of them (7 minutes on 2 cores)

Greedy accuracy on held-out problems before and after, means of five seeds. The best constant answer
has 0.01, a model trained on error-free demonstrations 1.00.

    method           accuracy      what is rewarded                          paper (arXiv)
    ppo              0.44 -> 0.95  the right answer                          1707.06347, 2402.03300
    iterative_dpo    0.44 -> 0.93  a right response over a wrong one         2404.19733
    self_rewarding   0.42 -> 0.63  what the model itself judges to be good   2401.10020
    seq2seq          0.44 -> 0.60  tokens that a rewriting model would keep  2409.00162
    refine           0.64 -> 0.88  nothing; it learns which step was wrong   2402.10963
    denoise          0.43 -> 0.88  the right answer, of a diffusion LM       2504.12216, 2510.01544

How to read it. Part I is what all methods share; its last section says what a method is. Part II
has one section per method: its numbers, what it starts from, its losses, its loop. Sections 11, 12
and 15 go on with the loops of 9 and 10, and section 13 with the scorer of 12. Part III adds the
second model, a masked-diffusion language model. Part IV can be skipped on a first reading: saved
runs, several processes, GPUs. Part V is the example that runs when this file is started. With one
process `own_rows(x)` and `over_ranks(x)` are x itself.

The equations are numbered as they are in the comments; (3) to (5) belong to methods that are not
here:
    (1)  masked diffusion loss       (9)  DPO + NLL             (13) advantage estimation (GAE)
    (2)  policy gradient for it      (10) rewriting examples    (14) clipped policy and value losses
    (6)  process reward              (11) agreement reward      (15) GRPO
    (7)  advantage with (6)          (12) KL penalty per token  (16) RLOO
    (8)  step labels by rollouts

`DEVIATION` marks every place where the code differs from its paper, and `UNKNOWN` every number or
rule that no paper gives: the choice is ours.
"""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from math import ceil, log, pi
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

# ##################################################################################################
#
#   PART I: COMMON GROUND
#
# ##################################################################################################

# ==== 1. Glossary ================================================================================
#
# A letter has one meaning in all shapes, which are written with capitals, as in (B, R). Behind it
# stands the number that sets it, if there is one.
#
#   N  prompts of an update (`prompts`)         G  samples of each prompt (`samples`)
#   B  rows of a batch, N * G for rollouts      P  length of the prompts, padded on the left
#   R  length of the responses (`response`)     T  positions that a model reads, often P + R
#   C  width of a hidden vector (`width`)       V  size of the vocabulary
#   H  attention heads (`heads`)                L  positions that attention sees
#   S  prefixes of a response: the empty one, one behind each written step, the whole
#   K  continuations of a prefix (`continuations`)    J  judgements of a response (`judgements`)
#
# Small letters: c is the config, b a batch of rollouts, u the number of an update, x a problem and
# y a response to it, k counts tokens, s prefixes. w and l are the winner and the loser of a pair.
#
# A word has one meaning too.
#
#   problem      a text of the task;  prompt: the ids that a model is given, often a problem
#   policy       the model that is trained
#   reference    the policy as it was at the start, or where it learns from pairs, as it was at the
#                start of the round
#   rollout      a response that was sampled, with all that is known about it
#   group        the responses to one prompt
#   mask         a float tensor (B, R): 1.0 where a response token counts, 0.0 behind its end
#   MASK         the token that stands for an open place of a diffusion LM; its id is `mask_id`
#   canvas       the response of a diffusion LM while it is written: tokens and MASKs
#   hidden       the vectors that a transformer computes, one for each position
#   state        the record of all that a loop carries from one update to the next
#   step         one written step of a response, such as `37+5=42;`
#   update       one turn of a loop; it makes one or several optimizer steps
#   round        several updates on the same samples, in the methods that learn from pairs
#   pass         one call of a diffusion LM, which writes some tokens of its canvas
#   verifier     the task's own grader;  truth: what it says
#   signal       where a reward comes from: the verifier, a learned model, a judge
#   reward       what a response or a token earns
#   critic       a head on the policy that learns the value of a token
#   value        what a critic expects that is still to be earned, before a token
#   return       what the critic should have expected: (13) mixes rewards and later values
#   advantage    how much better than expected a token was; positive ones become likelier
#   credit       how the reward of a response is spread over its tokens as advantages; in the
#                methods that learn from pairs or labels, which responses they are made of
#   arm          one of several ways of a method, chosen by --arm
#   draft        a response that is judged and mended;  prefix: its beginning, up to a step's end
#   ORM          outcome reward model: is the answer of this draft right?
#   SORM         stepwise ORM: can the right answer still be reached from the end of this prefix?
#   prover       who finishes a canvas;  prospects: how often that is right, V(x_t) in the paper
#   facts        results of single operations;  habits: when the teacher guesses or forgets a carry
#
# Everything behind `response_part` is aligned with the response: entry k of a (B, R) tensor belongs
# to response token k. The model has predicted this token one position earlier.


# ==== 2. Numbers =================================================================================
#
# After this section you know what can be turned. The numbers of `Config` are flags of
# train_small.py, and so are the sizes in `Architecture`. A method adds its own numbers in a
# subclass of `Config` at the head of its section, and gives its own defaults there to the numbers
# that all methods share.


class UserError(Exception):
    """An error that the user can fix. train_small.py prints it as one line and exits with 2."""


def out_of_memory(error: Exception) -> bool:
    """Whether there was no room. torch says so in the text of a RuntimeError."""
    said = re.search("out of memory|allocate memory|not enough memory", str(error), re.I)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(said))


@dataclass(frozen=True)
class Architecture:
    """The shape of a network and its special tokens. A model folder brings its own."""

    # How many tokens there are, V.
    vocab: int = 32
    # Width of the hidden vectors, C.
    width: int = 64
    # Layers. Two of them learn the habits of the teacher as fast, but fewer facts of arithmetic.
    layers: int = 3
    # Attention heads, H. With 2 heads of 32 the facts come 100 updates later.
    heads: int = 4
    # Fewer of these than heads: several heads share their keys and values. With 2 ppo was 4 %
    # faster and ended at 93 % in place of 96 (three seeds).
    kv_heads: int = 4
    # Width of a head. It is even, because pairs are rotated.
    head_dim: int = 16
    # Inner width of the SwiGLU layers.
    mlp_width: int = 192
    # Base of the rotary frequencies, the value of RoFormer.
    rope_theta: float = 10_000.0
    # Llama 3's stretched frequencies: factor, low, high, old length, as in "8 1 4 8192".
    rope_scaling: str = ""
    # What the norms add to a variance, so that nothing is divided by 0.
    norm_eps: float = 1e-5
    # qwen2 adds biases to queries, keys and values; qwen3 norms its queries and keys.
    family: str = "llama"
    # Whether the output matrix is the embedding matrix.
    tied: bool = False
    # True for a GPT. False: every position sees every other, which makes a masked-diffusion LM.
    causal: bool = True
    # The special tokens. With PAD = EOS a model would never learn to stop. PAD and MASK may lie
    # behind the vocabulary, where a folder has none; BOS is EOS in some folders.
    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    mask_id: int = 3
    # Further ids that end a text, as in "128008 128009"; many chat models have several.
    other_ends: str = ""
    # Compute the layers in bfloat16. Weights, logits and losses stay in float32. The layers compute
    # with rounded weights: a change of less than a 500th of a weight shows only when several of
    # them have added up.
    bf16: bool = False

    @property
    def ends(self) -> list[int]:
        """All ids that end a text: the one that demonstrations end with, then the others."""
        return [self.eos_id, *(int(i) for i in self.other_ends.split())]


@dataclass(frozen=True)
class Config(Architecture):
    """What all methods share. The defaults are those of a laptop: 0.16 million parameters."""

    # ---- the run
    # The first part of the name of every generator, see `rng`.
    seed: int = 0
    # Threads of the CPU; one is best on busy cores. The same seed, machine and threads give the
    # same bytes.
    threads: int = 2
    # auto takes cuda if there is one, else the cpu; mps has to be asked for.
    device: str = "auto"
    # Look at dev and save the state every so many updates, but about 8 times a run at most.
    eval_every: int = 5
    # Held-out problems of an evaluation. With 500 a 95 % interval is about +-4 points.
    eval_problems: int = 500

    # ---- the task
    # What is learned: arithmetic, countdown, sudoku, gsm8k or sums.
    task: str = "arithmetic"
    # The folder that holds train.jsonl and test.jsonl of gsm8k.
    data: str = "gsm8k"
    # Arithmetic, countdown and sums: how many operations a problem has at least; each is a step.
    min_ops: int = 1
    # Arithmetic, countdown and sums: how many operations a problem has at most.
    max_ops: int = 3
    # Arithmetic: how many final answers there are. With few of them wrong steps are often lucky.
    answers: int = 100
    # Arithmetic: the weakness of the labeller of preference pairs, who then prefers answers that
    # end in 0 (round), longer responses (long) or refusing (refusal); none has no weakness.
    planted: str = "round"
    # Sums: the largest number in a problem.
    largest: int = 99
    # Sums: how many solved problems stand in front of a question; 0 is zero-shot.
    shots: int = 4
    # Room for a response, R tokens. Arithmetic: 8 for each step, 3 for `#answer` and 1 for EOS.
    response: int = 28

    # ---- the base model, trained on demonstrations
    # A Hugging Face folder to start from. --config sums and hf have the rates for it.
    model: str = ""
    # With --model: train adapters of this rank and leave the folder's weights as they are (LoRA,
    # section 19); 0 trains all weights.
    lora: int = 0
    # Demonstrations. They are drawn once, and the base model sees each of them 2.6 times on
    # average.
    demos: int = 20_000
    # The accuracy of single operations jumps between update 200 and 350.
    base_updates: int = 400
    # Rows of a supervised update. 64 rows need twice the updates.
    base_batch: int = 128
    # AdamW, for everything but the matrices of the blocks; learned rewards have it too. With 0.003
    # and 0.03 fewer facts are learned.
    base_lr: float = 0.01
    # Muon, for the matrices of the blocks; 0 leaves all to AdamW. With 0.02 one seed of three never
    # learned + and -.
    muon_lr: float = 0.01
    # Rows of one backward pass; a pair is one row. It decides memory and speed, and the result only
    # by rounding. An optimizer step with 32 takes 14 % less time than with 64: more of it fits into
    # a core's cache.
    micro: int = 32

    # ---- the loop
    # Problems of an update, N.
    prompts: int = 64
    # Responses to each problem, G.
    samples: int = 8
    # The temperature of sampling, and of the log-probs of what was sampled.
    temperature: float = 1.0
    # How many updates the loop has, or each of its rounds.
    updates: int = 40
    # The peak of AdamW's learning rate. 3e-3 forgets the facts within 10 updates.
    lr: float = 5e-4

    def total_updates(self) -> int:
        """How many updates the loop makes in all."""
        return self.updates

    def responses_at_once(self) -> int:
        """How many responses are written side by side. It decides how much memory is needed."""
        return self.prompts * self.samples

    def rules(self) -> list[tuple[bool, str]]:
        """What the numbers have to keep to: (whether it holds, what to say if it does not)."""
        return []


# ==== 3. Tasks ===================================================================================
#
# After this section you can write a task of your own; nothing below knows arithmetic. A task is one
# file in data/ with a class that has the methods below, and two functions:
#
#   make(c, careful=False)   builds the task; `careful` gives the demonstrator that makes no errors
#   rules(c)                 a list of (what must hold, what to say if it does not)
#
# A task needs only what its methods ask for:
#
#   every method      encode  decode  prompts  demo  grade  chance
#   self_rewarding    also judge_prompt  judge_demo  problem  propose_demo
#   seq2seq           also preferences  (and so does ppo --reward learned)
#   refine            also steps  uses  (and so does ppo --reward sorm)
#
# A task may have more. train_small.py shows what it finds of `solution`, the right way written out,
# `step_ok`, which steps are right, `reading_order`, if tokens stand in another order than people
# read them, and a text `note`, which it prints when a run begins. Only notebooks/ call `split`,
# `answer` and `rubric`.
#
# The examples below are of arithmetic. Its operations are done from left to right and its results
# are taken modulo 100, so 37+5*3= is solved by `37+5=42;42*3=26;#26`. Each digit is a token, and
# models read and write the units of a number first: the ids of 26 are those of 6 and 2.


class Task(Protocol):
    """What the loops ask of a task.

    Models read sampled responses as ids, because encoding their text again may give other ids.
    """

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Texts -> ids, without BOS. `<eos>`, `<sep>` and `<bad>` are single marks."""

    def decode(self, ids: list[int]) -> str:
        """Ids -> text with its `<eos>` and nothing behind it. It takes every id below `vocab`."""

    def prompts(self, n: int, generator: torch.Generator, split: str = "train") -> list[str]:
        """n problems of the split train, dev or test. No problem belongs to two of them."""

    def demo(self, generator: torch.Generator) -> tuple[str, str]:
        """A problem and a response of mixed quality: what the base model learns from."""

    def grade(self, prompt: str, response: str) -> float:
        """The true reward, 0 to 1. Anything malformed gets 0; a bad prompt raises ValueError."""

    def chance(self) -> float:
        """The accuracy of the best constant answer."""

    def steps(self, response: list[int]) -> list[tuple[str, int]]:
        """The written steps of a response: their text and the position of their last token."""

    def uses(self, step: str, rest: str) -> bool:
        """Whether the rest of a response goes on from what the step before it claims."""

    def preferences(self, n: int, generator: torch.Generator) -> list[tuple[str, str, str]]:
        """n of (problem, preferred, other) by a labeller with a planted weakness."""

    def judge_prompt(self, prompt: list[int], response: list[int]) -> list[int]:
        """What a judge reads, ids in and ids out."""

    def judge_demo(self, generator: torch.Generator) -> tuple[str, str]:
        """A judge's prompt and the judgement it should write."""

    def problem(self, text: str) -> str | None:
        """The text as a training problem, or None if it is none."""

    def propose_demo(self, generator: torch.Generator) -> tuple[str, str]:
        """A prompt that shows problems, and a new problem as the response."""


# A demonstration as ids: prompt and response.
Demo = tuple[list[int], list[int]]
# What there is to log, by name.
Metrics = dict[str, Any]


def left_pad(rows: list[list[int]], pad_id: int) -> Tensor:
    """Token lists -> (B, P) with PAD in front, so that all prompts end at the same place."""
    P = max(len(row) for row in rows)
    padded = []
    for row in rows:
        padded.append([pad_id] * (P - len(row)) + row)
    return torch.tensor(padded)


def right_pad(rows: list[list[int]], pad_id: int, R: int) -> Tensor:
    """Token lists -> (B, R) with PAD behind. A longer row raises UserError."""
    longest = max(len(row) for row in rows)
    if longest > R:
        raise UserError(f"a response of {longest} tokens needs --response >= that; now {R}")
    padded = []
    for row in rows:
        padded.append(row + [pad_id] * (R - len(row)))
    return torch.tensor(padded)


def encode_prompts(task: Task, prompts: list[str], c: Architecture) -> Tensor:
    """Texts -> (B, P): BOS, then the problem."""
    rows = [[c.bos_id, *ids] for ids in task.encode(prompts)]
    return left_pad(rows, c.pad_id)


def encode_demos(task: Task, demos: list[tuple[str, str]], c: Architecture) -> list[Demo]:
    """Texts of (prompt, response) -> ids, with BOS in front of the prompts."""
    prompts = task.encode([prompt for prompt, _ in demos])
    responses = task.encode([response for _, response in demos])
    ids = []
    for x, y in zip(prompts, responses, strict=True):
        ids.append(([c.bos_id, *x], y))
    return ids


def without(ids: list[int], *unwanted: int) -> list[int]:
    """The ids that are left when the unwanted ones are taken out."""
    return [i for i in ids if i not in unwanted]


def rewriter_prompt(
    task: Task, prompt: list[int], response: list[int], c: Architecture, bad_at: int | None = None
) -> list[int]:
    """What a model reads that rewrites a response: `prompt <sep> response <sep>`, as ids.

    PAD and EOS are left out. bad_at: put the mark `<bad>` behind so many tokens of the response.
    """
    mark, separator = task.encode(["<bad>", "<sep>"])
    prompt = without(prompt, c.pad_id, *c.ends)
    response = without(response, c.pad_id, *c.ends)
    if bad_at is not None:
        response = response[:bad_at] + mark + response[bad_at:]
    return prompt + separator + response + separator


# ==== 4. The GPT =================================================================================
#
# After this section you have read a whole Llama. The same class is the masked-diffusion LM of Part
# III if `causal` is false. Then `future_weight` is how much a position sees of what comes after it:
# 1 in the end, and less while the model is still a GPT that learns to look ahead.


def rope(position: Tensor, c: Architecture) -> tuple[Tensor, Tensor]:
    """Rotary angles, arXiv 2104.09864: (B, T) -> cos and sin for `rotate`, (B, 1, T, head_dim)."""
    exponent = torch.arange(0, c.head_dim, 2, device=position.device) / c.head_dim
    frequency = c.rope_theta**-exponent
    if c.rope_scaling:
        # Llama 3: a frequency with fewer than `low` turns in the old context becomes `factor` times
        # slower, one with more than `high` turns stays, and those between are blended.
        factor, low, high, old = (float(x) for x in c.rope_scaling.split())
        turns = frequency * old / (2 * pi)
        unscaled = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (unscaled + (1 - unscaled) / factor)
    angle = position[:, None, :, None] * frequency  # (B, 1, T, head_dim / 2)
    cos = torch.cat([angle.cos(), angle.cos()], dim=-1)
    sin = torch.cat([-angle.sin(), angle.sin()], dim=-1)
    return cos, sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + head_dim / 2), as Llama lays them out. (B, H, T, head_dim)."""
    # A pair (a, b) becomes (a cos - b sin, b cos + a sin); `roll` puts b into the place of a.
    partner = x.roll(x.shape[-1] // 2, dims=-1)
    return x * cos + partner * sin


class Cache:
    """Keys and values of what was read so far: room for `length` positions of `rows` rows."""

    def __init__(self, c: Architecture, rows: int, length: int, like: Tensor):
        shape = (c.layers, 2, rows, c.kv_heads, length, c.head_dim)
        dtype = torch.bfloat16 if c.bf16 else like.dtype
        self.kv = torch.zeros(shape, dtype=dtype, device=like.device)
        self.real = torch.zeros(rows, length, dtype=torch.bool, device=like.device)
        # How many positions are taken. A CUDA graph, see section 18, makes it a tensor (1,): it
        # reads one token at a time, all shapes stay the same, and attention sees the whole room.
        self.used: int | Tensor = 0

    def reserve(self, real: Tensor) -> tuple[slice | Tensor, Tensor]:
        """Make room for T more tokens; real (B, T) says which of them are not PAD.

        Returns their positions in the cache, and (B, L): which cached tokens are not PAD.
        """
        if isinstance(self.used, Tensor):
            at = self.used.clone()  # `used` itself is changed in place
            visible = slice(None)
        else:
            at = slice(self.used, self.used + real.shape[1])
            visible = slice(self.used + real.shape[1])
        self.used += real.shape[1]
        self.real[:, at] = real
        return at, self.real[:, visible]

    def extend(self, layer: int, at: slice | Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add a layer's keys and values of T tokens, (B, kv_heads, T, head_dim).

        Returns those of all L tokens that are visible now.
        """
        kv = self.kv[layer]
        kv[0, :, :, at] = k.to(kv.dtype)  # the rotation has made it float32
        kv[1, :, :, at] = v
        length = kv.shape[3] if isinstance(self.used, Tensor) else self.used
        return kv[0, :, :, :length], kv[1, :, :, :length]

    def select(self, rows: Tensor) -> None:
        """Go on with these rows only, in this order."""
        self.kv = self.kv[:, :, rows]
        self.real = self.real[rows]


class Beginning:
    """Keys and values of what all rows begin with: read once, as one row, with its gradients.

    It is what `Cache` is for sampling. But autograd needs what it has stored, so nothing is written
    over: the first call is remembered, and each later one reads on behind it.
    """

    def __init__(self) -> None:
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}
        self.length = 0

    def reserve(self, real: Tensor) -> tuple[slice, Tensor]:
        """See `Cache.reserve`; the tokens of a beginning are all real."""
        before = self.length
        self.length = before or real.shape[1]
        return slice(before, None), F.pad(real, (before, 0), value=True)

    def extend(self, layer: int, at: slice, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See `Cache.extend`."""
        if layer not in self.kv:
            self.kv[layer] = (k, v)
            return k, v
        first_k, first_v = (x.expand(len(k), -1, -1, -1) for x in self.kv[layer])
        return torch.cat([first_k, k], dim=2), torch.cat([first_v, v], dim=2)


class Attention(nn.Module):
    """Attention whose heads may share keys and values (grouped-query attention)."""

    def __init__(self, c: Architecture):
        super().__init__()
        self.head_dim = c.head_dim
        bias = c.family == "qwen2"
        self.q_proj = nn.Linear(c.width, c.heads * c.head_dim, bias=bias)
        self.k_proj = nn.Linear(c.width, c.kv_heads * c.head_dim, bias=bias)
        self.v_proj = nn.Linear(c.width, c.kv_heads * c.head_dim, bias=bias)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.width, bias=False)
        normed = c.family == "qwen3"
        self.q_norm = nn.RMSNorm(c.head_dim, c.norm_eps) if normed else nn.Identity()
        self.k_norm = nn.RMSNorm(c.head_dim, c.norm_eps) if normed else nn.Identity()

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        bias: Tensor,
        extend: Callable | None,
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C). bias (B, 1, T, L) is added to the scores; -inf hides a key.

        extend: from the keys and values of x to all that it may see, those of the cache included.
        """
        B, T, _ = x.shape
        shape = (B, T, -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)  # (B, H, T, head_dim)
        k = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        if extend is not None:
            k, v = extend(k, v)
        if T == 1:
            # Heads that share their keys become queries of one head, and no key is copied.
            q = q.reshape(B, k.shape[1], -1, self.head_dim)
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=grouped)
        out = out.reshape(B, -1, T, self.head_dim)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU, arXiv 2002.05202."""

    def __init__(self, c: Architecture):
        super().__init__()
        self.gate_proj = nn.Linear(c.width, c.mlp_width, bias=False)
        self.up_proj = nn.Linear(c.width, c.mlp_width, bias=False)
        self.down_proj = nn.Linear(c.mlp_width, c.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        gate = F.silu(self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x))


class Block(nn.Module):
    """One layer: attention, then the MLP, each added to what it reads."""

    def __init__(self, c: Architecture):
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = MLP(c)
        self.input_layernorm = nn.RMSNorm(c.width, c.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(c.width, c.norm_eps)

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        """(B, T, C) -> (B, T, C); context: the other arguments of the attention."""
        x = x + self.self_attn(self.input_layernorm(x), *context)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """ids (B, T) -> logits (B, T, V). `hidden` gives the vectors behind the last norm (B, T, C)."""

    def __init__(self, c: Architecture, generator: torch.Generator | None = None):
        super().__init__()
        self.config = c
        # The folder that it was loaded from, if there is one.
        self.source: Path | None = None
        self.future_weight = 0.0 if c.causal else 1.0
        self.embed_tokens = nn.Embedding(c.vocab, c.width)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.width, c.norm_eps)
        self.lm_head = nn.Linear(c.width, c.vocab, bias=False)
        if c.tied:
            self.lm_head.weight = self.embed_tokens.weight
        self.set_weights(generator)

    def set_weights(self, generator: torch.Generator | None) -> None:
        """Random weights to start from. Every block adds nothing at first."""
        for name, p in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "bias")):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                # Of the standard deviations from 0.02 to 1, 0.1 learned fastest for the embeddings.
                std = {"embed_tokens.weight": 0.1, "lm_head.weight": 0.02}.get(name)
                nn.init.normal_(p, std=std or p.shape[1] ** -0.5, generator=generator)

    def hidden(self, ids: Tensor, cache: Cache | Beginning | None = None) -> Tensor:
        """ids (B, T) -> (B, T, C). With a cache the ids continue what it holds."""
        is_pad = ids == self.config.pad_id
        real = ~is_pad
        at: slice | Tensor = slice(None)
        if cache is not None:
            at, real = cache.reserve(real)  # (B, L)
        # PAD in front of a prompt does not count as a position.
        position = (real.cumsum(1) - 1).clamp(min=0)[:, at]
        key = torch.arange(real.shape[1], device=ids.device)
        query = key[at, None]  # (T, 1)

        visible = real[:, None, None, :]  # (B, 1, 1, L): nobody sees PAD
        if self.future_weight == 0:
            visible = visible & (key <= query)  # the one line that makes it a GPT
        # PAD sees itself, because the softmax of nothing at all would be NaN. The logarithm turns
        # True and False into what is added to the scores: log 1 = 0 and log 0 = -inf.
        bias = (visible | (key == query)).log()
        if 0 < self.future_weight < 1:
            bias = bias + (key > query) * log(self.future_weight)

        # PAD may have no vector of its own, and nobody sees which one it gets.
        x = self.embed_tokens(ids.masked_fill(is_pad, 0))
        cos, sin = rope(position, self.config)
        with torch.autocast(ids.device.type, torch.bfloat16, self.config.bf16):
            for i, layer in enumerate(self.layers):
                extend = None if cache is None else partial(cache.extend, i, at)
                x = layer(x, cos, sin, bias, extend)
        return self.norm(x)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> logits (B, T, V)."""
        return self.lm_head(self.hidden(ids))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.lm_head.weight.device

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, named as Hugging Face names them.

        A model that was loaded from a folder also takes along what else that folder says and holds,
        such as its tokenizer. Adapters are merged into the weights; see also `save_adapters`. The
        matrices of a model that computes in bfloat16 are written rounded, as it has used them.
        """
        from data import folders

        names = [f.name for f in fields(Architecture)]
        about = {name: vars(self.config)[name] for name in names}
        weights = merged_weights(self)
        if self.config.bf16 and not adapters(self):
            # Steps that are too small for bfloat16 add up unseen. Written with them, SmolLM2 after
            # 40 updates of ppo was right in 6 % of its sums, and as training saw it in 54 %.
            weights = {name: p.float() for name, p in fast_reader(self).state_dict().items()}
        folders.write_folder(Path(folder), about, weights, write_whole, self.source)

    @classmethod
    def load(cls, folder: str | Path) -> Transformer:
        """Read a Llama, SmolLM2, Qwen2, Qwen2.5 or Qwen3 folder, or what `save` wrote, in float32.

        Raises UserError on what is missing, damaged or not understood, and on a wrong name or size
        before memory is spent.
        """
        from data import folders

        folder = Path(folder)
        try:
            about = folders.read_architecture(folder)
            weights = folders.Weights(folder)
            c = Architecture(**about | {"tied": weights.tied})
            # On the device "meta" tensors have shapes and no content: names and sizes are compared
            # before anything large is read.
            with torch.device("meta"):
                model = cls(c)
            shapes = {k: torch.empty(x, device="meta") for k, x in weights.shapes.items()}
            model.load_state_dict(shapes)
            model.load_state_dict(weights.read(), assign=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            if out_of_memory(error):
                raise  # the folder may be whole
            why = " ".join(str(error).split())
            raise UserError(f"{folder} is no model folder to read: {why:.400}") from error
        model.source = folder
        if c.tied:
            model.lm_head.weight = model.embed_tokens.weight
        return model


class Head(nn.Module):
    """A number for each hidden vector: (..., C) -> (...).

    A critic starts with zeros (std 0), a reward model with a std of 1 / sqrt(C + 1).
    """

    def __init__(self, c: Architecture, std: float = 0.0, generator: torch.Generator | None = None):
        super().__init__()
        self.linear = nn.Linear(c.width, 1)
        nn.init.zeros_(self.linear.bias)
        nn.init.normal_(self.linear.weight, std=std, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (...)."""
        return self.linear(x)[..., 0]


def copy_of(model: Transformer) -> Transformer:
    """The same model again. Weights that are never trained are shared and not copied."""
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    return deepcopy(model, shared)


def frozen_copy(model: Transformer) -> Transformer:
    """The same weights now, and never a gradient."""
    return copy_of(model).requires_grad_(False)


def fast_reader(model: Transformer) -> Transformer:
    """The same model for many calls without gradients.

    One that computes in bfloat16 would convert its matrices in every call. Here it is done once.
    """
    if model.config.bf16:
        # The modules are new, the weights are not: what is not converted is shared.
        model = deepcopy(model, {id(p): p for p in model.parameters()})
        for module in model.layers.modules():
            if isinstance(module, nn.Linear):
                for name, p in list(module.named_parameters(recurse=False)):
                    setattr(module, name, nn.Parameter(p.detach().bfloat16(), requires_grad=False))
    return model


# ==== 5. Sampling and log-probs ==================================================================
#
# Shift, mask, EOS, temperature: after this section you can trust every tensor below. Most silent
# errors of this field are made here.


def rng(seed: int, purpose: str, index: int = 0) -> torch.Generator:
    """A generator for one purpose, such as the samples of update 7.

    No generator lives longer than its purpose, so that there is none to save: a run that was
    stopped goes on with the same random numbers.
    """
    name = f"{seed}/{purpose}/{index}"
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


@dataclass
class Rollout:
    """Responses that were sampled, and what a loop finds out about them."""

    prompt: Tensor  # (B, P) left-padded
    # (B, R) tokens including EOS, then PAD. A diffusion LM may have written something behind EOS.
    response: Tensor
    mask: Tensor  # (B, R) 1.0 for tokens that count: up to and including the first EOS
    # (B, R) in which pass a token was written: 0, 1, ...; a GPT writes one token a pass. -1 for
    # tokens that were given, and for the PAD of a GPT. PAD that a diffusion LM left behind the end
    # has the number of all passes: it was open in each of them.
    order: Tensor
    group: Tensor  # (B,) which prompt it answers
    logp: Tensor | None = None  # (B, R) log-probs under the policy that sampled it
    ref_logp: Tensor | None = None  # (B, R) log-probs under the reference
    value: Tensor | None = None  # (B, R) what the critic expects before each token
    adv: Tensor | None = None  # (B, R) advantages
    ret: Tensor | None = None  # (B, R) returns, which the critic learns

    def select(self, rows: Tensor) -> Rollout:
        """These rows, without the columns at the end that none of them has written.

        PAD that a diffusion LM left open stays, because it belongs to its canvases.
        """
        used = ((self.mask > 0) | (self.order >= 0))[rows].any(0)
        R = int(used.nonzero().max()) + 1
        found = {}
        for name, x in vars(self).items():
            if name in ("prompt", "group"):
                found[name] = x[rows]
            elif x is not None:
                found[name] = x[rows, :R]
        return Rollout(**found)


def is_end(ids: Tensor, c: Architecture) -> Tensor:
    """Which ids end a text, True or False for each of them."""
    return torch.isin(ids, torch.tensor(c.ends, device=ids.device))


def up_to_eos(response: Tensor, c: Architecture) -> Tensor:
    """The mask of a response (B, R): tokens up to and including the first EOS count.

    So EOS is trained like any other token, and the reward can stand on it.
    """
    eos = is_end(response, c)
    before = (eos.cumsum(1) - eos.long()) == 0
    return (before & (response != c.pad_id)).float()


def response_part(x: Tensor, P: int) -> Tensor:
    """(B, T, ...) -> (B, R, ...). THE shift of whole responses: position t - 1 predicts token t."""
    return x[:, P - 1 : -1]


def log_softmax(logits: Tensor, temperature: float, c: Architecture) -> Tensor:
    """Log-probs of the tokens that may be written. The others have -inf, here and everywhere.

    Never written are PAD, MASK and BOS, unless BOS is what ends a text too.
    """
    V = logits.shape[-1]
    unwritten = {c.pad_id, c.mask_id, c.bos_id} - set(c.ends)
    # Some of them may lie behind the vocabulary.
    room = max(V, max(unwritten) + 1)
    never = torch.zeros(room, device=logits.device)
    never[list(unwritten)] = -torch.inf
    return (logits / temperature + never[:V]).log_softmax(-1)


def of_tokens(logp: Tensor, token: Tensor) -> Tensor:
    """Of the log-probs of all tokens (..., V) those of one token each (...)."""
    return logp.gather(-1, token[..., None])[..., 0]


# What all prompts begin with, such as the same solved problems, is read once if it has at least so
# many tokens.
WORTH_SHARING = 16


def split_beginning(ids: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    """Rows of ids (B, T), padded on the left -> what all begin with (1, D), and the rest (B, T').

        ids         _ _ S S S 4 +        beginning   S S S      rest   _ 4 +
                    _ S S S 1 2 +                                      1 2 +

    D counts the tokens of the beginning. A short one is not worth it and is left empty, (1, 0).
    Every row keeps at least one token.
    """
    real = ids != pad_id
    place = real.cumsum(1) - 1
    real_first = real.int().argsort(dim=1, descending=True, stable=True)
    in_front = ids.gather(1, real_first)
    shortest = int(real.sum(1).min())
    equal = (in_front == in_front[:1]).all(0).long().cumprod(0)
    D = min(int(equal.sum()), shortest - 1)
    if D < WORTH_SHARING:
        return ids[:1, :0], ids
    rest = ids.masked_fill(place < D, pad_id)
    used = (rest != pad_id).any(0)
    return in_front[:1, :D], rest[:, used]


def predictive_hidden(model: Transformer, prompt: Tensor, response: Tensor) -> Tensor:
    """(B, P), (B, R) -> (B, R, C): the vectors that predict the response tokens.

    The diffusion LM keeps the GPT's shift: its vector at t - 1 predicts token t too.
    """
    cache = None
    if model.future_weight == 0:  # else what comes later would change the beginning
        beginning, prompt = split_beginning(prompt, model.config.pad_id)
        if beginning.numel() > 0:
            cache = Beginning()
            model.hidden(beginning, cache)
    both = torch.cat([prompt, response], dim=1)
    return response_part(model.hidden(both, cache), prompt.shape[1])


def gather_logprobs(
    model: Transformer, hidden: Tensor, response: Tensor, temperature: float
) -> Tensor:
    """Hidden vectors (B, R, C) -> log-probs of the response tokens (B, R), 0 where there is PAD."""
    logp = log_softmax(model.lm_head(hidden), temperature, model.config)
    is_pad = response == model.config.pad_id
    token = response.masked_fill(is_pad, 0)  # PAD may lie behind the vocabulary
    # Not -inf: a masked sum would multiply it with 0, and 0 * inf is NaN.
    return of_tokens(logp, token).masked_fill(is_pad, 0.0)


def token_logprobs(
    model: Transformer, prompt: Tensor, response: Tensor, temperature: float
) -> Tensor:
    """log pi(y_k | x, y_<k) for every response token, (B, R).

    Responses that were sampled at a temperature need it here too. Otherwise these would be
    log-probs of another distribution than the one that was sampled, and so would be ratio, entropy
    and KL.
    """
    hidden = predictive_hidden(model, prompt, response)
    return gather_logprobs(model, hidden, response, temperature)


def draw(logits: Tensor, uniform: Tensor, c: Config) -> Tensor:
    """Tokens by inverse transform sampling; temperature 0 is greedy.

    logits (..., V) and one uniform number each (...) -> token (...): the first one whose cumulative
    probability exceeds the number. A token of probability 0 owns an empty interval and is never
    drawn. Logits that are no numbers raise UserError.
    """
    if c.temperature == 0:
        best, token = log_softmax(logits, 1.0, c).max(-1)
        is_number = best.isfinite().all()
    else:
        logp = log_softmax(logits, c.temperature, c)
        cdf = logp.to(uniform.dtype).exp().cumsum(-1)
        total = cdf[..., -1]  # 1, but for rounding
        token = (cdf <= (uniform * total)[..., None]).sum(-1)
        is_number = total.isfinite().all()
    if not is_number:
        raise UserError(
            "the model has diverged: its logits are not finite; lower the learning rate"
        )
    return token


@torch.no_grad()
def sample(
    model: Transformer,
    prompt: Tensor,
    c: Config,
    start: Tensor | None = None,
    group: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Rollout:
    """Write a response to each row of prompt (B, P), or go on with `start` (B, R).

    In `start` PAD and MASK are open places; a GPT goes on behind what is given. All random numbers
    are drawn first, so that no row's response depends on the other rows. Temperature 0 is greedy.
    """
    causal = model.config.causal
    hole = c.pad_id if causal else c.mask_id
    if start is None:
        start = prompt.new_full((len(prompt), c.response), hole)
    is_open = (start == c.pad_id) | (start == c.mask_id)
    start = start.masked_fill(is_open, hole)

    B, R = start.shape
    if causal:
        shape = (B, R)  # one number for each token
    else:  # c is a DenoiseConfig
        block = min(c.block, R)
        shape = (B, ceil(R / block) * c.block_passes, block)  # one for each place in each pass
    uniform = torch.rand(shape, dtype=torch.float64, generator=generator)
    if prompt.is_mps:  # Apple's GPUs have no float64, and rounding must not reach 1
        uniform = uniform.float() * (1 - 1e-6)
    uniform = uniform.to(prompt.device)

    # Several processes share the rows, see section 17; a single one has all of them. Each fills its
    # own rows of zeros, and the sum over all processes is the whole.
    write = write_forward if causal else unmask
    written = start.new_zeros(B, 2, R)
    model = fast_reader(model)
    canvas, order, known = write(model, own_rows(prompt), own_rows(start), c, own_rows(uniform))
    own_rows(written)[:] = torch.stack([canvas, order], dim=1)
    canvas, order = over_ranks(written).unbind(1)
    if group is None:
        group = torch.arange(B, device=prompt.device)
    b = Rollout(prompt, canvas, up_to_eos(canvas, c), order, group)
    if known is not None:
        logp = torch.zeros(B, R, device=start.device)
        own_rows(logp)[:] = known
        b.logp = over_ranks(logp)
    return b


def write_forward(
    model: Transformer, prompt: Tensor, canvas: Tensor, c: Config, uniform: Tensor
) -> tuple[Tensor, Tensor, None]:
    """The GPT writes from left to right behind what each canvas (B, R) already holds.

    The canvas is filled in place. Returns it, the order in which it was written (B, R), and None in
    place of log-probs: those are found later, for all tokens at once.
    """
    R = canvas.shape[1]
    given = canvas != c.pad_id
    order = torch.full_like(canvas, -1)

    ended = is_end(canvas, c).any(1)
    full = given[:, -1]
    rows = (~(ended | full)).nonzero()[:, 0]
    if len(rows) == 0:
        return canvas, order, None
    place = given.sum(1)[rows]  # where each row writes next
    writing = torch.ones_like(rows, dtype=torch.bool)

    # A stable sort moves PAD to the front of each row. Prompt and given tokens then end at the same
    # place in all rows, so that all of them write their next token at once.
    context = torch.cat([prompt, canvas], dim=1)
    real = context != c.pad_id
    context = context.gather(1, real.int().argsort(dim=1, stable=True))
    longest = int(real.sum(1).max())
    context = context[:, -longest:]

    # Rows with the same context are read once; then each gets its own copy of keys and values.
    # What all of them begin with is read once, too.
    unique, which = context[rows].unique(dim=0, return_inverse=True)
    beginning, rest = split_beginning(unique, c.pad_id)
    cache = Cache(model.config, 1, context.shape[1] + R, model.lm_head.weight)
    if beginning.numel() > 0:
        model.hidden(beginning, cache)
    cache.select(torch.zeros_like(unique[:, 0]))
    hidden = model.hidden(rest, cache)[which, -1]
    cache.select(which)
    replay = CudaGraph(model, cache) if prompt.is_cuda else None

    for k in range(R):
        token = draw(model.lm_head(hidden), uniform[rows, place], c)
        canvas[rows[writing], place[writing]] = token[writing]
        order[rows[writing], place[writing]] = k
        writing = writing & ~is_end(token, c) & (place + 1 < R)
        if not writing.any():
            break
        place = (place + 1).clamp(max=R - 1)
        if replay is not None:
            hidden = replay(token)
            continue
        if writing.float().mean() < 0.9:
            # When a tenth of the rows has ended, leaving them out saves more than copying the cache
            # costs.
            rows = rows[writing]
            place = place[writing]
            token = token[writing]
            cache.select(writing)
            writing = torch.ones_like(rows, dtype=torch.bool)
        hidden = model.hidden(token[:, None], cache)[:, -1]
    return canvas, order, None


# ==== 6. Training ================================================================================
#
# After this section nothing between a loss and a changed weight is unknown.

# The learning rate of a loop rises for so many updates; without it the first ones cost accuracy.
WARMUP = 5
# In supervised training it rises for so many.
FIT_WARMUP = 20
# The largest norm of a gradient; longer ones are shortened to it.
CLIP_GRAD = 1.0
# Usual in RLHF; with the smaller 1e-8 the first updates are larger.
ADAM_EPS = 1e-5

# What an optimizer step is given: row indices -> the loss of these rows, and numbers to log. Both
# are divided by a count of the WHOLE optimizer step, so that its parts simply add up.
Loss = Callable[[Tensor], tuple[Tensor, Metrics]]
# Supervised data: number of the update -> row indices, and their loss.
Batches = Callable[[int], tuple[Tensor, Loss]]


def nll_loss(logp: Tensor, mask: Tensor, denom: Tensor | int) -> Tensor:
    """Maximum likelihood: logp and mask (B, R) -> scalar. Prompt tokens never enter."""
    return -(logp * mask).sum() / denom


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): a matrix moves by an orthogonal one, in the momentum's direction.

    It is the orthogonal matrix nearest to the momentum: the product of the two of its singular
    value decomposition, times lr sqrt(max(1, rows / cols)). All matrices of one shape are computed
    together in float32, and their momentum is kept with the first of them; torch.optim.Muon uses
    bfloat16, which takes ten times as long on a CPU.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95):
        shapes = dict.fromkeys(p.shape for p in params)
        groups = [{"params": [p for p in params if p.shape == shape]} for shape in shapes]
        super().__init__(groups, {"lr": lr, "peak_lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """Change the weights by their gradients."""
        for group in self.param_groups:
            params = group["params"]
            grad = torch.stack([p.grad for p in params])  # (n, rows, cols)
            smooth = self.state[params[0]].setdefault("smooth", torch.zeros_like(grad))
            smooth.lerp_(grad, 1 - group["momentum"])
            x = grad.lerp(smooth, group["momentum"])  # Nesterov: look one update ahead
            tall = x.shape[1] > x.shape[2]
            x = x.mT if tall else x  # the shorter side makes the cheaper x x'
            x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
            # z <- 3.4445 z - 4.7750 z^3 + 2.0315 z^5 brings every singular value z near 1.
            for _ in range(5):
                gram = x @ x.mT
                x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
            longer = max(1.0, grad.shape[1] / grad.shape[2])
            scale = group["lr"] * longer**0.5
            for p, change in zip(params, x.mT if tall else x, strict=True):
                p.sub_(scale * change)


def optimizers(
    modules: list[nn.Module], lr: float, muon_lr: float = 0.0
) -> list[torch.optim.Optimizer]:
    """AdamW for everything; with a muon_lr, Muon for the matrices of the blocks.

    AdamW trains adapters too: the two thin matrices of one have no meaning by themselves.
    """
    named = [pair for module in modules for pair in module.named_parameters()]
    blocks = []
    rest = []
    for name, p in named:
        if not p.requires_grad:
            continue  # beside adapters the other weights stay
        if muon_lr > 0 and "layers." in name and "lora_" not in name and p.dim() == 2:
            blocks.append(p)
        else:
            rest.append(p)
    adamw = torch.optim.AdamW(
        [{"params": rest, "peak_lr": lr}],
        lr,
        betas=(0.9, 0.95),
        eps=ADAM_EPS,
        weight_decay=0.0,
        fused=rest[0].is_cuda or None,
    )
    return [Muon(blocks, muon_lr), adamw] if blocks else [adamw]


def schedule(update: int, updates: int, warmup: int) -> float:
    """The share of the peak learning rate: a linear rise times a linear decay to zero.

    The decay already runs during the rise, so the rate stays a little below its peak.
    """
    return min(1.0, (update + 1) / warmup) * (1 - update / updates)


def optimizer_step(
    optimizers: list[torch.optim.Optimizer],
    loss: Loss,
    rows: Tensor,
    c: Config,
    lr_share: float = 1.0,
) -> Metrics:
    """One optimizer step over `rows`, in parts of `micro` rows -> what there is to log.

    loss(part) is already divided by a count of all rows. So the parts add up to the loss of the
    whole, whatever `micro` is; a mean of the parts' own means would be another loss.
    lr_share: the share of the peak learning rate, see `schedule`.
    """
    if dist.is_initialized() and len(rows) < dist.get_world_size():
        raise UserError(f"an optimizer step over {len(rows)} rows is too small for all processes")
    metrics: Metrics = {}
    for part in own_rows(rows).split(c.micro):
        part_loss, part_metrics = loss(part)
        part_loss.backward()
        for name, x in {"loss": part_loss.detach(), **part_metrics}.items():
            metrics[name] = metrics.get(name, 0.0) + x

    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    params = [p for group in groups for p in group["params"]]
    for p in params:
        # Over processes a SUM, not a mean: the loss is divided by the count of all of them.
        p.grad = over_ranks(torch.zeros_like(p) if p.grad is None else p.grad)
    norm = nn.utils.clip_grad_norm_(params, CLIP_GRAD)
    if not norm.isfinite():  # one such step would make every weight NaN
        raise UserError("training diverged: the gradient is not finite; lower the learning rate")

    for group in groups:
        group["lr"] = group["peak_lr"] * lr_share
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    found = {}
    for name, x in metrics.items():
        found[name] = float(over_ranks(torch.as_tensor(x)))
    found["grad_norm"] = float(norm)
    found["lr"] = groups[-1]["lr"]
    return found


@dataclass
class Fit:
    """What supervised training carries from one update to the next."""

    modules: list[nn.Module]
    optimizers: list[torch.optim.Optimizer]
    update: int = 0


def fit(
    state: Fit, batches: Batches, updates: int, c: Config, warmup: int = FIT_WARMUP
) -> Iterator[Metrics]:
    """Supervised training: yields what there is to log after every update."""
    while state.update < updates:
        rows, loss = batches(state.update)
        lr_share = schedule(state.update, updates, warmup)
        metrics = optimizer_step(state.optimizers, loss, rows, c, lr_share)
        state.update += 1
        yield metrics


class Demos:
    """Demonstrations as padded tensors, and the rows of each update."""

    def __init__(self, demos: list[Demo], c: Config, device: torch.device):
        self.prompt = left_pad([prompt for prompt, _ in demos], c.pad_id).to(device)
        responses = [response for _, response in demos]
        self.response = right_pad(responses, c.pad_id, c.response).to(device)
        # Lengths stay on the CPU, as the row indices do.
        self.prompt_length = (self.prompt != c.pad_id).sum(1).cpu()
        self.response_length = (self.response != c.pad_id).sum(1).cpu()

    def rows(self, n: int, seed: int, update: int) -> Tensor:
        """n random rows (n,), sorted by length so that parts of them hold little PAD."""
        rows = torch.randint(len(self.prompt), (n,), generator=rng(seed, "batch", update))
        length = self.prompt_length + self.response_length
        return rows[length[rows].argsort(stable=True)]

    def next_token_loss(self, model: Transformer, rows: Tensor, denom: int) -> Tensor:
        """The negative log-likelihood of these responses, divided by `denom` tokens."""
        P = int(self.prompt_length[rows].max())  # no column of PAD alone
        R = int(self.response_length[rows].max())
        response = self.response[rows, :R]
        logp = token_logprobs(model, self.prompt[rows, -P:], response, temperature=1.0)
        mask = (response != model.config.pad_id).float()
        return nll_loss(logp, mask, denom)


def gpt_batches(
    model: Transformer, demos: list[Demo], c: Config, size: int | None = None
) -> Batches:
    """Batches of demonstrations for `fit`; `size` rows each, by default c.base_batch."""
    data = Demos(demos, c, model.device)

    def draw_batch(update: int) -> tuple[Tensor, Loss]:
        rows = data.rows(size or c.base_batch, c.seed, update)
        denom = int(data.response_length[rows].sum())

        def loss(part: Tensor) -> tuple[Tensor, Metrics]:
            return data.next_token_loss(model, part, denom), {}

        return rows, loss

    return draw_batch


def task_demos(task: Task, c: Config) -> list[Demo]:
    """The demonstrations that the base models learn from, as ids."""
    generator = rng(c.seed, "demonstrations")
    return encode_demos(task, [task.demo(generator) for _ in range(c.demos)], c)


# How the models that a method needs are trained before its loop. `train_now` shows the arguments,
# of which it ignores two. train_small.py passes another trainer, which draws a bar and keeps the
# result in a cache. There `name` is the name of the entry, and `reads` lists the numbers of the
# method that change data or modules: if one of them is changed, it is another entry.
Trainer = Callable[..., None]


def train_now(
    name: str,
    modules: list[nn.Module],
    make_batches: Callable[[], Batches],
    updates: int,
    c: Config,
    lr: float,
    muon_lr: float = 0.0,
    warmup: int = FIT_WARMUP,
    reads: str = "",
) -> None:
    """Train the modules from beginning to end. The data are made when they are needed."""
    state = Fit(modules, optimizers(modules, lr, muon_lr))
    for _ in fit(state, make_batches(), updates, c, warmup):
        pass


def on_device(model: Transformer, c: Config) -> Transformer:
    """The model where and how the config wants it computed."""
    device = pick_device(c.device)
    # Older cards have no bfloat16.
    bf16 = c.bf16 and (device == "cpu" or torch.cuda.is_bf16_supported())
    model.config = replace(model.config, bf16=bf16)
    return model.to(device)


def gpt_base(task: Task, c: Config, train: Trainer = train_now) -> Transformer:
    """The base model: a folder's, or a GPT trained on the task's demonstrations."""
    if c.model:
        model = Transformer.load(c.model)
        return on_device(add_adapters(model, c) if c.lora else model, c)
    model = on_device(Transformer(c, rng(c.seed, "init")), c)

    def make_batches() -> Batches:
        return gpt_batches(model, task_demos(task, c), c)

    train("gpt", [model], make_batches, c.base_updates, c, c.base_lr, c.muon_lr)
    return model


# ==== 7. Rewards, advantages, evaluation =========================================================
#
# After this section "the reward" is a tensor (B, R), whoever gave it, and the numbers in the tables
# have a definition.


# What a response earns that never ends.
NO_EOS = -1.0


def in_groups(
    task: Task, texts: list[str], c: Config, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Problems, each of them G times: prompt (B, P) and group (B,)."""
    group = torch.arange(len(texts)).repeat_interleave(c.samples)
    prompt = encode_prompts(task, texts, c)[group]
    return prompt.to(device), group.to(device)


def texts_of(task: Task, response: Tensor, mask: Tensor) -> list[str]:
    """Responses and their mask (B, R) as texts. What stands behind the end is never read."""
    lengths = mask.sum(1).int().tolist()
    rows = response.tolist()
    return [task.decode(ids[:n]) for ids, n in zip(rows, lengths, strict=True)]


def grades(task: Task, b: Rollout) -> Tensor:
    """The true reward of each response, (B,): what the task's own grader says."""
    prompts = [task.decode(ids) for ids in b.prompt.tolist()]
    responses = texts_of(task, b.response, b.mask)
    scores = [float(task.grade(x, y)) for x, y in zip(prompts, responses, strict=True)]
    truth = torch.tensor(scores, device=b.prompt.device)
    check_rewards(truth, task, b)
    return truth


def check_rewards(reward: Tensor, task: Task, b: Rollout) -> None:
    """Rewards (B, R) or (B,) that are NaN or infinite raise UserError, which names the response.

    One of them would make all weights NaN. A reward of another shape, or of whole numbers, raises
    UserError too.
    """
    shapes = (tuple(b.mask.shape), (len(b.mask),))
    if tuple(reward.shape) not in shapes or not reward.is_floating_point():
        raise UserError(
            f"a reward must be a tensor of floats with the shape {shapes[0]}, a number for each "
            f"token, or {shapes[1]}, but it is {reward.dtype} with the shape {tuple(reward.shape)}"
        )
    total = reward.sum(1) if reward.dim() == 2 else reward
    if total.isfinite().all():
        return
    i = int(total.isfinite().int().argmin())  # the first one that is not
    prompt = task.decode(b.prompt[i].tolist())
    response = texts_of(task, b.response, b.mask)[i]
    raise UserError(
        f"the reward of the response {response[:80]!r} to {prompt[-80:]!r} is {float(total[i])}: "
        "whoever gives the reward has to give a finite number"
    )


def at_end(score: Tensor, b: Rollout, c: Architecture) -> Tensor:
    """Scores (B,) -> rewards (B, R): on the last token that COUNTS, not on the PAD behind it.

    A response that never ends earns NO_EOS in place of its score. (Where pairs or labels are made
    no reward is paid, and it has what the grader gives it: 0 in arithmetic.)
    """
    ended = is_end(b.response, c).any(1)
    last = (b.mask.sum(1).long() - 1).clamp(min=0)  # a response may hold no token at all
    reward = torch.zeros_like(b.mask)
    score = torch.where(ended, score, NO_EOS)
    return reward.scatter(1, last[:, None], score[:, None])


def group_advantage(reward: Tensor, group: Tensor, kind: str) -> Tensor:
    """The reward (B,) compared with the other samples of the same prompt, group (B,) -> (B,).

    mean: r - mean.   grpo (15): (r - mean) / (unbiased std + 1e-4).   rloo (16): r - mean of the
    others. A group with equal rewards gets exactly zero, and so does a group of one: differences
    below 1e-6 are taken for rounding. A reward that is NaN was not given: it counts for nothing and
    its response gets zero.
    """
    groups = int(group.max()) + 1

    def total(x: Tensor) -> Tensor:
        """The sum over each row's own group, (B,)."""
        return x.new_zeros(groups).index_add(0, group, x)[group]

    # The lowest reward of each group is subtracted first. It changes no difference, and it makes
    # equal rewards exactly 0, where the mean of 8 times 1000.1 would be off by a rounding.
    given = ~reward.isnan()
    lowest = reward.new_full((groups,), torch.inf)
    lowest = lowest.scatter_reduce(0, group, reward.masked_fill(~given, torch.inf), "amin")[group]
    reward = torch.where(given, reward - lowest, 0.0)

    count = total(given.to(reward.dtype))
    adv = (reward - total(reward) / count.clamp(min=1)) * given
    adv = adv.masked_fill(adv.abs() < 1e-6, 0.0)
    if kind == "grpo":
        std = (total(adv**2) / (count - 1).clamp(min=1)).sqrt()
        adv = adv / (std + 1e-4)
    if kind == "rloo":
        adv = adv * count / (count - 1).clamp(min=1)
    return adv


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the tokens that count. (B, R) -> (B, R), 0 off the mask.

    The variance is divided by n, as in the original RLHF code; several libraries take n - 1.
    """
    counts = mask > 0
    lowest = x.masked_fill(~counts, torch.inf).min()
    x = torch.where(counts, x - lowest, 0.0)  # equal numbers are exactly 0 from here on
    n = mask.sum().clamp(min=1)
    mean = (x * mask).sum() / n
    variance = ((x - mean) ** 2 * mask).sum() / n
    return (x - mean) * (variance + 1e-8).rsqrt() * mask


def k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """The log-ratio, policy minus reference, on the policy's own samples.

    Its mean is KL(policy, reference); single ones may be negative. As a loss it does not work: the
    expected gradient is zero. It belongs in the reward.
    """
    return logp - ref_logp


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """exp(-k1) - 1 + k1: the same mean as k1, and never negative.

    As a loss it pulls towards the reference, by the gradient of KL(reference, policy) and not of
    KL(policy, reference).
    """
    return (ref_logp - logp).exp() - 1 - (ref_logp - logp)


def rollout_metrics(b: Rollout, reward: Tensor, truth: Tensor, c: Config) -> Metrics:
    """What to watch of a batch of rollouts: means over its responses or tokens."""
    score = reward.sum(1)
    low, high = score.view(-1, c.samples).aminmax(dim=1)
    return {
        "reward": float(score.mean()),
        "truth": float(truth.mean()),
        # The mean of -log p of the sampled tokens estimates the entropy.
        "entropy": float(-(b.logp * b.mask).sum() / b.mask.sum()),
        "length": float(b.mask.sum(1).mean()),
        "ended": float(is_end(b.response, c).any(1).float().mean()),
        # Groups with equal rewards, but for rounding. If all are, an arm that compares in groups
        # learns nothing.
        "flat_groups": float((high - low < 1e-6).float().mean()),
    }


def respond(
    model: Transformer,
    task: Task,
    prompts: list[str],
    c: Config,
    generator: torch.Generator | None = None,
) -> list[str]:
    """One response to each prompt, as text. c.temperature 0 is greedy."""
    prompt = encode_prompts(task, prompts, c).to(model.device)
    b = sample(model, prompt, c, generator=generator)
    return texts_of(task, b.response, b.mask)


def accuracy(
    model: Transformer, task: Task, prompts: list[str], c: Config, temperature: float = 0.0
) -> float:
    """The mean true reward of one response to each prompt."""
    c = replace(c, temperature=temperature)
    texts = respond(model, task, prompts, c, rng(c.seed, "evaluate"))
    right = [task.grade(x, y) for x, y in zip(prompts, texts, strict=True)]
    return sum(right) / len(right)


# ==== 8. What a method is ========================================================================
#
# Every loop below is a generator. It keeps all that lives from one update to the next in a
# dataclass, its state, and yields what there is to log after every update. Logging, saving and
# progress bars belong to train_small.py, which has one driver for all loops.


@dataclass(kw_only=True)
class State:
    """What every loop carries from one update to the next; a method adds what it needs."""

    policy: Transformer
    optimizers: list[torch.optim.Optimizer]
    # How many texts were drawn so far: responses, and judgements, problems, continuations if any.
    samples: int = 0
    update: int = 0


def answer_by_policy(
    state: State, task: Task, prompts: list[str], c: Config, generator: torch.Generator
) -> list[str]:
    """What a trained method answers: the policy's own responses."""
    return respond(state.policy, task, prompts, c, generator)


def nothing_inside(state: State, task: Task, b: Rollout, c: Config) -> list[Metrics]:
    """For a method whose reward says nothing about the inside of a response."""
    return [{} for _ in b.response]


def no_pairs(state: State, task: Task, c: Config) -> list[Metrics]:
    """For a method that compares no responses with each other."""
    return []


def no_models(base: Transformer, task: Task, c: Config, train: Trainer) -> dict[str, nn.Module]:
    """For a reward that needs no model of its own."""
    return {}


@dataclass(frozen=True)
class Method:
    """What train_small.py has to know of a method. METHODS has one entry for each."""

    # Its numbers: a subclass of Config with its own defaults.
    config: type[Config]
    # (policy, c) -> its fresh state.
    start: Callable
    # (state, task, c) -> the loop, which yields Metrics.
    loop: Callable
    # (base, task, c, train) -> the model that the loop starts from, if it is not the base model.
    starts_from: Callable | None = None
    # (base, task, c, train) -> the models that its reward asks, by name.
    reward_models: Callable = no_models
    # What the first update does before it learns, if that takes long; `{prompts}` stands for the
    # method's number.
    first: str = ""
    # (state, task, prompts, c, generator) -> what the trained method answers, as texts.
    answer: Callable = answer_by_policy
    # (state, task, b, c) -> what the reward says about the inside of each response, or for denoise
    # of a new response to the same problem.
    explain: Callable = nothing_inside
    # Whether `explain` does not read the given responses, but lets the state's policy answer again.
    # The state then keeps the policy of the start as its `reference`.
    writes_again: bool = False
    # (state, task, c) -> some of the pairs that it learns from, each response with its ids.
    pairs: Callable = no_pairs
    # How many right and how many wrong responses are explained at a time.
    shown: int = 3
    # Numbers that are names: the names that there are.
    choices: dict[str, Any] = field(default_factory=dict)
    # Numbers that are read only if another one has a certain value, as {"lam": "arm gae"}.
    only_with: dict[str, str] = field(default_factory=dict)
    # What a task must have for it, beside what every method needs.
    needs: str = ""
    # Parts of the state that `answer` needs, beside the policy.
    answer_parts: tuple[str, ...] = ()


METHODS: dict[str, Method] = {}


# ##################################################################################################
#
#   PART II: METHODS ON THE GPT
#
# ##################################################################################################

# ==== 9. ppo =====================================================================================
#
# Sample responses, score them, spread the credit over their tokens, make what was better than
# expected likelier. The three arms differ in the credit and in the loss:
#
#   arm    what a token is compared with       where the KL to the reference stands
#   gae    what a critic expected (13)         in the reward of each token (12)
#   grpo   the mean of its group (15)          in the loss
#   rloo   the mean of the others (16)         in the reward of the response


@dataclass(frozen=True)
class PolicyGradientConfig(Config):
    """The numbers that ppo and seq2seq share: they differ in the signal."""

    # How credit is given: gae, grpo or rloo.
    arm: str = "gae"
    # How often an update goes through its rollouts.
    epochs: int = 1
    # Rollouts of one optimizer step. The 512 of an update make four of them, and from the second on
    # the policy is no longer the one that sampled, so that the clip of (14) acts. With one
    # optimizer step for all 512 dev ends at 92 % and not at 94.
    minibatch: int = 128
    # The ratio of (14) is clipped to 1 +- clip, and a value may move by at most clip. As in PPO.
    clip: float = 0.2
    # The weight of the value loss in (14).
    value_coef: float = 0.1
    # The lambda of (13): 1 waits for the end, 0 trusts the critic.
    lam: float = 0.95
    # The weight of the KL to the reference. A verifier needs none, because it cannot be fooled; a
    # learned reward can.
    beta: float = 0.0
    # How many examples a learned reward is trained on: preference pairs, or drafts for the SORM.
    reward_data: int = 4_000
    # Updates of the training of a learned reward.
    reward_updates: int = 100

    def rules(self) -> list[tuple[bool, str]]:
        """An arm without a critic compares the samples of a prompt with each other."""
        enough = self.samples > 1 or self.arm not in PPO_ARMS or PPO_ARMS[self.arm].critic
        return [(enough, f"--arm {self.arm} compares samples of one prompt: --samples 2 or more")]


@dataclass(frozen=True)
class PPOConfig(PolicyGradientConfig):
    """The numbers of ppo."""

    # Who gives the reward: verifier, learned (a preference model), sorm (a judge of steps) or
    # shaped (the judge of steps on the way, the verifier at the end).
    reward: str = "verifier"
    # Continuations of each prefix, K, by which the SORM's steps are labelled.
    continuations: int = 8
    # The weight of a response's log-prob in its learned score (section 12), before it is trained; 0
    # leaves the log-prob out.
    logp_weight: float = 0.5

    def responses_at_once(self) -> int:
        """The rollouts of an update, or what is drawn to train the model of the reward."""
        rollouts = self.prompts * self.samples
        if self.reward in ("sorm", "shaped"):
            return max(rollouts, self.reward_data, self.continuations)
        return rollouts


def gae(
    reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """(13) generalized advantage estimation, arXiv 1506.02438. All (B, R) -> advantage, return.

    delta_k  = reward_k + gamma value_{k+1} - value_k, where value is 0 behind the mask
    adv_k    = delta_k + gamma lam adv_{k+1}
    return_k = adv_k + value_k, before any whitening
    """
    value = value * mask
    adv = []
    next_adv = torch.zeros_like(value[:, 0])
    next_value = torch.zeros_like(value[:, 0])
    for k in reversed(range(value.shape[1])):
        delta = reward[:, k] + gamma * next_value - value[:, k]
        next_adv = (delta + gamma * lam * next_adv) * mask[:, k]
        next_value = value[:, k]
        adv.append(next_adv)
    adv = torch.stack(adv[::-1], dim=1)
    return adv, adv + value


def ppo_loss(
    logp: Tensor, old_logp: Tensor, adv: Tensor, mask: Tensor, denom: Tensor, clip: float
) -> Tensor:
    """(14) the clipped surrogate, arXiv 1707.06347. All (B, R) -> scalar.

    denom: how many tokens count in the whole optimizer step. So every token weighs the same, and
    the parts that a step is computed in simply add up.
    """
    # -1/denom sum over all tokens of min( ratio adv, clamp(ratio, 1 - clip, 1 + clip) adv )
    # ratio = pi(y_k) / pi_old(y_k)
    ratio = ((logp - old_logp) * mask).exp()  # exp of a large number off the mask would be inf
    clipped = ratio.clamp(1 - clip, 1 + clip)
    # The minimum is a pessimistic bound: a ratio beyond the band earns nothing more.
    objective = torch.minimum(ratio * adv, clipped * adv)
    return -(objective * mask).sum() / denom


def value_loss(
    value: Tensor, old_value: Tensor, ret: Tensor, mask: Tensor, denom: Tensor, clip: float | None
) -> Tensor:
    """(14) the critic's part with its 1/2, without its weight. All (B, R) -> scalar.

    clip None gives plain squares.
    """
    # 1/2 1/denom sum over all tokens of max( (value - return)^2, (near - return)^2 )
    # near = the value, but at most `clip` away from its old one
    error = (value - ret) ** 2
    if clip is not None:
        near = old_value + (value - old_value).clamp(-clip, clip)
        error = torch.maximum(error, (near - ret) ** 2)  # pessimistic again: the larger error
    return 0.5 * (error * mask).sum() / denom


# ---- credit: (rollouts, rewards (B, R), c) -> advantages and returns, each (B, R)


def gae_credit(b: Rollout, reward: Tensor, c: PolicyGradientConfig) -> tuple[Tensor, Tensor]:
    """With a critic: the KL is taken from each token's reward, advantages by (13), whitened."""
    # (12) reward_k - beta (logp_k - ref_logp_k)
    kl = k1(b.logp, b.ref_logp)
    reward = (reward - c.beta * kl) * b.mask
    adv, ret = gae(reward, b.value, b.mask, gamma=1.0, lam=c.lam)
    return whiten(adv, b.mask), ret


def grpo_credit(b: Rollout, reward: Tensor, c: PolicyGradientConfig) -> tuple[Tensor, Tensor]:
    """(15) one number for a whole response, compared with its group. The KL is in the loss."""
    adv = group_advantage(reward.sum(1), b.group, "grpo")
    return adv[:, None] * b.mask, torch.zeros_like(reward)


def rloo_credit(b: Rollout, reward: Tensor, c: PolicyGradientConfig) -> tuple[Tensor, Tensor]:
    """(16) the reward of a response with its KL, minus the mean of the others in its group."""
    # total_i = reward_i - beta sum_k k1;  adv_i = total_i - mean of the other total_j
    kl = k1(b.logp, b.ref_logp) * b.mask
    total = (reward - c.beta * kl).sum(1)
    adv = group_advantage(total, b.group, "rloo")
    return adv[:, None] * b.mask, torch.zeros_like(reward)


# ---- objective: (logp and value (B, R) of the policy now, rollouts, denom, c) -> scalar
#      value is None in an arm without a critic


def critic_objective(
    logp: Tensor, value: Tensor, b: Rollout, denom: Tensor, c: PolicyGradientConfig
) -> Tensor:
    """(14) the policy's loss and, with its weight, the critic's."""
    policy_part = ppo_loss(logp, b.logp, b.adv, b.mask, denom, c.clip)
    critic_part = value_loss(value, b.value, b.ret, b.mask, denom, c.clip)
    return policy_part + c.value_coef * critic_part


def grpo_objective(
    logp: Tensor, value: Tensor | None, b: Rollout, denom: Tensor, c: PolicyGradientConfig
) -> Tensor:
    """(15), and (2) for the diffusion LM: the clipped loss plus beta times the KL.

    DEVIATION: one mean over all tokens of the optimizer step, not one over each response.
    """
    policy_part = ppo_loss(logp, b.logp, b.adv, b.mask, denom, c.clip)
    if c.beta == 0:
        return policy_part  # far from the reference k3 is infinite, and 0 times that is no number
    kl = k3(logp * b.mask, b.ref_logp * b.mask).sum() / denom  # k3 of equal log-probs is 0
    return policy_part + c.beta * kl


def rloo_objective(
    logp: Tensor, value: Tensor | None, b: Rollout, denom: Tensor, c: PolicyGradientConfig
) -> Tensor:
    """(16) by clipped ratios of tokens.

    DEVIATION: the paper has no ratio. In the first optimizer step of an update the ratio is 1, and
    this is its REINFORCE, divided by the number of tokens.
    """
    return ppo_loss(logp, b.logp, b.adv, b.mask, denom, c.clip)


@dataclass(frozen=True)
class Arm:
    """A way to give credit, and the loss that goes with it."""

    credit: Callable
    objective: Callable
    # Whether it has a critic.
    critic: bool = False
    # The mask of an optimizer step, (rows, R) -> denom, by which its loss is divided.
    denom: Callable = torch.sum


PPO_ARMS = {
    "gae": Arm(gae_credit, critic_objective, critic=True),
    "grpo": Arm(grpo_credit, grpo_objective),
    "rloo": Arm(rloo_credit, rloo_objective),
}


# ---- signals: (state, task, rollouts, truth (B,), c) -> rewards (B, R)
#
# A reward of your own is such a function. Give it a name, and --reward NAME pays by it:
#
#     def brief(state, task, b, truth, c):
#         tokens = b.mask.sum(1)
#         return at_end(truth - 0.01 * tokens, b, c)
#
#     REWARDS["brief"] = RewardSource(brief)


@dataclass(frozen=True)
class RewardSource:
    """A signal, and how the models that it asks are trained before the loop."""

    # (state, task, b, truth, c) -> rewards (B, R).
    signal: Callable
    # (base, task, c, train) -> the models that it asks, by name.
    models: Callable = no_models
    # What a task must have for it.
    needs: str = ""


def verifier(state: State, task: Task, b: Rollout, truth: Tensor, c: Config) -> Tensor:
    """The task's own grader as reward."""
    return at_end(truth, b, c)


# What --reward chooses from. The sections on learned rewards and on refine add theirs.
REWARDS = {"verifier": RewardSource(verifier)}


def ppo_reward_models(
    base: Transformer, task: Task, c: PPOConfig, train: Trainer
) -> dict[str, nn.Module]:
    """The models that the chosen reward asks."""
    return REWARDS[c.reward].models(base, task, c, train)


# ---- the loop


@dataclass(kw_only=True)
class PPOState(State):
    """The policy's critic and reference, and the models that give the reward."""

    # The critic: a linear head on the policy's own hidden vectors, trained together with it.
    head: Head | None
    reference: Transformer
    models: dict[str, nn.Module] = field(default_factory=dict)


def start_ppo(policy: Transformer, c: PolicyGradientConfig) -> PPOState:
    """A fresh state. The first critic expects nothing: its head is zero."""
    head = None
    trained: list[nn.Module] = [policy]
    if c.arm in PPO_ARMS and PPO_ARMS[c.arm].critic:
        head = Head(c).to(policy.device)
        trained.append(head)
    return PPOState(
        policy=policy,
        head=head,
        reference=frozen_copy(policy),
        optimizers=optimizers(trained, c.lr),
    )


def estimate_gpt(model: Transformer, b: Rollout, c: Config) -> tuple[Tensor, Tensor]:
    """Log-probs of the response tokens (B, R), and the vectors (B, R, C) they are read from."""
    hidden = predictive_hidden(model, b.prompt, b.response)
    return gather_logprobs(model, hidden, b.response, c.temperature), hidden


# Where beta is 0 the KL to the reference is only a number to watch, and so many responses give it.
KL_ROWS = 64


def read_by_reference(b: Rollout, c: Config) -> Tensor:
    """(B,) which rollouts the reference reads: all if beta needs it, else the first ones."""
    rows = torch.arange(len(b.mask))
    return (rows < KL_ROWS) | (c.beta > 0)


def alike(model: Transformer, b: Rollout) -> Tensor:
    """(B,) a number for each rollout: those with like numbers are best read side by side.

    For a GPT it is the length, so that there is little PAD. The rollouts of a diffusion LM share
    canvases with others of their group.
    """
    return b.mask.sum(1).cpu() if model.config.causal else b.group.cpu()


@torch.no_grad()
def annotate(state: PPOState, b: Rollout, c: Config, estimate: Callable = estimate_gpt) -> Rollout:
    """The rollouts with log-probs of policy and reference and with values, once for the batch.

    Rollouts that the reference does not read keep the policy's log-probs in its place.
    """
    found = b.mask.new_zeros(3, *b.mask.shape)
    is_read = read_by_reference(b, c)
    in_order = alike(state.policy, b).argsort(stable=True)
    for rows in own_rows(in_order).split(c.micro):
        if len(rows) == 0:
            break  # there are more processes than rollouts
        part = b.select(rows)
        if b.logp is None or state.policy.config.causal:
            logp, hidden = estimate(state.policy, part, c)
        else:  # a diffusion LM knows them since it wrote
            logp, hidden = part.logp, None
        ref_logp = logp.clone()
        read = is_read[rows].nonzero()[:, 0]
        if len(read) > 0:
            again = replace(part.select(read), logp=None)  # those known are the policy's
            answer, _ = estimate(state.reference, again, c)
            ref_logp[read, : answer.shape[1]] = answer
        value = torch.zeros_like(logp) if state.head is None else state.head(hidden)
        found[:, rows, : logp.shape[1]] = torch.stack([logp, ref_logp, value])
    # Each process has filled its own rows and left the others 0, so the sum is all of them.
    logp, ref_logp, value = over_ranks(found)
    return replace(b, logp=logp, ref_logp=ref_logp, value=value)


def rollout_loss(
    state: PPOState, b: Rollout, objective: Callable, denom: Tensor, c: Config, estimate: Callable
) -> Loss:
    """The objective of an optimizer step, divided by `denom`."""

    def loss(rows: Tensor) -> tuple[Tensor, Metrics]:
        part = b.select(rows)
        logp, hidden = estimate(state.policy, part, c)
        value = None if state.head is None else state.head(hidden)
        # The clip of (14) acts where a token would earn more by leaving the band.
        ratio = ((logp - part.logp) * part.mask).exp()
        too_likely = (ratio > 1 + c.clip) & (part.adv > 0)
        too_unlikely = (ratio < 1 - c.clip) & (part.adv < 0)
        clipped = (too_likely | too_unlikely) * part.mask
        metrics = {"clipfrac": clipped.sum() / denom}
        return objective(logp, value, part, denom, c), metrics

    return loss


def policy_update(
    state: PPOState, b: Rollout, arm: Arm, c: Config, estimate: Callable = estimate_gpt
) -> Metrics:
    """Go `epochs` times through the rollouts, with `minibatch` of them in each optimizer step."""
    likeness = alike(state.policy, b)
    lr_share = schedule(state.update, c.updates, WARMUP)
    logs = []
    for epoch in range(c.epochs):
        generator = rng(c.seed, "minibatch", state.update * c.epochs + epoch)
        for rows in torch.randperm(len(likeness), generator=generator).split(c.minibatch):
            rows = rows[likeness[rows].argsort(stable=True)]
            loss = rollout_loss(state, b, arm.objective, arm.denom(b.mask[rows]), c, estimate)
            logs.append(optimizer_step(state.optimizers, loss, rows, c, lr_share))
    metrics = {}
    for name in logs[0]:
        metrics[name] = sum(x[name] for x in logs) / len(logs)
    kl = (k1(b.logp, b.ref_logp) * b.mask).sum(1)
    metrics["kl"] = float(kl[read_by_reference(b, c)].mean())
    return metrics


def ppo(
    state: PPOState, task: Task, c: PolicyGradientConfig, signal: Callable | None = None
) -> Iterator[Metrics]:
    """Proximal policy optimization: sample, score, spread the credit, take small steps."""
    signal = signal or REWARDS[c.reward].signal
    arm = PPO_ARMS[c.arm]
    device = state.policy.device
    if state.update == 0:
        # What was drawn to train the models of the reward counts too.
        scorers = [model for model in state.models.values() if isinstance(model, Scorer)]
        state.samples = sum(int(scorer.drawn) for scorer in scorers)
    while state.update < c.updates:
        u = state.update

        # 1. sample
        texts = task.prompts(c.prompts, rng(c.seed, "prompts", u))
        prompt, group = in_groups(task, texts, c, device)
        b = sample(state.policy, prompt, c, group=group, generator=rng(c.seed, "sample", u))
        b = annotate(state, b, c)

        # 2. score
        truth = grades(task, b)
        reward = signal(state, task, b, truth, c)
        check_rewards(reward, task, b)
        reward = reward * b.mask  # what stands behind the end earns nothing

        # 3. credit
        b.adv, b.ret = arm.credit(b, reward, c)

        # 4. update
        metrics = policy_update(state, b, arm, c)
        state.update += 1
        state.samples += len(prompt)
        yield metrics | rollout_metrics(b, reward, truth, c) | {"samples": state.samples}


def rounded(x: Tensor) -> list[float]:
    """Three decimals of each number, for transcripts."""
    return [round(number, 3) for number in x.tolist()]


@torch.no_grad()
def token_rewards(
    state: PPOState, task: Task, b: Rollout, c: PolicyGradientConfig, signal: Callable | None = None
) -> list[Metrics]:
    """What each token of a response earns, and what policy and critic say of it.

    shift: how much likelier the policy finds the token than the reference does, in nats (where beta
    is 0, of the first KL_ROWS responses alone, and 0 in the others); value: what the critic expects
    from there on, before the token is written.
    """
    signal = signal or REWARDS[c.reward].signal
    reward = signal(state, task, b, grades(task, b), c)
    b = annotate(state, b, c)
    found = []
    for row, counts in enumerate(b.mask > 0):
        shift = b.logp[row] - b.ref_logp[row]
        inside = {"token_rewards": rounded(reward[row][counts]), "shift": rounded(shift[counts])}
        if state.head is not None:
            inside["value"] = rounded(b.value[row][counts])
        found.append(inside)
    return found


METHODS["ppo"] = Method(
    config=PPOConfig,
    start=start_ppo,
    loop=ppo,
    reward_models=ppo_reward_models,
    explain=token_rewards,
    choices={"arm": PPO_ARMS, "reward": REWARDS},
    only_with={
        "lam": "arm gae",
        "value_coef": "arm gae",
        "reward_data": "reward learned sorm shaped",
        "reward_updates": "reward learned sorm shaped",
        "continuations": "reward sorm shaped",
        "logp_weight": "reward learned sorm shaped",
    },
)


# ==== 10. iterative_dpo ==========================================================================
#
# Every round draws several responses to each problem, sets right ones against wrong ones, and
# trains on these pairs. The next round draws from the model that this one has trained. Another
# method may be the same loop with other problems, scores or pairs, as the next section shows.


@dataclass(frozen=True)
class DPOConfig(Config):
    """The numbers of iterative_dpo. `prompts` and `updates` are those of one round."""

    # The loss: dpo_nll is (9), sft_chosen its NLL alone.
    arm: str = "dpo_nll"
    # How often new responses are drawn.
    rounds: int = 4
    # Problems of a round.
    prompts: int = 512
    # The same number for every round, however many pairs it has.
    updates: int = 30
    # 1e-3 overfits 700 pairs: it ends at 62 % where 4e-4 ends at 90.
    lr: float = 4e-4
    # Pairs of one optimizer step.
    minibatch: int = 64
    # The beta of (9), the paper's: how strongly the policy is held to the reference.
    beta: float = 0.1
    # The weight of the NLL in (9); 0 is plain DPO. With 3 dev ends at 86 %, with 5 at 90.
    alpha: float = 5.0

    def total_updates(self) -> int:
        """The updates of all rounds together."""
        return self.rounds * self.updates


# How many pairs a problem gives that has right and wrong responses.
PAIRS_EACH = 2


def dpo_loss(
    logp_w: Tensor,
    logp_l: Tensor,
    ref_w: Tensor,
    ref_l: Tensor,
    len_w: Tensor,
    beta: float,
    alpha: float,
) -> tuple[Tensor, Tensor]:
    """(9) iterative reasoning preference optimization, arXiv 2404.19733v3. All (B,).

    Returns the loss, a scalar, and the margins (B,). alpha = 0 is plain DPO. Log-probs are SUMS
    over tokens; only the NLL of the winner is divided by its length, and alpha multiplies the NLL
    (the first version of the paper had it on the other term).
    """
    # -mean( log sigmoid( beta [ (logp_w - ref_w) - (logp_l - ref_l) ] ) + alpha logp_w / len_w )
    margin = (logp_w - ref_w) - (logp_l - ref_l)
    preference = F.logsigmoid(beta * margin)
    likelihood = alpha * logp_w / len_w
    return -(preference + likelihood).mean(), margin.detach()


# ---- arms: (logp and ref (n, 2), of chosen and rejected, length (n, 2), c) -> loss, margin (n,)


def dpo_nll(logp: Tensor, ref: Tensor, length: Tensor, c: DPOConfig) -> tuple[Tensor, Tensor]:
    """(9) for pairs."""
    logp_w, logp_l = logp.unbind(1)
    ref_w, ref_l = ref.unbind(1)
    return dpo_loss(logp_w, logp_l, ref_w, ref_l, length[:, 0], c.beta, c.alpha)


def sft_chosen(logp: Tensor, ref: Tensor, length: Tensor, c: DPOConfig) -> tuple[Tensor, Tensor]:
    """The NLL of (9) alone, on the winners of the same pairs: much as STaR, arXiv 2203.14465.

    DEVIATION: STaR learns every right response, also of a problem that gives no pair, and each of
    its rounds starts from the first model again.
    """
    per_token = logp[:, 0] / length[:, 0]
    gain = (logp - ref).detach()
    return -per_token.mean(), gain[:, 0] - gain[:, 1]


DPO_ARMS = {"dpo_nll": dpo_nll, "sft_chosen": sft_chosen}


def rows_of_groups(group: Tensor) -> list[Tensor]:
    """The rows of each group, for group (B,): the responses to one prompt each."""
    sizes = group.bincount().tolist()
    return list(group.argsort(stable=True).split(sizes))


def pair_up(score: Tensor, group: Tensor, c: DPOConfig) -> Tensor:
    """Scores (B,), 1 = right, and group (B,) -> rows (n, 2) of a right and a wrong response.

    PAIRS_EACH pairs for a prompt: walk through its right and its wrong responses at once; a list
    that comes to its end starts again. A prompt that has only one kind gives no pair.
    DEVIATION: on GSM8K the paper counts the gold solution as a right response too.
    """
    pairs = []
    for rows in rows_of_groups(group):
        good = rows[score[rows] > 0.5].tolist()
        bad = rows[score[rows] <= 0.5].tolist()
        if good and bad:
            for k in range(PAIRS_EACH):
                winner = good[k % len(good)]
                loser = bad[k % len(bad)]
                pairs.append((winner, loser))
    return torch.tensor(pairs, dtype=torch.long).view(-1, 2)


def pair_logprobs(policy: Transformer, pairs: dict[str, Tensor], rows: Tensor) -> Tensor:
    """log pi(y | x) of chosen and rejected (n, 2), summed over tokens, at temperature 1.

    (9) compares two models and not a model with the sampler, so the sampler's temperature has no
    part in it.
    """
    prompt = pairs["prompt"][rows].repeat_interleave(2, 0)
    response = pairs["response"][rows].flatten(0, 1)
    # Columns that hold only PAD are cut off. They change nothing.
    longest = (response != policy.config.pad_id).sum(1).max()
    logp = token_logprobs(policy, prompt, response[:, : int(longest)], temperature=1.0)
    return logp.sum(1).view(-1, 2)


@dataclass(kw_only=True)
class RoundsState(State):
    """The pairs of the round.

    There is no reference model: the log-probs of the model that the round started from are kept
    with its pairs.
    """

    # prompt (n, P), response (n, 2, R) and ref (n, 2): chosen first, then rejected.
    pairs: dict[str, Tensor] = field(default_factory=dict)
    # What there is to log of the round.
    round_metrics: Metrics = field(default_factory=dict)


def start_rounds(policy: Transformer, c: DPOConfig) -> RoundsState:
    """A fresh state."""
    return RoundsState(policy=policy, optimizers=optimizers([policy], c.lr))


def pair_update(state: RoundsState, c: DPOConfig) -> Metrics:
    """One update on a batch of the round's pairs.

    Watch `chosen` and `rejected`: under plain DPO the log-prob of the chosen response falls too.
    """
    pairs = state.pairs
    generator = rng(c.seed, "pair batch", state.update)
    rows = torch.randint(len(pairs["prompt"]), (c.minibatch,), generator=generator)
    length = (pairs["response"] != c.pad_id).sum(2)  # (n, 2)
    rows = rows[length[rows].amax(1).cpu().argsort(stable=True)]  # like lengths: little PAD

    def loss(part: Tensor) -> tuple[Tensor, Metrics]:
        logp = pair_logprobs(state.policy, pairs, part)
        part_loss, margin = DPO_ARMS[c.arm](logp, pairs["ref"][part], length[part], c)
        logp = logp.detach()
        per_token = logp / length[part]
        metrics = {
            "margin": margin.mean(),
            "pair_accuracy": (margin > 0).float().mean(),
            "chosen": logp[:, 0].mean(),
            "chosen_per_token": per_token[:, 0].mean(),
            "rejected": logp[:, 1].mean(),
            "rejected_per_token": per_token[:, 1].mean(),
        }
        weight = len(part) / len(rows)
        return part_loss * weight, {name: x * weight for name, x in metrics.items()}

    lr_share = schedule(state.update % c.updates, c.updates, WARMUP)
    return optimizer_step(state.optimizers, loss, rows, c, lr_share)


def new_problems(state: RoundsState, task: Task, c: DPOConfig, u: int) -> tuple[list[str], Metrics]:
    """The problems of a round that starts at update u, and what there is to log of them.

    DEVIATION: every round has new problems; the paper draws new responses to the same ones.
    """
    return task.prompts(c.prompts, rng(c.seed, "prompts", u)), {}


def verified(
    state: RoundsState, task: Task, b: Rollout, c: DPOConfig, u: int
) -> tuple[Tensor, Metrics]:
    """The true reward of each response (B,), and what there is to log of it."""
    truth = grades(task, b)
    return truth, {"truth": float(truth.mean())}


def no_more_pairs(
    state: RoundsState, task: Task, c: DPOConfig
) -> tuple[list[dict[str, Tensor]], Metrics]:
    """Responses to the round's problems are all that is compared."""
    return [], {}


def pairs_together(sets: list[dict[str, Tensor]], pad: int) -> dict[str, Tensor]:
    """Several sets of pairs as one: prompt (n, P) with the widest P, response (n, 2, R)."""
    P = max(pairs["prompt"].shape[1] for pairs in sets)
    prompts = []
    for pairs in sets:
        missing = P - pairs["prompt"].shape[1]
        prompts.append(F.pad(pairs["prompt"], (missing, 0), value=pad))
    response = torch.cat([pairs["response"] for pairs in sets])
    return {"prompt": torch.cat(prompts), "response": response}


def new_round(
    state: RoundsState,
    task: Task,
    c: DPOConfig,
    pose: Callable,
    judge: Callable,
    pair: Callable,
    more_pairs: Callable,
) -> None:
    """Draw the responses of a round and keep its pairs in the state."""
    u = state.update
    policy = state.policy
    device = policy.device

    # 1. sample
    texts, about_problems = pose(state, task, c, u)
    prompt, group = in_groups(task, texts, c, device)
    b = sample(policy, prompt, c, group=group, generator=rng(c.seed, "sample", u))

    # 2. score
    score, about_scores = judge(state, task, b, c, u)
    check_rewards(score.masked_fill(score.isnan(), 0.0), task, b)  # NaN: nobody gave a score

    # 3. credit
    rows = pair(score, group, c)
    pairs = {"prompt": prompt[rows[:, 0]], "response": b.response[rows]}
    more, about_more = more_pairs(state, task, c)
    pairs = pairs_together([pairs, *more], c.pad_id)
    n = len(pairs["prompt"])
    if n > 0:
        with torch.no_grad():  # the reference is the model that this round starts from
            parts = torch.arange(n).split(c.micro)
            pairs["ref"] = torch.cat([pair_logprobs(policy, pairs, part) for part in parts])
    state.pairs = pairs
    state.samples += len(prompt)
    about_round = {"pairs": len(rows), "round": u // c.updates}
    about_round["length"] = float(b.mask.sum(1).mean())
    state.round_metrics = about_round | about_problems | about_scores | about_more


def iterative_dpo(
    state: RoundsState,
    task: Task,
    c: DPOConfig,
    pose: Callable = new_problems,
    judge: Callable = verified,
    pair: Callable = pair_up,
    more_pairs: Callable = no_more_pairs,
) -> Iterator[Metrics]:
    """Iterative reasoning preference optimization, arXiv 2404.19733v3.

    pose: (state, task, c, u) -> the round's problems, and what there is to log of them
    judge: (state, task, b, c, u) -> the score of each response (B,), and what there is to log
    pair: (score, group, c) -> rows (n, 2) of the better and the worse response
    more_pairs: (state, task, c) -> further sets of pairs, and what there is to log
    """
    while state.update < c.total_updates():
        if state.update % c.updates == 0:
            new_round(state, task, c, pose, judge, pair, more_pairs)

        # 4. update; a round without pairs teaches nothing and is over at once
        if len(state.pairs["prompt"]) > 0:
            metrics = pair_update(state, c)
            state.update += 1
        else:
            metrics = {}
            state.update += c.updates
        yield metrics | state.round_metrics | {"samples": state.samples}


# ---- what there is to see


@torch.no_grad()
def logprobs_in_parts(policy: Transformer, b: Rollout, c: Config) -> Tensor:
    """The log-prob of each token of the responses (B, R), at temperature 1."""
    parts = []
    for rows in torch.arange(len(b.mask)).split(c.micro):
        parts.append(token_logprobs(policy, b.prompt[rows], b.response[rows], temperature=1.0))
    return torch.cat(parts)


def explain_logprobs(state: State, task: Task, b: Rollout, c: Config) -> list[Metrics]:
    """The log-prob of each token, as transcripts hold it: one list for each response."""
    logp = logprobs_in_parts(state.policy, b, c)
    return [{"logp": rounded(row[counts])} for row, counts in zip(logp, b.mask > 0, strict=True)]


# How many pairs of a round are shown at a time.
PAIRS_SHOWN = 8


def pairs_of_the_round(state: RoundsState, task: Task, c: DPOConfig) -> list[Metrics]:
    """Some of the round's pairs, and the margin that lies between their responses now.

    gain: how much likelier, in nats, the policy finds a response than the model did that the round
    started from. The margin is the gain of the chosen minus that of the rejected, as in (9).
    """
    n = len(state.pairs["prompt"]) if state.pairs else 0
    if n == 0:
        return []
    rows = torch.arange(0, n, ceil(n / PAIRS_SHOWN))
    prompt = state.pairs["prompt"][rows].repeat_interleave(2, 0)
    response = state.pairs["response"][rows].flatten(0, 1)
    group = torch.arange(len(rows)).repeat_interleave(2)
    order = torch.full_like(response, -1)  # nobody asks for it
    b = Rollout(prompt, response, up_to_eos(response, c), order, group)
    texts = texts_of(task, response, b.mask)
    of_token = logprobs_in_parts(state.policy, b, c)
    logp = of_token.sum(1).view(-1, 2)
    gains = rounded((logp - state.pairs["ref"][rows]).flatten())
    sides = []
    for i, text in enumerate(texts):
        real = b.mask[i] > 0
        side = {"response": text, "ids": response[i][real].tolist()}
        sides.append(side | {"logp": rounded(of_token[i][real]), "gain": gains[i]})
    found = []
    for i in range(len(rows)):
        chosen = sides[2 * i]
        rejected = sides[2 * i + 1]
        margin = round(chosen["gain"] - rejected["gain"], 3)
        about_pair = {"prompt": task.decode(prompt[2 * i].tolist()), "margin": margin}
        found.append(about_pair | {"chosen": chosen, "rejected": rejected})
    return found


METHODS["iterative_dpo"] = Method(
    config=DPOConfig,
    start=start_rounds,
    loop=iterative_dpo,
    explain=explain_logprobs,
    pairs=pairs_of_the_round,
    choices={"arm": DPO_ARMS},
    only_with={"beta": "arm dpo_nll", "alpha": "arm dpo_nll"},
)


# ==== 11. self_rewarding =========================================================================
#
# The same weights pose the problems, solve them and judge the solutions. A round is one of
# iterative_dpo; only its problems, its scores and its pairs are the model's own. M1 is the model at
# the start, M2 the one after the first round.
#
# Pairs of solutions make a better solver, and leave the judge where it was. So judgements are
# paired too: of several judgements of one solution, the one that was written most often is better
# than another one. Nobody has to know which is true.


@dataclass(frozen=True)
class SelfRewardingConfig(DPOConfig):
    """The numbers of self_rewarding."""

    # Two rounds make three models: M1, M2 and M3.
    rounds: int = 2
    # The pairs of a round are several hundred of solutions, and twice as many of judgements.
    updates: int = 120
    samples: int = 4
    # Judgements of each response, J; their mean is its score.
    judgements: int = 8
    # What is paired: both, or solutions alone as in the paper.
    paired: str = "both"
    # own: the policy judges, and its judging changes with it. frozen: M1 judges in all rounds.
    judge: str = "own"
    # Demonstrations that turn the base model into M1: judging, posing problems, solving.
    start_data: int = 8_000
    # The share of them that judge (the paper's evaluation fine-tuning, EFT). With 0.8 M1 solves
    # 37 % and not 45.
    judging: float = 0.7
    # Updates of the training of M1. After 300 of them the judge ranks a right response above a
    # wrong one in 80 % of the pairs, after 400 in 86 %, which takes a third longer.
    start_updates: int = 300
    # AdamW's learning rate in the training of M1.
    start_lr: float = 0.01
    # Muon's learning rate in the training of M1.
    start_muon_lr: float = 0.01

    def responses_at_once(self) -> int:
        """The responses of a round, or the judgements of a part of them."""
        return max(self.prompts * self.samples, SAMPLED_AT_ONCE * self.judgements)

    def rules(self) -> list[tuple[bool, str]]:
        """The best response is set against the worst; M1's data are shared out."""
        most = 1 - POSING
        return [
            (self.samples > 1, "--samples must be at least 2: the best is set against the worst"),
            (self.judging <= most, f"--judging is a share of M1's data: at most {most:.2f}"),
            (
                self.paired != "both" or self.judgements > 2,
                "--judgements must be at least 3: two of them agree against a third; or give "
                "--paired solutions",
            ),
        ]


# The share of M1's demonstrations that pose a problem.
POSING = 0.07
# Where there are many prompts, so many are given to a model at once, each with all its samples. It
# decides memory alone.
SAMPLED_AT_ONCE = 512


def m1_demos(task: Task, c: SelfRewardingConfig) -> list[tuple[str, str]]:
    """What M1 learns from: judgements, proposed problems, and solutions as the base did."""
    generator = rng(c.seed, "seed data")
    demos = []
    for chance in torch.rand(c.start_data, generator=generator).tolist():
        if chance < c.judging:
            demos.append(task.judge_demo(generator))
        elif chance > 1 - POSING:
            demos.append(task.propose_demo(generator))
        else:
            demos.append(task.demo(generator))
    return demos


def m1(
    base: Transformer, task: Task, c: SelfRewardingConfig, train: Trainer = train_now
) -> Transformer:
    """M1, which the loop starts from: the base model, taught to judge and to pose problems too."""
    model = copy_of(base)

    def make_batches() -> Batches:
        return gpt_batches(model, encode_demos(task, m1_demos(task, c), c), c)

    train(
        "m1",
        [model],
        make_batches,
        c.start_updates,
        c,
        c.start_lr,
        c.start_muon_lr,
        reads="start_data judging",
    )
    return model


# A number at the very end, perhaps with `/ 5`. In front of it stands the beginning of the text, a
# `!` or the word score.
SCORE = re.compile(r"(?:^|!|score[\s:=]*)([0-9]+(?:\.[0-9]+)?)(?:\s*/\s*5)?$", re.I | re.A)


def parse_score(text: str) -> float | None:
    """The score that a judgement ends with: `3`, `!3`, `Score: 3.5`, `score 4/5`; else None.

    Only the very end counts, so a score that the judgement quotes is not taken. Scores lie in 0..5.
    """
    found = SCORE.search(text.strip().removesuffix("<eos>").rstrip(". "))
    score = float(found[1]) if found else -1.0
    return score if 0 <= score <= 5 else None


@dataclass(kw_only=True)
class SelfRewardingState(RoundsState):
    """Who judges, what it has written in this round, and which problems were posed so far."""

    judge: Transformer
    # prompt (B, P), response (B, J, R), score (B, J): all judgements of each solution. The score is
    # -1 where it cannot be read.
    judgements: dict[str, Tensor] = field(default_factory=dict)
    posed: dict[str, None] = field(default_factory=dict)


def start_self_rewarding(policy: Transformer, c: SelfRewardingConfig) -> SelfRewardingState:
    """A fresh state. The judge is the policy itself, or a frozen copy of it as it is now."""
    judge = frozen_copy(policy) if c.judge == "frozen" else policy
    return SelfRewardingState(policy=policy, judge=judge, optimizers=optimizers([policy], c.lr))


def is_shown(problem: str, prompt: str) -> bool:
    """Whether a prompt shows this very problem, and not only a longer one that ends like it."""
    return bool(re.search(rf"(?:^|[\s>]){re.escape(problem)}(?:$|[\s<])", prompt))


def pose_problems(
    state: SelfRewardingState, task: Task, c: SelfRewardingConfig, u: int
) -> tuple[list[str], Metrics]:
    """The model is shown three problems and writes a new one; the task fills up what is missing.

    DEVIATION: the policy poses them; in the paper a fixed model does.
    """
    generator = rng(c.seed, "propose", u)
    # Twice as many prompts as problems, because some of what is written is no problem.
    shown = [task.propose_demo(generator)[0] for _ in range(2 * c.prompts)]
    written = respond(state.policy, task, shown, c, generator)
    valid = []
    for prompt, text in zip(shown, written, strict=True):
        copied = is_shown(text.removesuffix("<eos>").strip(), prompt)
        valid.append(None if copied else task.problem(text))
    state.samples += len(written)
    new = [x for x in dict.fromkeys(valid) if x and x not in state.posed]
    new = new[: c.prompts]
    state.posed |= dict.fromkeys(new)
    texts = new + task.prompts(c.prompts - len(new), generator)
    return texts, {
        "valid": sum(x is not None for x in valid) / len(shown),
        "proposed": len(new) / len(texts),
    }


def judged(
    state: SelfRewardingState, task: Task, b: Rollout, c: SelfRewardingConfig, u: int
) -> tuple[Tensor, Metrics]:
    """Scores (B,): the mean of J sampled judgements, NaN where none of them can be read.

    The task's grader is not asked.
    """
    generator = rng(c.seed, "judge", u)
    device = b.prompt.device
    asked = []
    for prompt, response in zip(b.prompt.tolist(), b.response.tolist(), strict=True):
        asked.append([c.bos_id, *task.judge_prompt(prompt, response)])

    question = left_pad(asked, c.pad_id).to(device)
    responses = []
    scores = []
    for part in question.split(SAMPLED_AT_ONCE):
        prompt = part.repeat_interleave(c.judgements, 0)
        written = sample(state.judge, prompt, c, generator=generator)
        responses.append(written.response)
        scores += [parse_score(text) for text in texts_of(task, written.response, written.mask)]
    state.samples += len(scores)
    scores = [torch.nan if x is None else x for x in scores]
    score = torch.tensor(scores, device=device)
    state.judgements = {
        "prompt": question,
        "response": torch.cat(responses).view(len(question), c.judgements, -1),
        "score": score.nan_to_num(-1.0).view(-1, c.judgements),
    }

    mean = float(score.nanmean())
    quoted = [parse_score(text) is not None for text in texts_of(task, b.response, b.mask)]
    return score.view(-1, c.judgements).nanmean(1), {
        "score": mean,
        "spread": float(score.nan_to_num(mean).std(correction=0)),
        "unread": float(score.isnan().float().mean()),
        # Responses that end with a score themselves: they talk to the judge.
        "quoted": sum(quoted) / len(quoted),
    }


def best_and_worst(score: Tensor, group: Tensor, c: DPOConfig) -> Tensor:
    """Scores (B,), NaN = none, and group (B,) -> rows (n, 2): best and worst. A tie gives none."""
    pairs = []
    for rows in rows_of_groups(group):
        rows = rows[~score[rows].isnan()]
        if len(rows) == 0:
            continue
        best = rows[score[rows].argmax()]
        worst = rows[score[rows].argmin()]
        if score[best] > score[worst]:
            pairs.append((int(best), int(worst)))
    return torch.tensor(pairs, dtype=torch.long).view(-1, 2)


def agreed(judgements: list[list[int]]) -> tuple[int, int] | None:
    """Of the judgements of one solution one that was written most often, and one that differs.

    Returns their places, or None if no two are the same, or all. Of `!4`, `!5`, `!4` it is (0, 1).
    Of two that were written equally often the first one counts.
    """
    kinds = [tuple(ids) for ids in judgements]
    most, times = Counter(kinds).most_common(1)[0]
    if times == 1 or times == len(kinds):
        return None
    other = next(k for k, kind in enumerate(kinds) if kind != most)
    return kinds.index(most), other


def judgement_pairs(
    state: SelfRewardingState, task: Task, c: SelfRewardingConfig
) -> tuple[list[dict[str, Tensor]], Metrics]:
    """Pairs of judgements of one solution: the one that was written most often is the better one.

    Agreement in place of truth: self-consistency preference optimization, arXiv 2411.04109. Pairs
    of judgements: meta-rewarding, arXiv 2407.19594, where the model itself compares them. A
    judgement that cannot be read is never the better one.
    """
    written = state.judgements
    rows = []
    pairs = []
    score = written["score"].tolist()
    for row, judgements in enumerate(written["response"].tolist()):
        pair = agreed(judgements)
        if pair and score[row][pair[0]] >= 0:
            rows.append(row)
            pairs.append(pair)
    device = written["prompt"].device
    row = torch.tensor(rows, dtype=torch.long, device=device)
    column = torch.tensor(pairs, dtype=torch.long, device=device).view(-1, 2)
    response = written["response"][row[:, None], column]
    state.judgements = {}  # they are many, and a saved state does not need them
    return [{"prompt": written["prompt"][row], "response": response}], {
        "judgement_pairs": len(rows)
    }


# What is paired -> the pairs beside those of solutions.
PAIRED = {"solutions": no_more_pairs, "both": judgement_pairs}


def self_rewarding(
    state: SelfRewardingState, task: Task, c: SelfRewardingConfig
) -> Iterator[Metrics]:
    """Self-rewarding language models, arXiv 2401.10020: `iterative_dpo` on its own scores.

    DEVIATION: the loss is DPO + NLL (9). The paper's is --alpha 0, which loses accuracy here.
    DEVIATION: judgements are paired too. The paper's loop is --paired solutions.
    """
    return iterative_dpo(state, task, c, pose_problems, judged, best_and_worst, PAIRED[c.paired])


@torch.no_grad()
def explain_judgements(
    state: SelfRewardingState, task: Task, b: Rollout, c: SelfRewardingConfig
) -> list[Metrics]:
    """The log-prob of each token, and what the judge writes about the whole response."""
    found = explain_logprobs(state, task, b, c)
    asked = replace(state)  # the loop's own state keeps its count of samples and its judgements
    judged(asked, task, b, c, state.update)
    written = asked.judgements["response"]
    for inside, judgements, scores in zip(
        found, written, asked.judgements["score"].tolist(), strict=True
    ):
        inside["judgements"] = [task.decode(ids) for ids in judgements.tolist()]
        inside["scores"] = [None if score < 0 else score for score in scores]
    return found


METHODS["self_rewarding"] = Method(
    config=SelfRewardingConfig,
    start=start_self_rewarding,
    loop=self_rewarding,
    starts_from=m1,
    explain=explain_judgements,
    pairs=pairs_of_the_round,
    choices={"arm": DPO_ARMS, "judge": ("own", "frozen"), "paired": PAIRED},
    only_with=METHODS["iterative_dpo"].only_with,
    needs="judge_prompt judge_demo problem propose_demo",
)


# ==== 12. Learned rewards, and seq2seq ===========================================================
#
# Where there is no verifier, a reward has to be learned from preferences: pairs of responses of
# which a labeller liked one better. The labeller of the toy task has a weakness, --planted, and so
# the learned reward has it too.
#
#   --reward learned   a scalar model: one score for a whole response
#   seq2seq            a rewriting model: a token is good if the rewriter would have written it too


@dataclass(frozen=True)
class Seq2SeqConfig(PolicyGradientConfig):
    """The numbers of seq2seq."""

    # All rollouts of an update in one optimizer step: the clip never acts here.
    minibatch: int = 512
    # A leash, because whatever is learned can be fooled. Without it the KL of one seed of two grew
    # to 5 nats.
    beta: float = 0.1
    # Updates of the training of the rewriter.
    reward_updates: int = 150
    # UNKNOWN: what a token earns before the first disagreement in (11).
    c_pos: float = 0.1
    # UNKNOWN: what a disagreement costs in (11).
    c_neg: float = 0.1


def labelled_pairs(task: Task, c: PolicyGradientConfig) -> list[tuple[str, str, str]]:
    """The preference pairs that scorer and rewriter learn from."""
    return task.preferences(c.reward_data, rng(c.seed, "preferences"))


def preference_loss(score_w: Tensor, score_l: Tensor) -> Tensor:
    """Bradley-Terry: scores (B,) of the preferred and of the other -> scalar.

    The mean of -log sigmoid(score_w - score_l).
    """
    return -F.logsigmoid(score_w - score_l).mean()


class Scorer(nn.Module):
    """A reward model: a score for a response and for each of its prefixes.

    It is a head on the hidden vector of the last token, plus a learned weight times the log-prob of
    all tokens so far. DEVIATION: the papers of ORM, SORM and preference models have the head alone,
    which is --logp-weight 0.

    For a model this small a hidden vector is not enough. Behind `42*3=22;` it knows that 22 was
    written, but to call that wrong it would have to compute 42 * 3 once more, in the layers that
    are busy with what comes next. It has computed it already: just before, to predict these very
    tokens, so that their log-probs say how well they fit.

    An example, `37+5*3=` and a draft whose second step is right or wrong (modulo 100, and the units
    are written first):

        `42*3=26;`   log-probs of 6 and 2:  -1.7  -0.2   SORM 0.94; of hidden vectors alone 0.32
        `42*3=22;`   log-probs of 2 and 2:  -7.7  -3.7   SORM 0.29; of hidden vectors alone 0.29

    As a reward such a log-prob is known from arXiv 2412.01981. There it is relative to the model
    that the scorer started from, which ranked responses worse here: the area under the curve was
    0.72 with it and 0.93 without (ORM; dev, seed 0).

    logp_weight: the weight of the log-prob before training; it is learned. 0 leaves the log-prob
    out.
    """

    def __init__(self, trunk: Transformer, logp_weight: float, generator: torch.Generator):
        super().__init__()
        c = trunk.config
        self.trunk = trunk
        self.head = Head(c, (c.width + 1) ** -0.5, generator).to(trunk.device)
        self.logp_weight = nn.Parameter(torch.tensor(float(logp_weight), device=trunk.device))
        self.reads_logp = logp_weight != 0
        # How many responses were drawn for it, where it serves as a reward.
        self.register_buffer("drawn", torch.tensor(0))

    def prefixes(self, prompt: Tensor, response: Tensor) -> Tensor:
        """(B, P), (B, R) -> the scores of all prefixes, (B, R + 1). Prefix k has k tokens.

        It is read where its last token has been read, without a shift, and the empty one at the end
        of the prompt. Its log-prob is that of its own tokens, with the shift.
        """
        # s(y_1..k) = w h_k + b + logp_weight sum_{i <= k} log pi(y_i | x, y_<i)
        P = prompt.shape[1]
        hidden = self.trunk.hidden(torch.cat([prompt, response], dim=1))  # (B, P + R, C)
        score = self.head(hidden[:, P - 1 :])  # (B, R + 1)
        if self.reads_logp:
            logp = gather_logprobs(self.trunk, response_part(hidden, P), response, temperature=1.0)
            score = score + self.logp_weight * F.pad(logp.cumsum(1), (1, 0))  # 0 for the empty one
        return score

    def at(self, prompt: Tensor, response: Tensor, ends: Tensor) -> Tensor:
        """(B, P), (B, R), lengths of prefixes (B, S) -> their scores (B, S).

        Where `ends` is -1 they mean nothing.
        """
        return self.prefixes(prompt, response).gather(1, ends.clamp(min=0))

    def forward(self, prompt: Tensor, response: Tensor) -> Tensor:
        """(B, P), (B, R) -> the scores of whole responses, (B,)."""
        length = up_to_eos(response, self.trunk.config).sum(1, keepdim=True).long()
        return self.at(prompt, response, length)[:, 0]

    @torch.no_grad()
    def read(
        self, prompt: Tensor, response: Tensor, c: Config, ends: Tensor | None = None
    ) -> Tensor:
        """The scores of many responses (B,), or with `ends` of their prefixes (B, S).

        They are read `micro` rows at a time, because log-probs need room for V numbers a token.
        """
        found = []
        for rows in torch.arange(len(response), device=response.device).split(c.micro):
            if ends is None:
                found.append(self(prompt[rows], response[rows]))
            else:
                found.append(self.at(prompt[rows], response[rows], ends[rows]))
        return torch.cat(found)

    @torch.no_grad()
    def normalize(self, b: Rollout, c: Config) -> None:
        """Gain and bias for scores of mean 0 and variance 1 over these responses.

        DEVIATION: scores are normalized after training only; the original code also does it before.
        """
        score = self.read(b.prompt, b.response, c)
        gain = 1 / score.std(unbiased=False).clamp(min=1e-4)
        linear = self.head.linear
        linear.bias.sub_(score.mean())
        for p in (linear.weight, linear.bias, self.logp_weight):
            p.mul_(gain)
        self.drawn.fill_(len(score))


def preference_batches(
    scorer: Scorer, pairs: list[tuple[str, str, str]], task: Task, c: Config
) -> Batches:
    """Batches of (problem, preferred, other) texts for `fit`."""
    device = scorer.trunk.device
    problems, preferred, other = (list(texts) for texts in zip(*pairs, strict=True))
    prompt = encode_prompts(task, problems, c).to(device)
    preferred = right_pad(task.encode(preferred), c.pad_id, c.response).to(device)
    other = right_pad(task.encode(other), c.pad_id, c.response).to(device)

    def draw_batch(update: int) -> tuple[Tensor, Loss]:
        generator = rng(c.seed, "pairs", update)
        rows = torch.randint(len(pairs), (c.base_batch,), generator=generator)

        def loss(part: Tensor) -> tuple[Tensor, Metrics]:
            score_w = scorer(prompt[part], preferred[part])
            score_l = scorer(prompt[part], other[part])
            weight = len(part) / len(rows)
            in_order = (score_w > score_l).float().mean()
            return preference_loss(score_w, score_l) * weight, {"pair_accuracy": in_order * weight}

        return rows, loss

    return draw_batch


def scorer_models(
    base: Transformer, task: Task, c: PPOConfig, train: Trainer = train_now
) -> dict[str, nn.Module]:
    """A Bradley-Terry model that starts as the base model and reads preference pairs."""
    scorer = Scorer(copy_of(base), c.logp_weight, rng(c.seed, "scorer"))

    def make_batches() -> Batches:
        return preference_batches(scorer, labelled_pairs(task, c), task, c)

    # A tenth of the base model's rate, and no Muon: it only has to learn a taste.
    train(
        "scorer",
        [scorer],
        make_batches,
        c.reward_updates,
        c,
        c.base_lr / 10,
        reads="reward_data logp_weight",
    )
    problems = task.prompts(512, rng(c.seed, "normalize"))
    prompt = encode_prompts(task, problems, c).to(base.device)
    drawn = sample(base, prompt, c, generator=rng(c.seed, "normalize", 1))
    scorer.normalize(drawn, c)
    return {"scorer": scorer.requires_grad_(False)}


@torch.no_grad()
def learned(state: PPOState, task: Task, b: Rollout, truth: Tensor, c: Config) -> Tensor:
    """The score of a preference model, whatever the truth is."""
    return at_end(state.models["scorer"].read(b.prompt, b.response, c), b, c)


REWARDS["learned"] = RewardSource(learned, scorer_models, needs="preferences")


# ---- seq2seq: the rewriting model


def rewriting_demos(task: Task, pairs: list[tuple[str, str, str]], c: Config) -> list[Demo]:
    """(10) what the rewriter learns, as ids: (x, other) -> preferred, (x, preferred) -> preferred.

    The first kind teaches it to correct, the second to leave alone what is good.
    """
    prompts = task.encode([x for x, _, _ in pairs])
    preferred = task.encode([better for _, better, _ in pairs])
    other = task.encode([worse for _, _, worse in pairs])
    demos = []
    for given in (other, preferred):
        for x, y, target in zip(prompts, given, preferred, strict=True):
            demos.append((rewriter_prompt(task, [c.bos_id, *x], y, c), target))
    return demos


def rewriter_models(
    base: Transformer, task: Task, c: Seq2SeqConfig, train: Trainer = train_now
) -> dict[str, nn.Module]:
    """The base model, taught to rewrite both responses of each pair as the preferred one."""
    model = copy_of(base)

    def make_batches() -> Batches:
        return gpt_batches(model, rewriting_demos(task, labelled_pairs(task, c), c), c)

    train(
        "rewriter",
        [model],
        make_batches,
        c.reward_updates,
        c,
        c.base_lr,
        c.muon_lr,
        reads="reward_data",
    )
    return {"rewriter": model.requires_grad_(False)}


def agreement_reward(
    logits: Tensor, response: Tensor, mask: Tensor, c_pos: float, c_neg: float
) -> Tensor:
    """(11) the sequence-to-sequence reward, arXiv 2409.00162 -> (B, R).

    logits (B, R, V): what the rewriter would write in place of each token, given the response
    before it; response and mask (B, R).
    UNKNOWN: which tokens agree; here it is the rewriter's likeliest one alone.
    """
    # agrees_k = [ y_k = argmax_v rewriter(v | x, y, y_<k) ]
    # reward_k = c_pos before the first k that does not agree, from then on -c_neg (1 - agrees_k)
    token = response * (mask > 0)  # PAD may lie behind the vocabulary
    written = logits.gather(-1, token[..., None])
    agrees = (logits > written).sum(-1) == 0
    disagrees = (~agrees).float() * mask
    before = disagrees.cumsum(1) == 0
    return (c_pos * before - c_neg * disagrees) * mask


@torch.no_grad()
def agreement(state: PPOState, task: Task, b: Rollout, truth: Tensor, c: Seq2SeqConfig) -> Tensor:
    """(11) by the rewriter, which reads each response once.

    DEVIATION: a response without an end costs NO_EOS here too.
    """
    rewriter = state.models["rewriter"]
    asked = []
    for prompt, response in zip(b.prompt.tolist(), b.response.tolist(), strict=True):
        asked.append(rewriter_prompt(task, prompt, response, c))
    asked = left_pad(asked, c.pad_id).to(b.prompt.device)
    reward = at_end(torch.zeros_like(truth), b, c)
    for rows in torch.arange(len(asked)).split(c.micro):
        response = b.response[rows]
        hidden = predictive_hidden(rewriter, asked[rows], response)
        logits = log_softmax(rewriter.lm_head(hidden), 1.0, c)
        reward[rows] += agreement_reward(logits, response, b.mask[rows], c.c_pos, c.c_neg)
    return reward


def seq2seq(state: PPOState, task: Task, c: Seq2SeqConfig) -> Iterator[Metrics]:
    """Sequence-to-sequence reward modelling, arXiv 2409.00162: `ppo` with another reward."""
    return ppo(state, task, c, agreement)


def explain_seq2seq(state: PPOState, task: Task, b: Rollout, c: Seq2SeqConfig) -> list[Metrics]:
    """What each token of a response earns."""
    return token_rewards(state, task, b, c, agreement)


METHODS["seq2seq"] = Method(
    config=Seq2SeqConfig,
    start=start_ppo,
    loop=seq2seq,
    reward_models=rewriter_models,
    explain=explain_seq2seq,
    choices={"arm": PPO_ARMS},
    only_with={"lam": "arm gae", "value_coef": "arm gae"},
    needs="preferences",
)


# ==== 13. refine =================================================================================
#
# Four models work on the drafts of a fifth, the student, which itself stays as it is. Two of them
# judge. The ORM (outcome reward model) says whether the draft's answer is right, the SORM (stepwise
# ORM) whether the right answer can still be reached from the end of a prefix. The other two mend:
# the global refiner writes the whole response anew, the local one goes on from the step that the
# SORM blames. In the end the ORM chooses between the draft and these two.
#
# The SORM learns from labels that nobody has to write: a prefix is good if the student gets from
# its end to the right answer in one of K tries.


@dataclass(frozen=True)
class RefineConfig(Config):
    """The numbers of refine."""

    # Drafts, one for each problem.
    prompts: int = 6_144
    # Updates of the training of each of the four models.
    updates: int = 150
    # AdamW's learning rate in it; Muon's is `muon_lr`.
    lr: float = 0.01
    # Continuations of each prefix, K of (8).
    continuations: int = 8
    # The weight of a prefix's log-prob in its scores (section 12), before it is trained; 0 leaves
    # the log-prob out.
    logp_weight: float = 0.5
    # Labelled drafts of an optimizer step; the refiners take half as many demonstrations. More
    # problems help, several drafts of one problem do not.
    minibatch: int = 128
    # The student learns its own right responses to so many problems. About two fifths of its drafts
    # stay wrong.
    start_data: int = 128
    # Updates of the student's training.
    start_updates: int = 15
    # Its learning rate: AdamW alone.
    start_lr: float = 1e-3

    def responses_at_once(self) -> int:
        """A draft of each problem, or the continuations of a prefix."""
        return max(self.prompts, self.continuations)


# The SORM blames the first step whose probability is below this number.
THRESHOLD = 0.5


def student(
    base: Transformer, task: Task, c: RefineConfig, train: Trainer = train_now
) -> Transformer:
    """The base model after one round of expert iteration: it learns its own right responses."""
    model = copy_of(base)

    def make_batches() -> Batches:
        texts = task.prompts(c.start_data, rng(c.seed, "expert"))
        prompt, group = in_groups(task, texts, c, model.device)
        b = sample(model, prompt, c, group=group, generator=rng(c.seed, "expert", 1))
        right = grades(task, b) == 1
        demos: list[Demo] = []
        for x, y in zip(b.prompt[right].tolist(), b.response[right].tolist(), strict=True):
            demo = (without(x, c.pad_id), without(y, c.pad_id))
            if demo not in demos:
                demos.append(demo)
        if not demos:
            raise UserError("no response was right, so there is nothing to learn: --start-data")
        return gpt_batches(model, demos, c)

    train(
        "student",
        [model],
        make_batches,
        c.start_updates,
        c,
        c.start_lr,
        warmup=WARMUP,
        reads="start_data samples temperature",
    )
    return model


# ---- what a draft's prefixes are


def prefix_ends(task: Task, b: Rollout) -> Tensor:
    """How many tokens each prefix of a response has, (B, S), padded with -1.

    The first prefix is empty, one ends behind every step, and the last is the whole response.
    `37+5=42;42*3=26;#26<eos>` has the prefixes 0, 8, 16 and 20.
    """
    rows = []
    lengths = b.mask.sum(1).long().tolist()
    for response, length in zip(b.response.tolist(), lengths, strict=True):
        ends = [0]
        for _, last in task.steps(response[:length]):
            ends.append(last + 1)
        if ends[-1] != length:  # the response may end together with a step
            ends.append(length)
        rows.append(ends)
    S = max(len(row) for row in rows)
    return right_pad(rows, -1, S).to(b.response.device)


# ---- step labels


def rollout_labels(good: Tensor) -> Tensor:
    """(8) GLoRe, arXiv 2402.10963: K continuations of each prefix (B, S, K) -> its label (B, S).

    good: whether a continuation is right and uses the last result of its prefix. One that does not
    use it is no evidence for the prefix. Whatever stands before a good prefix is good.
    """
    # label_s = 1 if any_k (right_sk and uses_sk) or label_{s+1} = 1
    reached = good.any(-1)
    return reached.flip(1).cummax(1).values.flip(1)  # read from the end: good from there on


def balance(labels: Tensor, s: Tensor, generator: torch.Generator) -> Tensor:
    """Which examples to keep (n,): of each number of a prefix, s (n,), as many good as bad ones.

    Otherwise that number alone would predict the label, because late prefixes are mostly bad.
    """
    keep = torch.zeros_like(labels, dtype=torch.bool)
    for number in s.unique():
        at = (s == number).nonzero()[:, 0]
        at = at[torch.randperm(len(at), generator=generator).to(at.device)]
        good = at[labels[at] > 0]
        bad = at[labels[at] <= 0]
        n = min(len(good), len(bad))
        keep[good[:n]] = True
        keep[bad[:n]] = True
    return keep


def continuations_of(
    policy: Transformer, draft: Rollout, ends: Tensor, c: Config
) -> tuple[Tensor, Tensor]:
    """Sample K continuations of every prefix that is not the whole draft.

    ends (B, S); rows of -1 alone are left out. Returns origin (n, 2), the row and the prefix of
    each, and the traces (n, K, R): whole responses that begin with their prefix.
    """
    proper = (ends >= 0) & (ends < ends.amax(1, keepdim=True))
    origin = proper.nonzero()
    row, s = origin.T
    origin = origin[ends[row, s].argsort(stable=True)]  # like lengths are written together
    place = torch.arange(c.response, device=ends.device)
    generator = rng(c.seed, "continue")
    traces = []
    for part in origin.split(max(1, SAMPLED_AT_ONCE // c.continuations)):
        row, s = part.repeat_interleave(c.continuations, 0).unbind(1)
        behind = place >= ends[row, s, None]
        start = draft.response[row].masked_fill(behind, c.pad_id)
        written = sample(policy, draft.prompt[row], c, start, generator=generator)
        traces.append(written.response)
    return origin, torch.cat(traces).view(len(origin), c.continuations, c.response)


def check_traces(
    task: Task, draft: Rollout, ends: Tensor, origin: Tensor, traces: Tensor
) -> tuple[Tensor, Tensor]:
    """Traces (n, K, R) -> whether each is right, and whether it uses its prefix, both (n, K).

    A trace uses its prefix if it goes on from what the prefix's last step claims; the empty prefix
    is always used. Without this check a wrong step would count as good when the student simply
    starts again and gets it right.
    """
    right = []
    uses = []
    for (row, s), several in zip(origin.tolist(), traces.tolist(), strict=True):
        prompt = task.decode(draft.prompt[row].tolist())
        end = int(ends[row, s])
        begin = int(ends[row, s - 1]) if s > 0 else 0
        step = task.decode(draft.response[row, begin:end].tolist())
        for trace in several:
            right.append(task.grade(prompt, task.decode(trace)) > 0.5)
            uses.append(s == 0 or task.uses(step, task.decode(trace[end:])))
    shape = traces.shape[:2]
    return (
        torch.tensor(right, dtype=torch.bool).view(shape),
        torch.tensor(uses, dtype=torch.bool).view(shape),
    )


def step_labels(
    right: Tensor, ends: Tensor, origin: Tensor, good: Tensor, c: Config
) -> dict[str, Tensor]:
    """Labels of all prefixes for ORM and SORM, and which of them are examples.

    right (B,): whether the draft's own answer is right; good (n, K): whether the traces that were
    drawn for `origin` (n, 2) are right and use their prefix. Returns ends (B, S), label and keep
    (2, B, S), the ORM's first (see SCORERS). The ORM's label of every prefix is `right`. The SORM's
    is (8): a prefix is good if one of its K traces is, or one of a later prefix; of good and bad
    prefixes equally many are examples.

    An example, a wrong draft with two steps and so with four prefixes:

        prefix      ``     `37+5=42;`   `37+5=42;42*3=22;`   whole draft
        any good    yes    yes          no                   no, it is wrong
        SORM        1      1            0                    0     the second step is the error
        ORM         0      0            0                    0

    DEVIATION: the steps of a right draft are good without a check that they are used.
    """
    # Which traces of each prefix are good, (B, S, K). The whole draft is its own trace.
    of_prefix = torch.zeros(*ends.shape, good.shape[1], dtype=torch.bool)
    row, s = origin.cpu().T
    of_prefix[row, s] = good
    whole = ends.cpu().argmax(1)  # the prefix that is the whole draft
    of_prefix[torch.arange(len(ends)), whole] = right.cpu()[:, None]
    sorm = rollout_labels(of_prefix)

    # Every prefix but the empty one may be an example. The ORM gets a random choice of as many as
    # the SORM keeps.
    generator = rng(c.seed, "balance")
    row, s = (ends.cpu() > 0).nonzero(as_tuple=True)
    for_sorm = balance(sorm[row, s], s, generator)
    for_orm = torch.randperm(len(row), generator=generator) < for_sorm.sum()
    keep = torch.zeros(2, *ends.shape)
    keep[0, row, s] = for_orm.float()
    keep[1, row, s] = for_sorm.float()
    label = torch.stack([right.cpu()[:, None].expand_as(sorm), sorm]).float()
    return {"ends": ends, "label": label.to(ends.device), "keep": keep.to(ends.device)}


@dataclass
class LabelledDrafts:
    """Drafts, the traces that were drawn from their prefixes, and the labels that follow."""

    # prompt (B, P), response (B, R), ends (B, S), label and keep (2, B, S), as in `step_labels`.
    examples: dict[str, Tensor]
    # Row and prefix of each trace, (n, 2).
    origin: Tensor
    # (n, K, R)
    traces: Tensor
    # Whether a trace is right and uses its prefix, (n, K).
    good: Tensor
    # The share of drafts that are right.
    truth: float
    # How many responses were drawn.
    samples: int


def label_drafts(policy: Transformer, task: Task, n: int, c: Config) -> LabelledDrafts:
    """Draw n drafts, one for each problem, go on from the prefixes of the wrong ones, and label."""
    # 1. sample
    device = policy.device
    problems = task.prompts(n, rng(c.seed, "draft prompts"))
    prompt = encode_prompts(task, problems, c).to(device)
    draft = sample(policy, prompt, c, generator=rng(c.seed, "drafts"))
    right = grades(task, draft) > 0.5
    ends = prefix_ends(task, draft)
    wrong_ends = ends.masked_fill(right[:, None], -1)
    origin, traces = continuations_of(policy, draft, wrong_ends, c)

    # 2. score
    success, uses = check_traces(task, draft, ends, origin, traces)
    good = success & uses

    # 3. credit: which steps still lead to the answer
    examples = step_labels(right, ends, origin, good, c)
    examples |= {"prompt": prompt, "response": draft.response}
    truth = float(right.float().mean())
    return LabelledDrafts(examples, origin, traces, good, truth, n + success.numel())


def binary_loss(score: Tensor, label: Tensor, mask: Tensor, denom: Tensor | int) -> Tensor:
    """Cross-entropy of sigmoid(score) and labels 0 or 1; all of one shape -> scalar."""
    # -1/denom sum of mask [ label log sigmoid(score) + (1 - label) log sigmoid(-score) ]
    if_good = label * F.logsigmoid(score)
    if_bad = (1 - label) * F.logsigmoid(-score)
    return -((if_good + if_bad) * mask).sum() / denom


# The scorers by name, in the order of their labels.
SCORERS = ("orm", "sorm")


def step_batches(
    name: str, scorer: Scorer, examples: dict[str, Tensor], size: int, c: Config
) -> Batches:
    """Batches of labelled drafts for `fit` of a scorer, which is one of SCORERS by name.

    Logged is the share of labels that it predicts.
    """
    number = SCORERS.index(name)
    label = examples["label"][number]
    keep = examples["keep"][number]
    length = examples["ends"].amax(1).cpu()

    def draw_batch(update: int) -> tuple[Tensor, Loss]:
        generator = rng(c.seed, "step batch", update)
        rows = torch.randint(len(length), (size,), generator=generator)
        rows = rows[length[rows].argsort(stable=True)]
        denom = keep[rows].sum().clamp(min=1)

        def loss(part: Tensor) -> tuple[Tensor, Metrics]:
            response = examples["response"][part, : int(length[part].max())]
            score = scorer.at(examples["prompt"][part], response, examples["ends"][part])
            predicted = (score > 0) == (label[part] > 0)
            known = (predicted * keep[part]).sum() / denom
            return binary_loss(score, label[part], keep[part], denom), {name: known}

        return rows, loss

    return draw_batch


# ---- the refiners


def first_error(scores: Tensor, threshold: float) -> int:
    """The index of the first of these scores (S,) below the threshold; S if there is none."""
    return int((scores >= threshold).cumprod(0).sum())  # how many stand before it


def good_traces(drafts: LabelledDrafts, c: Config) -> Iterator[tuple[int, int, list[int]]]:
    """The first good trace of every prefix that has one: row, prefix, the ids of the trace."""
    traces = drafts.traces.tolist()
    for i, good in enumerate(drafts.good.tolist()):
        if any(good):
            row, s = drafts.origin[i].tolist()
            yield row, s, without(traces[i][good.index(True)], c.pad_id)


def global_demos(task: Task, drafts: LabelledDrafts, c: Config) -> list[Demo]:
    """What the global refiner learns: a wrong draft -> a right response from the beginning."""
    demos = []
    for row, s, trace in good_traces(drafts, c):
        if s == 0:
            prompt = drafts.examples["prompt"][row].tolist()
            response = drafts.examples["response"][row].tolist()
            demos.append((rewriter_prompt(task, prompt, response, c), trace))
    return demos


def local_demos(task: Task, drafts: LabelledDrafts, c: Config) -> list[Demo]:
    """What the local refiner learns: a draft with `<bad>` before its error -> a right rest."""
    demos = []
    for row, s, trace in good_traces(drafts, c):
        # If prefix n is the first bad one, the error stands behind prefix n - 1.
        label = drafts.examples["label"][SCORERS.index("sorm"), row]
        last_good = first_error(label, 0.5) - 1
        if s == last_good:
            end = int(drafts.examples["ends"][row, s])
            prompt = drafts.examples["prompt"][row].tolist()
            response = drafts.examples["response"][row].tolist()
            demos.append((rewriter_prompt(task, prompt, response, c, bad_at=end), trace[end:]))
    return demos


# ---- the loop


@dataclass(kw_only=True)
class RefineState(State):
    """The student is the policy and stays as it is; four copies of it learn."""

    orm: Scorer
    sorm: Scorer
    global_refiner: Transformer
    local_refiner: Transformer
    # The training of each: "orm", "sorm", "global", "local". `optimizers` stays empty.
    fits: dict[str, Fit]
    # What ORM and SORM learn from, as in LabelledDrafts.
    examples: dict[str, Tensor] = field(default_factory=dict)
    # What the refiners learn from: "global", "local".
    demos: dict[str, list[Demo]] = field(default_factory=dict)
    # What there is to log of the drafts.
    draft_metrics: Metrics = field(default_factory=dict)


def start_refine(policy: Transformer, c: RefineConfig) -> RefineState:
    """A fresh state."""
    parts: dict[str, Any] = {}
    for name in SCORERS:
        parts[name] = Scorer(copy_of(policy), c.logp_weight, rng(c.seed, name))
    parts |= {"global": copy_of(policy), "local": copy_of(policy)}
    fits = {}
    for name, part in parts.items():
        fits[name] = Fit([part], optimizers([part], c.lr, c.muon_lr))
    return RefineState(
        policy=policy,
        optimizers=[],
        orm=parts["orm"],
        sorm=parts["sorm"],
        global_refiner=parts["global"],
        local_refiner=parts["local"],
        fits=fits,
    )


def refine(state: RefineState, task: Task, c: RefineConfig) -> Iterator[Metrics]:
    """GLoRe, arXiv 2402.10963: drafts and continuations teach two scorers and two refiners."""
    if not state.examples:
        # `label_drafts` does 1. sample, 2. score and 3. credit
        drafts = label_drafts(state.policy, task, c.prompts, c)
        state.examples = drafts.examples
        state.demos = {
            "global": global_demos(task, drafts, c),
            "local": local_demos(task, drafts, c),
        }
        # The student has already cost some: its own responses, of which it learned the right ones.
        state.samples = drafts.samples + c.start_data * c.samples
        state.draft_metrics = {"truth": drafts.truth, "pairs": len(state.demos["local"])}

    # 4. update; a refiner without examples stays as it is
    batches = {}
    for name, scorer in (("orm", state.orm), ("sorm", state.sorm)):
        batches[name] = step_batches(name, scorer, state.examples, c.minibatch, c)
    half = max(1, c.minibatch // 2)
    for name, model in (("global", state.global_refiner), ("local", state.local_refiner)):
        if state.demos[name]:
            batches[name] = gpt_batches(model, state.demos[name], c, size=half)
    learning = []
    for name, batch in batches.items():
        learning.append(fit(state.fits[name], batch, c.updates, c))
    for logs in zip(*learning, strict=True):
        state.update += 1
        metrics = {"orm": logs[0]["orm"], "sorm": logs[1]["sorm"]}
        for name, part in zip(batches, logs, strict=True):
            metrics[f"{name}_loss"] = part["loss"]
        yield metrics | state.draft_metrics | {"samples": state.samples}


# ---- what a trained refine answers


@dataclass
class Refinements:
    """A draft and its two refinements, for each problem."""

    response: Tensor  # (3, B, R): draft, global, local
    score: Tensor  # (3, B): the ORM's logits
    blamed: list[int | None]  # where the step begins that the SORM blames; None if it blames none


def rewritten(
    model: Transformer,
    task: Task,
    draft: Rollout,
    bad_at: list[int | None],
    c: Config,
    generator: torch.Generator | None,
) -> list[list[int]]:
    """What a refiner writes that reads the drafts, with the mark `<bad>` where one is given."""
    asked = []
    for x, y, at in zip(draft.prompt.tolist(), draft.response.tolist(), bad_at, strict=True):
        asked.append(rewriter_prompt(task, x, y, c, at))
    prompt = left_pad(asked, c.pad_id).to(draft.prompt.device)
    return sample(model, prompt, c, generator=generator).response.tolist()


@torch.no_grad()
def refinements(
    state: RefineState,
    task: Task,
    prompts: list[str],
    c: RefineConfig,
    generator: torch.Generator | None = None,
) -> Refinements:
    """Draft, global and local refinement of each problem, and what ORM and SORM say of them."""
    prompt = encode_prompts(task, prompts, c).to(state.policy.device)
    draft = sample(state.policy, prompt, c, generator=generator)

    # Where: the SORM blames the first step whose probability is below the threshold. With prefixes
    # that end at 0, 8, 16 and 20, and probabilities of 0.9, 0.3 and 0.2 from the second on, it is
    # step 1 (counted from 0), which begins at 8.
    ends = prefix_ends(task, draft)
    sorm = state.sorm.read(prompt, draft.response, c, ends).sigmoid()
    blamed: list[int | None] = []
    for score, row in zip(sorm, ends.tolist(), strict=True):
        row = [end for end in row if end >= 0]
        first = first_error(score[1 : len(row)], THRESHOLD)  # the empty prefix has no step
        blamed.append(row[first] if first < len(row) - 1 else None)

    # How: the local refiner's rest replaces the draft's. It reads all drafts in one batch; where
    # nothing is blamed, what it writes is not used.
    bad_at = [0 if at is None else at for at in blamed]
    rest = rewritten(state.local_refiner, task, draft, bad_at, c, generator)
    local = []
    for ids, tail, at in zip(draft.response.tolist(), rest, blamed, strict=True):
        mended = ids if at is None else ids[:at] + tail
        local.append(mended[: c.response])
    anew = rewritten(state.global_refiner, task, draft, [None] * len(blamed), c, generator)
    response = torch.stack([draft.response, prompt.new_tensor(anew), prompt.new_tensor(local)])

    # Whether: the ORM scores all three.
    score = torch.stack([state.orm.read(prompt, each, c) for each in response])
    return Refinements(response, score, blamed)


def answer_refined(
    state: RefineState,
    task: Task,
    prompts: list[str],
    c: RefineConfig,
    generator: torch.Generator | None = None,
) -> list[str]:
    """Of the draft and its two refinements the one that the ORM likes best, as text."""
    found = refinements(state, task, prompts, c, generator)
    best = found.score.argmax(0)
    column = torch.arange(len(prompts), device=best.device)
    chosen = found.response[best, column]
    return texts_of(task, chosen, up_to_eos(chosen, c))


@torch.no_grad()
def explain_steps(state: RefineState, task: Task, b: Rollout, c: RefineConfig) -> list[Metrics]:
    """The probabilities of ORM and SORM behind each step, and how many tokens there are by then.

    The last entry is that of the whole response.
    """
    ends = prefix_ends(task, b)
    orm = state.orm.read(b.prompt, b.response, c, ends).sigmoid()
    sorm = state.sorm.read(b.prompt, b.response, c, ends).sigmoid()
    found = []
    for says_orm, says_sorm, row in zip(orm, sorm, ends, strict=True):
        step = row > 0
        inside = {"orm": rounded(says_orm[step]), "sorm": rounded(says_sorm[step])}
        found.append({"step_ends": row[step].tolist(), **inside})
    return found


METHODS["refine"] = Method(
    config=RefineConfig,
    start=start_refine,
    loop=refine,
    starts_from=student,
    first="draws {prompts:,} drafts, and from each step of the wrong ones {continuations} more",
    answer=answer_refined,
    explain=explain_steps,
    needs="steps uses",
    answer_parts=("orm", "sorm", "global_refiner", "local_refiner"),
)


# ---- the SORM as a reward of ppo


def sorm_models(
    base: Transformer, task: Task, c: PPOConfig, train: Trainer = train_now
) -> dict[str, nn.Module]:
    """A SORM that starts as the base model and reads labelled drafts of it."""
    scorer = Scorer(copy_of(base), c.logp_weight, rng(c.seed, "sorm"))

    def make_batches() -> Batches:
        drafts = label_drafts(base, task, c.reward_data, c)
        scorer.drawn.fill_(drafts.samples)
        return step_batches("sorm", scorer, drafts.examples, c.base_batch, c)

    train(
        "sorm",
        [scorer],
        make_batches,
        c.reward_updates,
        c,
        c.base_lr,
        c.muon_lr,
        reads="reward_data continuations temperature logp_weight",
    )
    return {"scorer": scorer.requires_grad_(False)}


def step_probabilities(state: PPOState, b: Rollout, ends: Tensor, c: Config) -> Tensor:
    """The SORM's probability that the answer can still be reached, behind each prefix, (B, S)."""
    return state.models["scorer"].read(b.prompt, b.response, c, ends).sigmoid()


def pay_changes(probability: Tensor, ends: Tensor, b: Rollout, c: Config) -> Tensor:
    """At the end of each step the change of the probability (B, S) -> rewards (B, R).

    Such differences cannot be collected twice: over a response they add up to the last probability
    minus the one of the empty prefix. A response without an end costs NO_EOS.
    """
    # reward_k = p(prefix s) - p(prefix s - 1) if prefix s ends with token k, else 0
    reward = at_end(torch.zeros_like(probability[:, 0]), b, c)
    change = probability[:, 1:] - probability[:, :-1]
    step = ends[:, 1:] > 0  # the other entries are padding
    at = (ends[:, 1:] - 1).clamp(min=0)
    return reward.scatter_add(1, at, change * step)


def step_progress(state: PPOState, task: Task, b: Rollout, truth: Tensor, c: PPOConfig) -> Tensor:
    """The SORM alone: what each step has changed of its probability.

    It has no examples of the empty prefix; what it says there depends on the problem alone, and so
    it is the same for all responses to a problem.
    """
    ends = prefix_ends(task, b)
    return pay_changes(step_probabilities(state, b, ends, c), ends, b, c)


def shaped_progress(state: PPOState, task: Task, b: Rollout, truth: Tensor, c: PPOConfig) -> Tensor:
    """The SORM on the way and the verifier at the end, which has the last word.

    The true reward takes the place of the SORM's probability of the whole response. So the rewards
    add up to the true one, minus what the SORM says of the problem: it moves credit to the steps,
    and cannot be fooled.
    """
    ends = prefix_ends(task, b)
    probability = step_probabilities(state, b, ends, c)
    whole = ends.argmax(1, keepdim=True)
    probability = probability.scatter(1, whole, truth[:, None].to(probability.dtype))
    return pay_changes(probability, ends, b, c)


REWARDS["sorm"] = RewardSource(step_progress, sorm_models, needs="steps uses")
REWARDS["shaped"] = RewardSource(shaped_progress, sorm_models, needs="steps uses")


# ##################################################################################################
#
#   PART III: THE SECOND MODEL
#
# ##################################################################################################

# ==== 14. A masked-diffusion language model ======================================================
#
# It begins with a canvas of MASKs and writes tokens in the place of some of them in each pass. The
# canvas is divided into blocks, which are written from left to right, because what stands further
# on depends on what stands before; within a block the order is free. Every position sees every
# other. Apart from that it is the same network, with the weights of the GPT to start from.


@dataclass(frozen=True)
class DenoiseConfig(Config):
    """The numbers of denoise, and of the diffusion LM that it starts from."""

    prompts: int = 32
    # What a response is paid for: outcome for its answer alone, process for the way to it too.
    arm: str = "outcome"
    # How often an update goes through its rollouts.
    epochs: int = 2
    # Rollouts of one optimizer step: here all 256 of an update.
    minibatch: int = 256
    # The band 1 +- clip in which a ratio earns more.
    clip: float = 0.2
    # The weight of the KL to the reference, in the loss.
    beta: float = 0.0
    # Who finishes a canvas to find its prospects: short_tail or same_canvas.
    prover: str = "short_tail"
    # The places that short_tail may still write: here one step, or the answer.
    tail: int = 8
    # Over how many answers of the prover the prospects are averaged in (6). UNKNOWN: the paper
    # tries 1 to 9; with 3 it has the numbers of its main table.
    branches: int = 3
    # What the process reward weighs beside the advantage in (7).
    process_weight: float = 1.0

    # ---- the diffusion LM
    # Places of a block. Blocks are written from left to right, the places of one in any order.
    block: int = 4
    # Passes that a block takes. With fewer several tokens are chosen at once, independently.
    block_passes: int = 4
    # Updates of the training of the diffusion LM.
    start_updates: int = 500
    # AdamW's learning rate in it. At the rate of the GPT's training the facts are lost.
    start_lr: float = 0.002
    # Muon's learning rate in it. With 0.003 and 0.01 it knows less after as many updates.
    start_muon_lr: float = 0.006
    # The share of these updates in which attention to later positions fades in; 0 starts from
    # random weights that see everything at once.
    look_ahead: float = 0.7
    # The smallest rate at which training replaces tokens by MASK: its weight 1 / rate explodes
    # below.
    t_min: float = 0.05

    def responses_at_once(self) -> int:
        """The responses of an update, or the branches of all of them if that many are asked for."""
        branches = self.branches if self.arm == "process" else 1
        return self.prompts * self.samples * branches

    def rules(self) -> list[tuple[bool, str]]:
        """What the numbers have to keep to."""
        return [
            (self.samples > 1, "denoise compares samples of one prompt: --samples 2 or more"),
            (self.t_min <= 1, "--t-min is a rate, at most 1"),
            (self.look_ahead <= 1, "--look-ahead is a share of --start-updates, at most 1"),
            (self.lora == 0, "denoise trains all weights, or its GPT never learns to look ahead"),
        ]


def rate_masks(like: Tensor, generator: torch.Generator, t_min: float) -> tuple[Tensor, Tensor]:
    """Open each place of a row of `like` (B, R) with the row's own probability, its rate.

    Returns is_open (B, R), which places hold a MASK, and 1 / rate (B, 1).
    """
    B = len(like)
    # One row in each B-th part of [t_min, 1]. In random order, because rows may be sorted.
    rate = (torch.randperm(B, generator=generator) + torch.rand(B, generator=generator)) / B
    rate = t_min + (1 - t_min) * rate[:, None]
    is_open = torch.rand(like.shape, generator=generator) < rate
    return is_open.to(like.device), (1 / rate).to(like.device)


def masked_nll(
    model: Transformer, prompt: Tensor, response: Tensor, is_open: Tensor, weight: Tensor
) -> Tensor:
    """What (1) averages: weight times the sum over open places of -log p(y_k | x, rest), (B,)."""
    canvas = response.masked_fill(is_open, model.config.mask_id)
    hidden = predictive_hidden(model, prompt, canvas)
    logp = gather_logprobs(model, hidden, response, temperature=1.0)
    return -(logp * is_open * weight).sum(1)


def diffusion_loss(
    model: Transformer,
    prompt: Tensor,
    response: Tensor,
    generator: torch.Generator,
    t_min: float,
    rows: Tensor | slice = slice(None),
) -> Tensor:
    """(1) masked diffusion, arXiv 2502.09992: (B, P), (B, R) -> scalar, nats per position.

    No place of the prompt is opened. PAD behind the end becomes EOS and is learned, so that the
    model stops. rows: a part of the batch; open places are drawn for all of it, so that parts add
    up.
    """
    # mean over rows of  1/R 1/rate sum_k is_open_k (-log p(y_k | x, the rest))
    # Rate and open places are drawn once for each row. The division is by R, not by the number of
    # open places.
    c = model.config
    response = response.masked_fill(response == c.pad_id, c.eos_id)
    is_open, weight = rate_masks(response, generator, t_min)
    parts = (x[rows] for x in (prompt, response, is_open, weight))
    return masked_nll(model, *parts).sum() / response.numel()


def fade_in(update: int, c: DenoiseConfig) -> float:
    """How much a position sees of what comes after it at this update: 0 nothing, 1 everything.

    It grows with the square of the time, arXiv 2410.17891. Every second update is a rehearsal as a
    GPT, though never the last. Greedy accuracy: 40 % with both, 29 % without the rehearsal, 4 %
    without either.
    """
    if c.look_ahead == 0:
        return 1.0
    if (c.start_updates - update) % 2 == 0:
        return 0.0
    return min(1.0, (update + 1) / (c.look_ahead * c.start_updates)) ** 2


def diffusion_batches(model: Transformer, demos: list[Demo], c: DenoiseConfig) -> Batches:
    """Batches of demonstrations for `fit`, in turn for the diffusion LM and for the GPT it was."""
    data = Demos(demos, c, model.device)

    def draw_batch(update: int) -> tuple[Tensor, Loss]:
        rows = data.rows(c.base_batch, c.seed, update)
        denom = int(data.response_length[rows].sum())
        weight = fade_in(update, c)

        def loss(part: Tensor) -> tuple[Tensor, Metrics]:
            model.future_weight = weight  # how much the model sees ahead in this update
            if weight == 0:
                return data.next_token_loss(model, rows[part], denom), {}
            generator = rng(c.seed, "hidden", update)
            prompt, response = data.prompt[rows], data.response[rows]
            return diffusion_loss(model, prompt, response, generator, c.t_min, part), {}

        # Places within the batch and not rows of the data: the open places are drawn for all of it.
        return torch.arange(len(rows)), loss

    return draw_batch


def diffusion_base(
    base: Transformer, task: Task, c: DenoiseConfig, train: Trainer = train_now
) -> Transformer:
    """The diffusion LM: the weights of the base GPT, taught to look ahead on its demonstrations."""
    # A folder's vocabulary may have no MASK; then it gets one more row, the mean of the others.
    wide = replace(c, causal=False, vocab=max(c.vocab, c.mask_id + 1))
    model = on_device(Transformer(wide, rng(c.seed, "init")), c)
    model.source = base.source
    if c.look_ahead > 0:
        weights = base.state_dict()
        for name, own in model.state_dict().items():
            if len(own) > len(weights[name]):
                row = weights[name].mean(0, keepdim=True)
                weights[name] = torch.cat([weights[name], row])
        model.load_state_dict(weights)

    def make_batches() -> Batches:
        return diffusion_batches(model, task_demos(task, c), c)

    train(
        "diffusion",
        [model],
        make_batches,
        c.start_updates,
        c,
        c.start_lr,
        c.start_muon_lr,
        reads="look_ahead t_min",
    )
    model.future_weight = 1.0
    return model


# ---- its sampler


def read_once(
    model: Transformer, prompt: Tensor, canvas: Tensor, micro: int | None = None
) -> tuple[Tensor, Tensor]:
    """The canvases (B, R) beside their prompts, equal ones only once, micro of them at a time.

    Returns the vectors (n, R, C) of the n different ones, and which of these each row has (B,).
    """
    both = torch.cat([prompt, canvas], dim=1)
    unique, which = both.unique(dim=0, return_inverse=True)
    parts = unique.split(micro or len(unique))
    hidden = torch.cat([model.hidden(part) for part in parts])
    return response_part(hidden, prompt.shape[1]), which


def open_places(block: int, passes: int) -> list[int]:
    """The ladder of a block: how many places are open before each of its passes, and at the end.

    open_places(10, 4) is [10, 7, 4, 2, 0]: the passes write 3, 3, 2 and 2 tokens.
    """
    each, more = divmod(block, passes)
    ladder = [block]
    for i in range(passes):
        ladder.append(ladder[-1] - each - (i < more))
    return ladder


def unmask(
    model: Transformer, prompt: Tensor, canvas: Tensor, c: DenoiseConfig, uniform: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The diffusion LM writes: blocks from left to right, in each the surest places first (LLaDA).

    canvas (B, R), MASK is open -> responses, order and the log-probs of what was written (at
    temperature 1 where it is 0), each (B, R). It stops where nothing is open before the end of a
    response; places behind it become PAD. A block that is partly written is treated as if the
    earlier passes had been made already: the number of its open places tells which pass comes next,
    and the passes that are left share these places.

    An example: blocks of 4 places in 4 passes, so that the ladder is [4, 3, 2, 1, 0], and the
    canvas

        3 7 + 5 | = M M ; | M M M M

    The first block with a MASK is the second, and 2 of its places are open. The rungs of the ladder
    below 2 are 1 and 0, so two passes are left. Counted from 0 this is pass 2 of the block and pass
    6 of the canvas. It goes down to the next rung, 1: of the two tokens the surer one is written.
    """
    R = canvas.shape[1]
    block = uniform.shape[2]
    passes = c.block_passes
    ladder = torch.tensor(open_places(block, passes), device=prompt.device)
    order = torch.full_like(canvas, -1)
    logp = torch.zeros(canvas.shape, device=prompt.device)
    while True:
        # A response is written when no place is open before its end; what follows never counts.
        is_mask = canvas == c.mask_id
        before_end = is_end(canvas, c).cumsum(1) == 0
        rows = (is_mask & before_end).any(1).nonzero()[:, 0]
        if len(rows) == 0:
            order[is_mask] = uniform.shape[1]
            return canvas.masked_fill(is_mask, c.pad_id), order, logp
        # From here on the first dimension is n, the rows that are not written yet.
        left = canvas[rows]  # (n, R)
        first = (left == c.mask_id).int().argmax(1, keepdim=True)  # (n, 1) the first open place
        # The last block may be too long for the canvas; then it overlaps the one before.
        begin = (first // block * block).clamp(max=R - block)
        place = begin + torch.arange(block, device=left.device)  # (n, block)
        is_open = left.gather(1, place) == c.mask_id
        n_open = is_open.sum(1, keepdim=True)  # (n, 1)
        below = ladder < n_open  # (n, passes + 1) the rungs of the ladder that are left
        passes_left = below.sum(1, keepdim=True)
        this_pass = first // block * passes + passes - passes_left  # (n, 1)
        stay_open = (ladder * below).amax(1, keepdim=True)  # (n, 1) the next rung

        # At first all samples of a prompt are equal.
        hidden, which = read_once(model, prompt[rows], left, c.micro)
        logits = model.lm_head(hidden[which[:, None], place])  # (n, block, V)
        token = draw(logits, uniform[rows, this_pass[:, 0]], c)

        # Sure is what had a high probability at temperature 1, whatever temperature drew it.
        sure = of_tokens(log_softmax(logits, 1.0, c), token)
        drawn = sure
        if c.temperature not in (0, 1):
            drawn = of_tokens(log_softmax(logits, c.temperature, c), token)
        sure = sure.masked_fill(~is_open, -torch.inf)
        surest_first = sure.argsort(dim=1, descending=True, stable=True)
        rank = surest_first.argsort(1)  # of each place: 0 for the surest
        chosen = rank < n_open - stay_open
        at = (rows[:, None], place)
        canvas[at] = torch.where(chosen, token, canvas[at])
        order[at] = torch.where(chosen, this_pass, order[at])
        logp[at] = torch.where(chosen, drawn.float(), logp[at])


def canvas_before(response: Tensor, order: Tensor, p: Tensor, c: Architecture) -> Tensor:
    """The canvas (B, R) before pass p (B,): what was written then or later is MASK again."""
    return response.masked_fill(order >= p[:, None], c.mask_id)


@torch.no_grad()
def fill_at_once(model: Transformer, prompt: Tensor, canvas: Tensor, c: Config) -> Tensor:
    """The canvas (B, R) with the likeliest token in every open place, all in one pass."""
    logits = model.lm_head(predictive_hidden(model, prompt, canvas))
    likeliest = log_softmax(logits, 1.0, c).argmax(-1)
    return torch.where(canvas == c.mask_id, likeliest, canvas)


# ==== 15. denoise ================================================================================
#
# Policy gradient for the diffusion LM. The loop is that of ppo but for two things. Log-probs are
# read on many canvases: each token's on the one that the sampler had before it. And the arm
# `process` asks a prover how good the prospects of a canvas half-way were: of the responses that
# beat their group, those earn more whose prospects had risen by then.


# A token that was so likely had no rival: its log-prob can hardly be changed.
NO_RIVAL = 0.99


def estimate_diffusion(model: Transformer, b: Rollout, c: Config) -> tuple[Tensor, None]:
    """(2) log-probs of the tokens (B, R), each on the canvas that the sampler had before it.

    Tokens that were written in the same pass share a canvas, and so do responses that begin alike;
    each canvas is read once. When b.logp is known, what can change little keeps it and is not read:
    tokens without a rival, and where beta is 0 the responses without an advantage. That the sampler
    chose this place is not counted.
    DEVIATION: arXiv 2504.12216 reads all tokens on a canvas of MASKs only, as if none of them were
    there yet. That is one pass, but it underrates what follows from other tokens. After 25 updates
    59 % of the test problems are right with it, 84 % with these log-probs, and 81 % if the choice
    of the place counts too.
    """
    is_read = (b.mask > 0) & (b.order >= 0)
    if b.logp is None:
        logp = torch.zeros_like(b.mask)
    else:
        logp = b.logp
        is_read &= logp < log(NO_RIVAL)
        if b.adv is not None and c.beta == 0:
            is_read &= b.adv != 0
        is_read[0, 0] = True  # so that there is always something to take a gradient of
    row, place = is_read.nonzero(as_tuple=True)  # (n,) the tokens that are read
    when = b.order[row, place]  # (n,) the pass in which each was written
    canvas = canvas_before(b.response[row], b.order[row], when, c)  # (n, R)
    hidden, which = read_once(model, b.prompt[row], canvas)
    logits = model.lm_head(hidden[which, place])  # (n, V)
    of_all = log_softmax(logits, c.temperature, model.config)
    found = of_tokens(of_all, b.response[row, place])
    return logp.index_put((row, place), found), None


def some_pass(b: Rollout, generator: torch.Generator) -> Tensor:
    """A random pass p of each response (B,), from 1 to one behind the last that counts.

    So the canvas before it may be the finished one, and never the empty one. UNKNOWN: whether the
    paper draws it for each response, as here, or for each group.
    """
    last = (b.order * b.mask).amax(1)
    where = torch.rand(len(last), generator=generator)
    return 1 + (where.to(last.device) * (last + 1)).long()


# ---- provers: (state, rollouts, pass (B,), c, generator) -> a Rollout with some branches of each
#
# A prover finishes the canvas that a response was before a pass. The share of its answers that are
# right are the prospects of the canvas, the V of (6). If the policy itself goes on where it was,
# then (6) tells it on average what its own answers tell it already, arXiv 2410.08146. So a useful
# prover does something else.


def same_canvas(
    state: State, b: Rollout, p: Tensor, c: DenoiseConfig, generator: torch.Generator
) -> Rollout:
    """The policy goes on where it was: the null prover."""
    start = canvas_before(b.response, b.order, p, c).repeat_interleave(c.branches, 0)
    prompt = b.prompt.repeat_interleave(c.branches, 0)
    group = b.group.repeat_interleave(c.branches, 0)
    return sample(state.policy, prompt, c, start, group, generator)


def short_tail(
    state: State, b: Rollout, p: Tensor, c: DenoiseConfig, generator: torch.Generator
) -> Rollout:
    """The paper's prover: what is written moves together, and the policy has `tail` places to end.

    So a canvas has good prospects if little is missing. One that holds its end already is only
    moved together: what is drawn behind an end never counts. An example with a tail of 4 places:

        canvas    3 7 + 5 = M 2 M | M M M M | M M M M
        is read   3 7 + 5 = 2 | M M M M
    """
    canvas = canvas_before(b.response, b.order, p, c).repeat_interleave(c.branches, 0)
    prompt = b.prompt.repeat_interleave(c.branches, 0)
    begun = [without(ids, c.mask_id, c.pad_id) for ids in canvas.tolist()]
    read = []
    for problem, ids in zip(prompt.tolist(), begun, strict=True):
        read.append(without(problem, c.pad_id) + ids)
    shorter = replace(c, response=c.tail)
    end = sample(
        state.policy,
        left_pad(read, c.pad_id).to(prompt.device),
        shorter,
        generator=generator,
    )
    whole = [ids + more for ids, more in zip(begun, end.response.tolist(), strict=True)]
    response = right_pad(whole, c.pad_id, c.response + c.tail).to(prompt.device)
    order = torch.full_like(response, -1)
    group = b.group.repeat_interleave(c.branches, 0)
    return Rollout(prompt, response, up_to_eos(response, c), order, group)


PROVERS = {"short_tail": short_tail, "same_canvas": same_canvas}


def prospects(
    state: PPOState, task: Task, b: Rollout, rows: Tensor, c: DenoiseConfig
) -> tuple[Tensor, Tensor]:
    """A random pass of each response, and the prospects of the canvas before it, each (B,).

    The prospects are NaN but for the rows (B,) that are asked for.
    """
    p = some_pass(b, rng(c.seed, "state", state.update))
    found = torch.full(rows.shape, torch.nan, device=rows.device)
    if rows.any():
        generator = rng(c.seed, "branch", state.update)
        more = PROVERS[c.prover](state, b.select(rows), p[rows], c, generator)
        right = grades(task, more).view(int(rows.sum()), -1)  # (n, branches)
        found[rows] = right.mean(1)
        state.samples += len(more.mask)
    return p, found


def group_accuracy(reward: Tensor, group: Tensor) -> Tensor:
    """The share of right answers in the group of each response (B,), as (6) asks for it."""
    right = reward.clamp(min=0)  # without the penalty of a response that does not end
    return right - group_advantage(right, group, "mean")


def denoise_advantage(
    reward: Tensor, branch_reward: Tensor, group: Tensor, weight: float
) -> Tensor:
    """(7) the denoising process reward; all (B,).

    branch_reward: the prospects of a canvas of each response. They count only where the response
    beats its group, and may be NaN elsewhere. As the prospects of the empty canvas the paper takes
    the accuracy of the group, whoever the prover is.
    """
    # adv = reward - mean reward of the group
    # (6) progress = prospects of the canvas before pass p - accuracy of the group
    # (7) adv + weight progress where adv > 0, else adv
    adv = group_advantage(reward, group, "mean")
    progress = branch_reward - group_accuracy(reward, group)
    return torch.where(adv > 0, adv + weight * progress, adv)


# ---- arms: (state, task, rollouts, reward (B,), c) -> advantage (B, R)


def outcome(state: PPOState, task: Task, b: Rollout, reward: Tensor, c: DenoiseConfig) -> Tensor:
    """(2) diffu-GRPO, arXiv 2504.12216: the end alone, compared with the mean of the group."""
    return group_advantage(reward, b.group, "mean")[:, None] * b.mask


def process(state: PPOState, task: Task, b: Rollout, reward: Tensor, c: DenoiseConfig) -> Tensor:
    """(7) more for a response that was on the right way at a random pass, less for a wrong way.

    In arithmetic it loses: (6) compares the short tail with the policy, which is far better, so the
    progress is negative for most right answers. After 25 updates 49 % of the test problems are
    right, and 84 % with the outcome alone. With the prospects dealt to other right answers at
    random it is 66 %: half of the harm is done by the weight, whatever the prover says.
    """
    better = group_advantage(reward, b.group, "mean") > 0
    _, half_way = prospects(state, task, b, better, c)
    adv = denoise_advantage(reward, half_way, b.group, c.process_weight)
    return adv[:, None] * b.mask


DENOISE_ARMS = {"outcome": outcome, "process": process}


# ---- the loop


def denoise(
    state: PPOState,
    task: Task,
    c: DenoiseConfig,
    estimate: Callable = estimate_diffusion,
) -> Iterator[Metrics]:
    """Denoising process reward, arXiv 2510.01544: policy gradient with the credit (7).

    estimate: other log-probs than those that the sampler knows, for experiments.
    """
    device = state.policy.device
    while state.update < c.updates:
        u = state.update

        # 1. sample
        texts = task.prompts(c.prompts, rng(c.seed, "prompts", u))
        prompt, group = in_groups(task, texts, c, device)
        b = sample(state.policy, prompt, c, group=group, generator=rng(c.seed, "sample", u))
        if estimate is not estimate_diffusion:
            b.logp = None
        b = annotate(state, b, c, estimate)

        # 2. score
        truth = grades(task, b)
        reward = verifier(state, task, b, truth, c)

        # 3. credit
        b.adv = DENOISE_ARMS[c.arm](state, task, b, reward.sum(1), c)

        # 4. update: the loss is that of grpo
        metrics = policy_update(state, b, PPO_ARMS["grpo"], c, estimate)
        state.update += 1
        state.samples += len(prompt)
        yield metrics | rollout_metrics(b, reward, truth, c) | {"samples": state.samples}


@torch.no_grad()
def explain_denoising(state: PPOState, task: Task, b: Rollout, c: DenoiseConfig) -> list[Metrics]:
    """How each response was written, pass by pass. The problems are answered again, greedily.

    order (R): in which pass each token was written; sure (R): its probability then; said: what the
    model would have written at once before each pass; prospects: how often the policy ends each
    canvas well if it goes on there, V(x_t); branches: what it writes then, and whether that is
    right; ids: the response.
    """
    policy = state.policy
    b = sample(policy, b.prompt, replace(c, temperature=0.0))
    B = len(b.order)
    passes = int((b.order * b.mask).max()) + 1  # up to the last token that counts
    # One row for each response and pass.
    row = torch.arange(B, device=b.order.device).repeat_interleave(passes)
    p = torch.arange(passes, device=b.order.device).repeat(B)
    canvas = canvas_before(b.response[row], b.order[row], p, c)
    guesses = []
    for part in torch.arange(len(row)).split(c.micro):
        guesses.append(fill_at_once(policy, b.prompt[row[part]], canvas[part], c))
    guess = torch.cat(guesses)
    sure = b.logp.exp().masked_fill(b.response == c.pad_id, 0.0)  # PAD was never written

    generator = rng(c.seed, "trajectory", state.update)
    shares = []
    ends: list[tuple[str, bool]] = []
    for i in torch.arange(len(row)).split(SAMPLED_AT_ONCE):
        more = same_canvas(state, b.select(row[i]), p[i], c, generator)
        right = grades(task, more)
        shares.append(right.view(-1, c.branches).mean(1))
        texts = texts_of(task, more.response, more.mask)
        ends += zip(texts, (right == 1).tolist(), strict=True)
    share = torch.cat(shares).view(B, passes)
    found = []
    for i in range(B):
        own = int((b.order[i] * b.mask[i]).max()) + 1  # the passes of this response
        said = guess.view(B, passes, -1)[i, :own].tolist()
        branches = []
        for k in range(own):
            first = (i * passes + k) * c.branches
            branches.append(ends[first : first + c.branches])
        found.append(
            {
                "ids": b.response[i][b.mask[i] > 0].tolist(),
                "order": b.order[i].tolist(),
                "sure": rounded(sure[i]),
                "said": [task.decode(ids) for ids in said],
                "prospects": rounded(share[i, :own]),
                "branches": branches,
            }
        )
    return found


METHODS["denoise"] = Method(
    config=DenoiseConfig,
    start=start_ppo,
    loop=denoise,
    starts_from=diffusion_base,
    explain=explain_denoising,
    writes_again=True,
    shown=1,  # each canvas is valued by branches, which takes time
    choices={"arm": DENOISE_ARMS, "prover": PROVERS},
    only_with={
        "prover": "arm process",
        "branches": "arm process",
        "process_weight": "arm process",
        "tail": "prover short_tail",
    },
)


# ##################################################################################################
#
#   PART IV: BEYOND THE LAPTOP (to be skipped on a first reading)
#
# ##################################################################################################

# ==== 16. Errors and saved state =================================================================
#
# After this section you know why a killed run goes on bit for bit.


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write to a temporary name and rename it.

    If the process is killed the old file or the new one is there, and never half of one. If
    writing fails, as on a full disk, UserError says so and the old file is still there.
    """
    if is_first():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two runs may share a cache
        try:
            write(temporary)
            os.replace(temporary, path)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch's own are RuntimeErrors
            raise UserError(
                f"{path} cannot be written (is the disk full?): {error!r:.200}"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
    if dist.is_initialized():
        dist.barrier()  # all processes wait until the file exists


def as_plain(x: Any) -> Any:
    """Records become dicts, and modules and optimizers their state, down to tensors and numbers."""
    if isinstance(x, (nn.Module, torch.optim.Optimizer)):
        return x.state_dict()
    if is_dataclass(x):
        return {f.name: as_plain(getattr(x, f.name)) for f in fields(x)}
    if isinstance(x, dict):
        return {name: as_plain(y) for name, y in x.items()}
    if isinstance(x, list):
        return [as_plain(y) for y in x]
    return x


def refuse_bad_numbers(plain: Any, name: str = "state") -> None:
    """The first tensor that holds a NaN or an infinite number raises ValueError with its name."""
    if isinstance(plain, Tensor):
        has_numbers = plain.is_floating_point() and not plain.is_meta
        if has_numbers and not plain.isfinite().all():
            raise ValueError(f"{name} holds numbers that are not finite")
    if isinstance(plain, dict):
        for key, part in plain.items():
            refuse_bad_numbers(part, f"{name}.{key}")
    if isinstance(plain, list):
        for i, part in enumerate(plain):
            refuse_bad_numbers(part, f"{name}.{i}")


def fill(mine: Any, saved: Any) -> Any:
    """Put what `as_plain` gave back into a fresh state, and return it."""
    parts = (nn.Module, torch.optim.Optimizer)
    if isinstance(mine, parts):
        mine.load_state_dict(saved)
        return mine
    if is_dataclass(mine):
        for f in fields(mine):
            setattr(mine, f.name, fill(getattr(mine, f.name), saved[f.name]))
        return mine
    if isinstance(mine, dict):
        mine.update({name: fill(mine.get(name), x) for name, x in saved.items()})
        return mine
    if isinstance(mine, list) and mine and isinstance(mine[0], parts):
        return [fill(x, y) for x, y in zip(mine, saved, strict=True)]
    return saved


def save_state(folder: str | Path, state: Any) -> None:
    """All that lives across updates -> folder/state.pt. Generators are not in it: see `rng`.

    Weights that have become NaN or infinite raise UserError, and the last good state stays.
    """
    plain = as_plain(state)
    path = Path(folder) / "state.pt"
    try:
        refuse_bad_numbers(plain)
    except ValueError as error:
        raise UserError(
            f"training diverged, so {path} is not written: {error}; lower the learning rate"
        ) from None
    write_whole(path, lambda temporary: torch.save(plain, temporary))


def load_state(folder: str | Path, into: Any = None, device: str | torch.device = "cpu") -> Any:
    """What save_state wrote. With `into`, a fresh state is filled with it.

    Raises UserError if the file is missing or damaged. No code that it may hold is ever run.
    """
    path = Path(folder) / "state.pt"
    if not path.exists():
        raise UserError(f"{folder} holds no state.pt; name the folder of a run that was started")
    try:
        # The file is a zip archive, which keeps a checksum of each of its parts. torch.load does
        # not compare them, and one flipped bit would be a wrong weight.
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} is wrong")
        saved = torch.load(path, weights_only=True, map_location=device)
        refuse_bad_numbers(saved)
        return saved if into is None else fill(into, saved)
    except Exception as error:  # torch.load may raise almost anything
        if out_of_memory(error):
            raise  # the file may be whole
        raise UserError(f"{path} is damaged or of other code, delete it: {error!r:.100}") from error


# ==== 17. Several processes ======================================================================
#
# Under torchrun all processes hold the same weights and the same batch and share the work: of two
# processes the first takes the rows 0, 2, 4, ... and the second 1, 3, 5, ... What each has found is
# added up: a tensor of zeros in which each process has filled its own rows becomes the tensor of
# all.


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return not dist.is_initialized() or dist.get_rank() == 0


def own_rows(x: Tensor) -> Tensor:
    """The rows that this process works on."""
    if not dist.is_initialized():
        return x
    return x[dist.get_rank() :: dist.get_world_size()]


def over_ranks(x: Tensor) -> Tensor:
    """The sum over all processes, in place: so sums, and means of them, are those of the whole."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


# ==== 18. GPUs ===================================================================================
#
# Lines that are marked [gpu], here and elsewhere, are not run by the tests: they need a GPU.


def pick_device(name: str) -> str:
    """auto -> cuda or cpu. A device that is not there raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, TypeError):
        raise UserError(f"--device {name} is not here; try --device cpu") from None
    return name


class CudaGraph:  # [gpu]
    """Reads one more token of every row, as `Transformer.hidden` does, without its overhead.

    A GPU would spend most of the time waiting for Python. So the second call is recorded as a CUDA
    graph, which this and all later calls replay on the same tensors. For that all shapes must stay
    the same: rows that have ended are written on, and attention sees the whole room of the cache.
    """

    def __init__(self, model: Transformer, cache: Cache):
        self.model = model
        self.cache = cache
        self.token: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, token: Tensor) -> Tensor:
        """token (B,) -> the vectors that predict the next one, (B, C)."""
        if self.token is None:  # the first call warms up
            self.cache.used = torch.tensor([self.cache.used], device=token.device)
            self.token = token.clone()
            return self.model.hidden(token[:, None], self.cache)[:, -1]
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.hidden = self.model.hidden(self.token[:, None], self.cache)[:, -1]
        self.token.copy_(token)
        self.graph.replay()
        return self.hidden


# ==== 19. LoRA ===================================================================================
#
# After this section you know how a large model is trained with a small part of the memory. Its
# weights stay as they are, so they need no gradients and no Adam, and a frozen copy shares them: of
# the reference of PPO only the adapters are there twice.

# How strongly an adapter acts; `peft` writes it as lora_alpha / r. UNKNOWN: arXiv 2106.09685 says
# that it acts like a learning rate, and gives none.
LORA_SCALE = 2


class LoRA(nn.Linear):
    """A linear layer with an adapter, arXiv 2106.09685: y = W x + scale B (A x).

    W (out, in) is never changed. A (r, in) and B (out, r) are trained. B begins with zeros, so that
    the layer is at first the one that it was.
    """

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator):
        nn.Module.__init__(self)  # W is there already
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = linear.weight
        self.bias = linear.bias
        self.lora_A = nn.Linear(self.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False)
        bound = self.in_features**-0.5
        nn.init.uniform_(self.lora_A.weight, -bound, bound, generator=generator)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return super().forward(x) + LORA_SCALE * self.lora_B(self.lora_A(x))


def add_adapters(model: Transformer, c: Config) -> Transformer:
    """Freeze a model and give each linear layer of its blocks an adapter of rank `lora`."""
    model.requires_grad_(False)
    generator = rng(c.seed, "lora")
    for module in list(model.layers.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, LoRA(child, c.lora, generator))
    return model


def adapters(model: Transformer) -> dict[str, LoRA]:
    """The layers that have an adapter, by their names; none in a model that is trained whole."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRA)}


def merged_weights(model: Transformer) -> dict[str, Tensor]:
    """The weights of the same model without adapters: W + scale B A in place of W, A and B."""
    weights = dict(model.state_dict())
    for name, layer in adapters(model).items():
        A = weights.pop(f"{name}.lora_A.weight")
        B = weights.pop(f"{name}.lora_B.weight")
        weights[f"{name}.weight"] = layer.weight.detach() + LORA_SCALE * B @ A
    return weights


def save_adapters(model: Transformer, folder: str | Path) -> None:
    """Write the adapters alone, adapter_config.json and adapter_model.safetensors, as peft does."""
    from data import folders

    weights = {}
    for name, layer in adapters(model).items():
        for part in ("lora_A", "lora_B"):
            weights[f"{name}.{part}.weight"] = getattr(layer, part).weight
    rank = next(iter(adapters(model).values())).lora_A.out_features
    folders.write_adapters(
        Path(folder), weights, rank, LORA_SCALE * rank, write_whole, model.source
    )


# ##################################################################################################
#
#   PART V: THE SMALLEST EXAMPLE
#
# ##################################################################################################


def main() -> None:
    """Train a base model on careless demonstrations, then let PPO reward right answers."""
    from data import arithmetic

    c = PPOConfig(max_ops=2, response=20, base_updates=300, updates=20)
    task = arithmetic.make(c)
    torch.set_num_threads(c.threads)

    print(f"The base model imitates {c.demos:,} careless demonstrations ...", flush=True)
    policy = gpt_base(task, c)
    problems = task.prompts(200, rng(c.seed, "dev"), split="dev")
    greedy = replace(c, temperature=0.0)
    before = respond(policy, task, problems, greedy)

    print("From here on it is only told whether its answer is right.", flush=True)
    state = start_ppo(policy, c)
    for metrics in ppo(state, task, c):
        if state.update % 5 == 0:
            print(f"update {state.update:3d}   right {metrics['truth']:.2f}", flush=True)
    after = respond(policy, task, problems, greedy)

    right_before = [task.grade(x, y) for x, y in zip(problems, before, strict=True)]
    right_after = [task.grade(x, y) for x, y in zip(problems, after, strict=True)]
    share_before = sum(right_before) / len(problems)
    share_after = sum(right_after) / len(problems)
    print(f"\ngreedy accuracy {share_before:.2f} -> {share_after:.2f}")
    for i, problem in enumerate(problems):
        if right_after[i] > right_before[i]:
            print(f"\nproblem   {problem}\nbefore    {before[i]}\nafter     {after[i]}")
            break


if __name__ == "__main__":
    main()
