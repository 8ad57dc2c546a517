"""Record golden numbers from trl 1.16.0 and torch.optim.Muon (torch 2.13.0, CPU).

    python -m venv envA
    envA/bin/pip install torch==2.13.0
    envA/bin/pip install transformers==5.23.0 trl==1.16.0 numpy
    envA/bin/python tests/golden/record_trl1.py      # writes trl1.json and torch.json beside itself

The trainers' own loss methods are called unbound, with a stub that has just the attributes they
read. Everything is float64 except Muon (float32 weights, bfloat16 Newton-Schulz inside).
"""

import math
from collections import defaultdict
from types import SimpleNamespace

import torch
from golden_io import make, numbers, ragged, write
from trl import DPOTrainer, GRPOTrainer, RewardTrainer
from trl.trainer.utils import selective_log_softmax

LENGTHS, R = [6, 4, 1, 5], 6
same = SimpleNamespace(
    device=torch.device("cpu"),
    num_processes=1,
    sync_gradients=True,
    gather=lambda x: x,
    gather_for_metrics=lambda x: x,
    reduce=lambda x, reduction: x,
)


def grpo_loss(logp, old, ref, adv, mask, loss_type):
    logp = logp.clone().requires_grad_()
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logp, torch.zeros_like(logp), None),
        model=SimpleNamespace(training=True),
        accelerator=same,
        _metrics={"train": defaultdict(list)},
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        loss_type=loss_type,
        importance_sampling_level="token",
        beta=0.04,
        epsilon_low=0.2,
        epsilon_high=0.2,
        max_completion_length=8,
        current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0,
        aux_loss_enabled=False,
        off_policy_mask_threshold=None,
        use_vllm=False,
        _entropy_bonus_enabled=False,
    )
    ids = torch.zeros(logp.shape, dtype=torch.long)
    batch = {
        "prompt_ids": ids[:, :2],
        "prompt_mask": torch.ones_like(ids[:, :2]),
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": adv,
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "num_items_in_batch": mask.sum(),
    }
    loss = GRPOTrainer._compute_loss(stub, None, batch)
    loss.backward()
    metrics = {k: v[0] for k, v in stub._metrics["train"].items()}
    return {
        "loss": loss,
        "grad_logp": logp.grad,
        "kl": metrics.get("kl"),
        "clip_fraction": metrics["clip_ratio/region_mean"],
    }


def grpo_records():
    logp = numbers(1, 4, R, scale=0.8, shift=-2)
    old = logp - numbers(2, 4, R, scale=0.3)
    old[0, 1] = logp[0, 1] - 1.5  # ratio 4.5 with a negative advantage: only the max counts it
    old, ref = old.round(decimals=3), (logp + numbers(3, 4, R, scale=0.4)).round(decimals=3)
    adv, mask = torch.tensor([-1.1, 0.7, 1.3, -0.4], dtype=torch.float64), ragged(LENGTHS, R)
    inputs = {
        "logp": logp,
        "old_logp": old,
        "ref_logp": ref,
        "advantages": adv,
        "mask": mask,
        "clip": 0.2,
        "beta": 0.04,
    }
    per_token = torch.max(
        -adv[:, None] * (logp - old).exp(), -adv[:, None] * (logp - old).exp().clamp(0.8, 1.2)
    )
    per_token = (per_token + 0.04 * ((ref - logp).exp() - (ref - logp) - 1)) * mask
    formula = per_token.sum() / mask.sum()  # checked below
    words = {
        "bnpo": "sum over tokens / number of counted tokens of this batch",
        "dapo": "sum over tokens / num_items_in_batch, here the counted tokens: equals bnpo",
    }
    call = "GRPOTrainer._compute_loss(stub, None, batch), loss_type={!r}, stub in record_trl1.py"
    out = []
    for kind, word in words.items():
        got = grpo_loss(logp, old, ref, adv, mask, kind)
        assert (got["loss"] - formula).abs() < 1e-12
        out.append(
            make(
                "trl",
                f"grpo_loss_{kind}",
                call.format(kind),
                inputs,
                got,
                [
                    word,
                    "KL is k3, inside the token loss; no 1/2 anywhere",
                    "one gradient accumulation step, so nothing else divides the loss",
                ],
            )
        )
    return out


def logits_records():
    logits, ids = numbers(4, 3, 5, 7, scale=1.5), torch.arange(15).view(3, 5) * 3 % 7
    note = ["no shift: logits[b, t] scores index[b, t]"]
    call = "trl.trainer.utils.selective_log_softmax(logits, index, temperature={})"
    return [
        make(
            "trl",
            f"selective_log_softmax_temperature_{t}",
            call.format(t),
            {"logits": logits, "index": ids, "temperature": t},
            {"logp": selective_log_softmax(logits, ids, temperature=t)},
            note,
        )
        for t in (1.0, 0.7)
    ]


def reward_records():
    chosen, rejected = (numbers(seed, 6, scale=1.5) for seed in (5, 6))
    scores = torch.cat([chosen, rejected])[:, None].requires_grad_()
    stub = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=same,
        _total_train_tokens=0,
        args=SimpleNamespace(center_rewards_coefficient=None),
        _metrics={"eval": defaultdict(list)},
    )
    loss = RewardTrainer.compute_loss(stub, lambda **k: SimpleNamespace(logits=scores), {})
    loss.backward()
    grad = scores.grad.view(2, 6)
    return [
        make(
            "trl",
            "bradley_terry",
            "RewardTrainer.compute_loss(stub, model, batch); the model is a stub that "
            "returns .logits = cat([chosen, rejected])[:, None]",
            {"chosen": chosen, "rejected": rejected},
            {
                "loss": loss,
                "grad_chosen": grad[0],
                "grad_rejected": grad[1],
                "accuracy": stub._metrics["eval"]["accuracy"][0],
            },
            ["mean over pairs of -log sigmoid(chosen - rejected - margin)"],
        )
    ]


def dpo_loss(logp, ref, mask, kinds, beta):
    """logp, ref, mask (2B, R): chosen rows first. The stub model hands out the log-probs."""
    zero = torch.zeros_like(logp)

    def model(log_probs):
        return lambda **k: SimpleNamespace(
            log_probs=log_probs * mask, entropy=zero, mean_logits=zero, is_top1=zero.bool()
        )

    stub = SimpleNamespace(
        model=SimpleNamespace(training=False),
        ref_model=model(ref),
        accelerator=same,
        beta=beta,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, gradient_checkpointing=False),
        loss_types=kinds,
        loss_weights=[1.0] * len(kinds),
        ld_alpha=None,
        use_weighting=False,
        precompute_ref_logps=False,
        aux_loss_enabled=False,
        label_smoothing=0.0,
        f_divergence_type="reverse_kl",
        _total_train_tokens=0,
        _metrics={"eval": defaultdict(list)},
    )
    stub.model.gradient_checkpointing_disable = lambda: None
    stub.model.is_gradient_checkpointing = False
    whole = torch.cat([torch.zeros_like(mask[:, :1]), mask], 1).long()  # one prompt token in front
    batch = {
        "input_ids": torch.ones_like(whole),
        "attention_mask": torch.ones_like(whole),
        "completion_mask": whole,
    }
    return DPOTrainer._compute_loss(stub, model(logp), batch, False)


def dpo_records():
    logp = numbers(8, 8, R, scale=0.7, shift=-2)
    ref = (logp + numbers(9, 8, R, scale=0.5)).round(decimals=3)
    out = []
    for name, lengths in (
        ("equal_chosen_lengths", [4, 4, 4, 4, 6, 2, 5, 3]),
        ("ragged", [6, 4, 1, 5, 3, 6, 2, 4]),
    ):
        mask = ragged(lengths, R)
        both = dpo_loss(logp, ref, mask, ["sigmoid", "sft"], 0.1)
        sigmoid, sft = (dpo_loss(logp, ref, mask, [kind], 0.1) for kind in ("sigmoid", "sft"))
        nll = -(logp * mask)[:4]
        per_sequence, batch_mean = (nll.sum(1) / mask[:4].sum(1)).mean(), nll.sum() / mask[:4].sum()
        assert (sft - batch_mean).abs() < 1e-12 and (both - sigmoid - sft).abs() < 1e-12
        gap = (per_sequence - sft).abs().item()
        out.append(
            make(
                "trl",
                f"dpo_sigmoid_sft_{name}",
                "DPOTrainer._compute_loss(stub, model, batch, False), loss_types ['sigmoid', "
                "'sft'], weights 1 and 1, stub in record_trl1.py",
                {"logp": logp, "ref_logp": ref, "mask": mask, "beta": 0.1},
                {"loss": both, "sigmoid": sigmoid, "sft": sft},
                [
                    "rows 0-3 are chosen, 4-7 their rejected; token log-probs, already shifted",
                    "sft = -sum / count over ALL chosen tokens of the batch, not a mean of means; "
                    "the per-sequence mean of the IRPO paper, equation (9), differs here by "
                    f"{gap:.6g}",
                ],
            )
        )
    return out


def muon_fp32(weight, grads, kind, lr=0.02, momentum=0.95, nesterov=True, steps=5):
    """Muon again, all in float32, to measure what bfloat16 costs."""
    weight, buffer = weight.clone(), torch.zeros_like(weight)
    rows, columns = weight.shape
    scale = {
        "original": math.sqrt(max(1, rows / columns)),
        "match_rms_adamw": 0.2 * math.sqrt(max(rows, columns)),
    }[kind]
    for grad in grads:
        buffer = momentum * buffer + (1 - momentum) * grad
        x = momentum * buffer + (1 - momentum) * grad if nesterov else buffer
        x = x.T if rows > columns else x
        x = x / x.norm().clamp(min=1e-7)
        for _ in range(steps):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        weight -= lr * scale * (x.T if rows > columns else x)
    return weight


def muon_torch(weight, grads, kind):
    weight = torch.nn.Parameter(weight.clone())
    muon = torch.optim.Muon(
        [weight], lr=0.02, momentum=0.95, nesterov=True, weight_decay=0.0, adjust_lr_fn=kind
    )
    for grad in grads:
        weight.grad = grad.clone()
        muon.step()
    return weight.detach()


def short(x, form):
    """Nested lists of a float32 tensor in few digits; the inputs stay exactly the same float32."""
    return [short(row, form) for row in x] if x.dim() else float(form.format(x.item()))


def muon_records():
    wrong = {
        "right": {},
        "no nesterov": {"nesterov": False},
        "4 iterations": {"steps": 4},
        "lr 5 % too high": {"lr": 0.021},
    }
    out = []
    for rows, columns in ((8, 24), (24, 8)):
        start = numbers(10, rows, columns, scale=0.1).float()
        grads = numbers(11 + rows, 5, rows, columns, digits=2).float()
        output, gaps = {}, {}
        for kind in ("original", "match_rms_adamw"):
            weight = muon_torch(start, grads, kind)
            output[f"weight_{kind}"] = short(weight, "{:.7g}")
            for what, changed in wrong.items():
                difference = weight - muon_fp32(start, grads, kind, **changed)
                gaps[f"{kind}, {what}"] = [
                    round(difference.abs().max().item(), 6),
                    round((difference.norm() / (weight - start).norm()).item(), 5),
                ]
        out.append(
            make(
                "torch",
                f"muon_{rows}x{columns}",
                "torch.optim.Muon([weight], lr=0.02, momentum=0.95, nesterov=True, "
                "weight_decay=0.0, adjust_lr_fn=original | match_rms_adamw); "
                "5 steps with the given gradients",
                {"start": short(start, "{:.3f}"), "grads": short(grads, "{:.2f}")},
                output | {"gap_to_fp32": gaps},
                [
                    "gap_to_fp32: [max |difference|, |difference| / |total movement|] between "
                    "torch's result and a float32 re-implementation, the right one and wrong ones "
                    "on purpose",
                    "Newton-Schulz runs in bfloat16: the last digits may differ on another CPU",
                    "the momentum buffer is an average, buffer.lerp_(grad, 0.05); torch's "
                    "docstring says mu * buffer + grad: the same direction, so the same update "
                    "after Newton-Schulz",
                ],
            )
        )
    return out


if __name__ == "__main__":
    write("trl1.json", grpo_records() + logits_records() + reward_records() + dpo_records())
    write("torch.json", muon_records())
