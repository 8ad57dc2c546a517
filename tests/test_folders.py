"""Hugging Face folders in and out, against transformers itself: logits, greedy tokens, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

import nanoreward as nr
from tests.conftest import ROOT, TINY, rough

SMOLLM2 = ROOT / "runs" / "smollm2"  # python tests/make_smollm2.py runs/smollm2

SHAPE = dict(
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    vocab_size=99,
    initializer_range=0.15,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    tie_word_embeddings=False,
    max_position_embeddings=256,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "smollm2": LlamaConfig(
        **SHAPE
        | dict(tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=1e5))
    ),
    "llama3": LlamaConfig(**SHAPE | dict(rope_parameters=LLAMA3, eos_token_id=[2, 5])),
    "qwen2": Qwen2Config(**SHAPE | dict(tie_word_embeddings=True, rms_norm_eps=1e-6)),
    "qwen3": Qwen3Config(**SHAPE | dict(head_dim=16)),
}


def theirs(config, seed=0):
    """A random transformers model of this config: norms off 1, biases off 0, or nobody would notice them missing."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for p in model.parameters():
        if p.ndim == 1:
            p.data.add_(0.3 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module", params=list(FAMILIES))
def folder(request, tmp_path_factory):
    """A folder that transformers wrote, and its model."""
    path = tmp_path_factory.mktemp(request.param)
    model = theirs(FAMILIES[request.param])
    model.save_pretrained(path)
    return path, model


def questions(pad=0, n=4, P=40):
    """(n, P) ids with PAD in front; longer than the old length of llama3's rope."""
    ids = torch.randint(6, 99, (n, P), generator=nr.rng(0, "ids"))
    for i in range(n):
        ids[i, : 9 * i] = pad
    return ids


@torch.no_grad()
def logits_of(model, ids, pad=0):
    """transformers' logits with left padding."""
    real = (ids != pad).long()
    return model(ids, attention_mask=real, position_ids=(real.cumsum(1) - 1).clamp(min=0)).logits


def test_logits_equal_those_of_transformers(folder):
    path, model = folder
    ids = questions()
    ours = nr.Transformer.load(path)
    assert torch.allclose(ours(ids)[ids != 0], logits_of(model, ids)[ids != 0], atol=1e-4)
    assert all(
        p.dtype == torch.float32 and p.requires_grad and not p.is_meta for p in ours.parameters()
    )
    assert ours.config.eos == 2 and ours.config.mask == 99  # mask = vocab: there is none


def test_greedy_tokens_equal_those_of_generate(folder):
    path, model = folder
    ids, ours = questions(), nr.Transformer.load(path)
    config = nr.replace(ours.config, response=12, temperature=0.0)
    mine = nr.sample(ours, ids, config).response
    out = model.generate(
        ids,
        attention_mask=(ids != 0).long(),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=2,
        suppress_tokens=[0],
    )[:, 40:]  # PAD is never produced here
    for y, expected in zip(mine, out, strict=True):
        n = int((expected != 0).sum())
        assert y[:n].tolist() == expected[:n].tolist()
    assert mine.unique().numel() > 8


def test_what_is_saved_is_read_by_transformers_and_by_us(folder, tmp_path):
    path, model = folder
    nr.Transformer.load(path).save(tmp_path)
    ids = questions()
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(again) is type(model)
    assert torch.allclose(
        logits_of(again, ids)[ids != 0], logits_of(model, ids)[ids != 0], atol=1e-5
    )
    assert nr.Transformer.load(tmp_path).config == nr.Transformer.load(path).config


def test_the_old_spelling_of_rope_shards_and_bf16(tmp_path):
    theirs(FAMILIES["llama3"]).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    about = json.loads((tmp_path / "config.json").read_text())
    rope = about.pop("rope_parameters")
    about |= {
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": rope,
        "torch_dtype": about.pop("dtype"),
    }
    del about["rms_norm_eps"]  # then transformers' own default holds
    (tmp_path / "config.json").write_text(json.dumps(about))
    ids, ours = questions(), nr.Transformer.load(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.allclose(ours(ids)[ids != 0], logits_of(model, ids)[ids != 0], atol=1e-4)
    assert (
        ours.config.rope_scaling == "8 1 4 32"
        and ours.config.norm_eps == model.config.rms_norm_eps == 1e-6
    )


def test_tied_weights_are_one_and_stay_one(tmp_path):
    theirs(FAMILIES["smollm2"]).save_pretrained(tmp_path)
    ours = nr.Transformer.load(tmp_path)
    assert ours.lm_head.weight is ours.embed_tokens.weight
    assert len([n for n, _ in ours.named_parameters() if "embed" in n or "lm_head" in n]) == 1
    weights = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in weights
    save_file(
        weights | {"lm_head.weight": torch.zeros(99, 48)}, tmp_path / "model.safetensors"
    )  # some folders hold a copy
    assert torch.equal(nr.Transformer.load(tmp_path)(questions()), ours(questions()))


@pytest.mark.skipif(
    not SMOLLM2.exists(), reason="no SmolLM2: python tests/make_smollm2.py runs/smollm2 makes it"
)
def test_a_real_model_says_what_it_says_in_transformers():
    """Greedy tokens recorded with transformers 5.23.0, `generate` in float32 on the bfloat16 folder."""
    ours = nr.Transformer.load(SMOLLM2)
    prompt = torch.tensor([[504, 3575, 282, 4649, 314]])  # The capital of France is
    expected = [
        7042,
        30,
        198,
        198,
        504,
        2988,
        314,
        42,
        216,
        34,
        32,
        33,
        40,
        29,
        32,
        33,
        29,
        34,
        34,
        216,
    ]
    assert (
        nr.sample(ours, prompt, nr.replace(ours.config, response=20, temperature=0.0))
        .response[0]
        .tolist()
        == expected
    )
    theirs = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).eval()
    ids = torch.randint(20, 49_000, (2, 48), generator=nr.rng(0, "ids"))
    with torch.no_grad():
        assert torch.allclose(ours(ids), theirs(ids).logits, atol=1e-3)


def test_pad_is_an_id_that_no_text_has(tmp_path):
    model = theirs(LlamaConfig(**SHAPE | dict(pad_token_id=2)))
    model.save_pretrained(tmp_path)
    assert nr.Transformer.load(tmp_path).config.pad == 98  # the last one: there is no tokenizer
    words = [
        {"id": i, "special": special}
        for i, special in ((1, True), (2, True), (7, True), (9, False))
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": words}))
    assert (
        nr.Transformer.load(tmp_path).config.pad == 7
    )  # special, and neither the beginning nor the end


def test_log_probs_without_a_mask_token_forbid_pad_only():
    config = nr.replace(TINY, vocab=20, mask=20, pad=3)
    logp = nr.log_softmax(torch.zeros(20), 1.0, config)
    assert (
        logp[3] == -torch.inf
        and torch.allclose(logp.exp().sum(), torch.ones(()))
        and logp.isinf().sum() == 1
    )


def broken(kind, path):
    """Damage a good folder."""
    about = json.loads((path / "config.json").read_text())
    changes = {
        "gpt2": dict(model_type="gpt2"),
        "window": dict(use_sliding_window=True),
        "layers": dict(layer_types=["sliding_attention"] * 2),
        "quantized": dict(quantization_config={"quant_method": "fp8"}),
        "act": dict(hidden_act="gelu"),
        "bias": dict(attention_bias=True),
        "rope": dict(rope_parameters=dict(rope_type="yarn", factor=4.0, rope_theta=1e4)),
        "unheard": dict(logit_scale=0.5),
        "shape": dict(intermediate_size=96),
        "layer": dict(num_hidden_layers=3),
        "fewer": dict(num_hidden_layers=1),
    }
    weights = path / "model.safetensors"
    if kind in changes:
        (path / "config.json").write_text(json.dumps(about | changes[kind]))
    elif kind == "json":
        (path / "config.json").write_text('{"model_type": ')
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "shard":
        (path / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})
        )
    elif kind == "pickle":
        weights.rename(path / "pytorch_model.bin")


@pytest.mark.parametrize(
    "kind,word",
    [
        ("gpt2", "gpt2"),
        ("window", "use_sliding_window"),
        ("layers", "sliding_attention"),
        ("quantized", "quantization_config"),
        ("act", "gelu"),
        ("bias", "attention_bias"),
        ("rope", "yarn"),
        ("unheard", "logit_scale"),
        ("shape", "size mismatch"),
        ("layer", "Missing key"),
        ("fewer", "Unexpected key"),
        ("json", "JSONDecodeError"),
        ("truncated", "SafetensorError"),
        ("shard", "00001-of-00002"),
        ("pickle", "model.safetensors"),
    ],
)
def test_what_is_not_understood_is_one_line_before_memory_is_spent(
    kind, word, tmp_path, monkeypatch
):
    theirs(FAMILIES["llama"]).save_pretrained(tmp_path)
    broken(kind, tmp_path)
    read = []
    whole = torch.nn.Module.load_state_dict
    monkeypatch.setattr(
        torch.nn.Module,
        "load_state_dict",
        lambda self, x, **k: (
            read.extend(v for v in x.values() if not v.is_meta) or whole(self, x, **k)
        ),
    )
    with pytest.raises(nr.UserError) as error:
        nr.Transformer.load(tmp_path)
    assert (
        word in str(error.value)
        and str(tmp_path) in str(error.value)
        and "\n" not in str(error.value)
    )
    assert read == []


def test_a_replayed_step_with_fixed_shapes_is_the_step():
    """The cache of CUDA graphs: `used` is a tensor, all places are looked at, those not written yet are masked."""
    model = rough(TINY)
    ids = torch.randint(6, 30, (3, 9), generator=nr.rng(0, "x"))
    ids[1, :4] = TINY.pad
    expected = model.hidden(ids)
    cache = nr.Cache(TINY, 3, 20, model.lm_head.weight)
    first = model.hidden(ids[:, :6], cache)
    cache.used = torch.tensor([cache.used])
    rest = [model.hidden(ids[:, t : t + 1], cache) for t in range(6, 9)]
    assert torch.allclose(torch.cat([first, *rest], 1)[ids != 0], expected[ids != 0], atol=1e-5)
    assert int(cache.used) == 9


def test_recomputed_activations_give_the_same_gradients_and_bf16_nearly():
    ids, grads = questions(n=3, P=8) % 30, []
    for more in ({}, {"recompute": True}, {"bf16": True}):
        model = rough(nr.replace(TINY, **more))
        model(ids).logsumexp(-1).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(grads[0], grads[1])
    assert 1e-6 < (grads[2] - grads[0]).norm() / grads[0].norm() < 0.05
