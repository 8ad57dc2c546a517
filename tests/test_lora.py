"""LoRA: adapters against peft, what they train and what they leave, saved and gone on with."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import nanoreward as nr
from tests.conftest import rough, tiny
from tests.test_folders import FAMILIES, theirs

IDS = torch.randint(6, 99, (2, 30), generator=nr.rng(0, "ids"))


@pytest.fixture(scope="module", params=["smollm2", "qwen2", "qwen3"])
def folder(request, tmp_path_factory):
    """A folder that transformers wrote."""
    path = tmp_path_factory.mktemp(request.param)
    theirs(FAMILIES[request.param]).save_pretrained(path)
    return path


def adapted(folder, rank=4):
    """A model of this folder whose adapters all do something."""
    model = nr.gpt_base(None, nr.Config(model=str(folder), lora=rank, device="cpu"))
    for layer in nr.adapters(model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.3, generator=nr.rng(0, "adapters"))
    return model


@torch.no_grad()
def test_adapters_and_merged_weights_are_what_peft_and_transformers_read(folder, tmp_path):
    model = adapted(folder)
    ours = model(IDS)
    assert (ours - nr.Transformer.load(folder)(IDS)).abs().max() > 0.1

    nr.save_adapters(model, tmp_path / "adapters")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, tmp_path / "adapters").eval()
    trained = [name for name, _ in peft.named_parameters() if "lora_" in name]
    assert len(trained) == 2 * len(nr.adapters(model)) == 2 * 7 * model.config.layers
    assert (peft(IDS).logits - ours).abs().max() < 1e-4

    model.save(tmp_path / "merged")
    assert (nr.Transformer.load(tmp_path / "merged")(IDS) - ours).abs().max() < 1e-4
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert (merged(IDS).logits - ours).abs().max() < 1e-4
    assert "lora" not in " ".join(nr.merged_weights(model))


def start(rank=4, seed=0, **numbers):
    """A state of ppo whose small policy has adapters, and its config."""
    c = tiny("ppo", lora=rank, seed=seed, lr=1e-2, **numbers)
    policy = nr.add_adapters(rough(c), c)
    return nr.start_ppo(policy, c), c


def test_fresh_adapters_change_nothing_and_their_seed_decides_them():
    state, c = start()
    ids = torch.randint(4, 30, (2, 9), generator=nr.rng(0, "ids"))
    assert torch.equal(state.policy(ids), rough(c)(ids))
    again, other = start()[0].policy, start(seed=1)[0].policy
    [first, *_] = nr.adapters(state.policy)
    A = [nr.adapters(model)[first].lora_A.weight for model in (state.policy, again, other)]
    assert torch.equal(A[0], A[1])
    assert not torch.equal(A[0], A[2])


def test_an_update_changes_the_adapters_alone_and_the_reference_shares_the_rest(tmp_path):
    from data import arithmetic

    state, c = start(updates=2)
    before = {name: x.clone() for name, x in state.policy.state_dict().items()}
    list(nr.ppo(state, arithmetic.make(c), c))
    reference = dict(state.reference.named_parameters())
    changed = 0
    for name, p in state.policy.named_parameters():
        if "lora_" in name:
            changed += not torch.equal(p, before[name])
            assert torch.equal(reference[name], before[name])
        else:
            assert torch.equal(p, before[name])
            assert reference[name].data_ptr() == p.data_ptr()  # there is no second copy
    assert changed == 2 * len(nr.adapters(state.policy)) == 14
    trained = sum(p.numel() for o in state.optimizers for p in o.state)
    thin = sum(p.numel() for name, p in state.policy.named_parameters() if "lora_" in name)
    assert trained == thin + sum(p.numel() for p in state.head.parameters())


def test_a_run_with_adapters_goes_on_bit_for_bit(tmp_path):
    from data import arithmetic

    whole, c = start(updates=4)
    task = arithmetic.make(c)
    numbers = [m["loss"] for m in nr.ppo(whole, task, c)]

    half, _ = start(updates=4)
    loop = nr.ppo(half, task, c)
    seen = [next(loop)["loss"], next(loop)["loss"]]
    nr.save_state(tmp_path, half)
    resumed = nr.load_state(tmp_path, into=start(updates=4)[0])
    seen += [m["loss"] for m in nr.ppo(resumed, task, c)]
    assert seen == numbers
    assert len(set(numbers)) == 4
    for x, y in zip(whole.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert torch.equal(x, y)


def test_sampling_in_bfloat16_leaves_the_weights_that_models_share():
    c = tiny("ppo", lora=4, bf16=True)
    model = nr.add_adapters(rough(c), c)
    reader = nr.fast_reader(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(x.weight.dtype == torch.bfloat16 for x in nr.adapters(reader).values())
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
    # What stays in float32 is the same tensor, with a folder most of what there is.
    assert reader.embed_tokens.weight is model.embed_tokens.weight


def test_adapters_are_trained_by_adamw_with_a_rate_for_muon_too():
    c = tiny("ppo", lora=4)
    model = nr.add_adapters(rough(c), c)
    [adamw] = nr.optimizers([model], 1e-3, muon_lr=1e-2)
    assert isinstance(adamw, torch.optim.AdamW)
    assert len(adamw.param_groups[0]["params"]) == 2 * len(nr.adapters(model))
    muon, adamw = nr.optimizers([rough(c)], 1e-3, muon_lr=1e-2)
    assert isinstance(muon, nr.Muon)
    assert sum(len(group["params"]) for group in muon.param_groups) == 7 * c.layers
