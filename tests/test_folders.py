"""Folders of Hugging Face, compared with transformers: logits, greedy tokens, what is refused."""

import json
import shutil
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

import nanoreward as nr
from data import folders
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
    """A random transformers model of this config.

    Its norms are off 1 and its biases off 0, because nobody would notice if they were missing.
    """
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


def change(path, file="config.json", **keys):
    """Change keys of a JSON file. None is null, and ... removes a key."""
    about = json.loads((path / file).read_text()) if (path / file).exists() else {}
    about = {key: value for key, value in (about | keys).items() if value is not ...}
    (path / file).write_text(json.dumps(about))


def write_weights(path, weights):
    """Write model.safetensors as transformers does."""
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def refusal(path):
    """The line that refuses a folder, without its beginning."""
    with pytest.raises(nr.UserError) as error:
        nr.Transformer.load(path)
    begin = f"{path} is no model folder to read: "
    assert str(error.value).startswith(begin) and "\n" not in str(error.value)
    return str(error.value).removeprefix(begin)


@torch.no_grad()
def difference(path):
    """How far our logits of a folder are from those of transformers."""
    ids = torch.randint(6, 99, (2, 50), generator=nr.rng(0, "ids"))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return (nr.Transformer.load(path)(ids) - model(ids).logits).abs().max()


def questions(pad=0, n=4, P=40):
    """(n, P) ids with PAD in front; longer than the old length of llama3's rope."""
    ids = torch.randint(6, 99, (n, P), generator=nr.rng(0, "ids"))
    for i in range(n):
        ids[i, : 9 * i] = pad
    return ids


def greedy(model, response):
    """The config with which this model writes its likeliest tokens, `response` of them at most."""
    return nr.Config(**vars(model.config), response=response, temperature=0.0)


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
    # There is no MASK token, and the id says so: it is that of the vocabulary's end.
    assert ours.config.eos_id == 2 and ours.config.mask_id == 99


def test_greedy_tokens_equal_those_of_generate(folder):
    path, model = folder
    ids, ours = questions(), nr.Transformer.load(path)
    mine = nr.sample(ours, ids, greedy(ours, 12)).response
    out = model.generate(
        ids,
        attention_mask=(ids != 0).long(),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=ours.config.ends,
        suppress_tokens=[0, 1],
    )[:, 40:]  # PAD and BOS are never produced here
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
    expected = ours(questions())
    # Some folders hold a copy of the output matrix, and some hold nothing but it.
    embedding = weights["model.embed_tokens.weight"]
    with_copy = weights | {"lm_head.weight": embedding.clone()}
    write_weights(tmp_path, with_copy)
    again = nr.Transformer.load(tmp_path)
    assert torch.equal(again(questions()), expected) and again.config.tied
    del with_copy["model.embed_tokens.weight"]
    write_weights(tmp_path, with_copy)
    again = nr.Transformer.load(tmp_path)
    assert torch.equal(again(questions()), expected)
    assert again.lm_head.weight is again.embed_tokens.weight
    del with_copy["lm_head.weight"]
    write_weights(tmp_path, with_copy)
    assert "lm_head.weight" in refusal(tmp_path)


def test_two_matrices_that_differ_are_not_tied_whatever_the_folder_says(tmp_path):
    """So does transformers 5.23, with a warning."""
    theirs(FAMILIES["smollm2"]).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    other = torch.randn(99, 48, generator=nr.rng(0, "other"))
    write_weights(tmp_path, weights | {"lm_head.weight": other})
    ours = nr.Transformer.load(tmp_path)
    assert not ours.config.tied and difference(tmp_path) < 1e-4
    ours.save(tmp_path / "again")
    assert nr.Transformer.load(tmp_path / "again").config == ours.config
    assert difference(tmp_path / "again") < 1e-4


@pytest.mark.skipif(
    not SMOLLM2.exists(), reason="no SmolLM2: python tests/make_smollm2.py runs/smollm2 makes it"
)
def test_a_real_model_says_what_it_says_in_transformers():
    """Greedy tokens as `generate` of transformers 5.23.0 wrote them, in float32.

    The folder holds bfloat16.
    """
    ours = nr.Transformer.load(SMOLLM2)
    prompt = torch.tensor([[504, 3575, 282, 4649, 314]])  # The capital of France is
    expected = [7042, 30, 198, 198, 504, 2988, 314, 42, 216, 34]
    expected += [32, 33, 40, 29, 32, 33, 29, 34, 34, 216]
    written = nr.sample(ours, prompt, greedy(ours, 20)).response
    assert written[0].tolist() == expected
    theirs = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).eval()
    ids = torch.randint(20, 49_000, (2, 48), generator=nr.rng(0, "ids"))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["smollm2", "qwen2"])
def test_a_model_that_computes_in_bfloat16_is_written_as_it_reads_itself(family, tmp_path):
    theirs(FAMILIES[family]).to(torch.bfloat16).save_pretrained(tmp_path / "before")
    model = nr.Transformer.load(tmp_path / "before")
    model.config = nr.replace(model.config, bf16=True)
    ids = torch.randint(6, 99, (2, 9), generator=nr.rng(0, "ids"))
    with torch.no_grad():
        before = model(ids)
        for name, p in model.named_parameters():
            if "_proj" in name:
                p.mul_(1 + 2**-10)  # a quarter of what bfloat16 can tell apart
        assert torch.equal(model(ids), before)
        model.save(tmp_path / "after")
        after = nr.Transformer.load(tmp_path / "after")
        for name, p in nr.Transformer.load(tmp_path / "before").named_parameters():
            assert torch.equal(after.state_dict()[name], p), name
        # In float32 they are written as they are.
        model.config = nr.replace(model.config, bf16=False)
        model.save(tmp_path / "exact")
        exact = nr.Transformer.load(tmp_path / "exact")
        assert torch.equal(exact(ids), model(ids)) and not torch.equal(exact(ids), after(ids))


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
    elif kind == "names":
        tensors = load_file(weights)
        tensors["model.layers.1.mlp.other.weight"] = tensors.pop(
            "model.layers.1.mlp.up_proj.weight"
        )
        save_file(tensors, weights)
    elif kind == "shard":
        weights.unlink()
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
        ("layer", "num_hidden_layers is 3, but the weights are those of 2 layers"),
        ("fewer", "num_hidden_layers is 1, but the weights are those of 2 layers"),
        ("names", "Missing key"),
        ("json", "config.json is no JSON"),
        ("truncated", "model.safetensors is damaged"),
        ("shard", "00001-of-00002"),
        ("pickle", "only pytorch_model.bin"),
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


def test_the_table_of_keys_names_fields_of_the_architecture():
    """What is left out of the table is more than a name, or no part of a folder."""
    ours = {f.name for f in fields(nr.Architecture)}
    assert ours - set(folders.KEYS) == {"family", "rope_scaling", "other_ends", "bf16"}
    assert set(folders.KEYS) <= ours


def test_keys_that_repeat_the_family_have_to_agree_with_it(tmp_path):
    theirs(FAMILIES["qwen2"]).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    about = json.loads(path.read_text())
    expected = nr.Transformer.load(tmp_path)(questions())
    path.write_text(json.dumps(about | {"qkv_bias": True, "qk_norm": False}))
    assert torch.equal(nr.Transformer.load(tmp_path)(questions()), expected)
    path.write_text(json.dumps(about | {"qk_norm": True}))
    with pytest.raises(nr.UserError, match="qk_norm"):
        nr.Transformer.load(tmp_path)


# ---- What config.json says ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A folder of each family, as transformers wrote it."""
    path = tmp_path_factory.mktemp("originals")
    for name, config in FAMILIES.items():
        theirs(config).save_pretrained(path / name)
    return path


@pytest.fixture
def copy_of(originals, tmp_path):
    """A function that copies one of these folders, to be changed."""

    def copy(name="llama"):
        return Path(shutil.copytree(originals / name, tmp_path / name))

    return copy


HARMLESS = dict(
    # What folders on the hub carry, of Llama, Qwen, SmolLM2, unsloth and the trainers.
    _attn_implementation="sdpa",
    _name_or_path="meta-llama/Llama-3.2-1B",
    architectures=["LlamaForCausalLM"],
    attention_bias=False,
    attention_dropout=0.1,
    attn_implementation="flash_attention_2",
    attn_logit_softcapping=None,
    auto_map={},
    bos_token="<s>",
    chunk_size_feed_forward=0,
    do_sample=True,
    finetuning_task="",
    gradient_checkpointing=False,
    hidden_dropout_prob=0.1,
    id2label={"0": "LABEL_0"},
    is_llama_config=True,
    label2id={"LABEL_0": 0},
    logit_scale=1.0,
    max_sequence_length=2048,
    max_window_layers=0,
    mlp_bias=False,
    model_max_length=4096,
    num_beams=4,
    pad_token="</s>",
    partial_rotary_factor=1.0,
    pretraining_tp=2,
    problem_type="regression",
    quantization_config=None,
    repetition_penalty=1.1,
    residual_multiplier=1,
    rope_interleaved=False,
    sliding_window=4,
    task_specific_params={"chat": {}},
    temperature=0.6,
    tokenizer_class="LlamaTokenizer",
    top_p=0.9,
    torch_dtype="bfloat16",
    transformers_version="4.40.0",
    unk_token_id=3,
    unsloth_fixed=True,
    unsloth_version="2025.1",
    use_cache=False,
    use_flash_attention_2=True,
    use_mrope=False,
    use_sliding_window=False,
) | {"transformers.js_config": {"dtype": "q4"}}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_keys_that_change_no_logit_are_accepted_by_rule(copy_of, family):
    path = copy_of(family)
    expected = nr.Transformer.load(path)(questions())
    change(path, **HARMLESS, layer_types=["full_attention"] * 2)
    assert torch.equal(nr.Transformer.load(path)(questions()), expected)
    assert difference(path) < 1e-4


@pytest.mark.parametrize(
    "key,value",
    [
        ("attention_multiplier", 0.5),
        ("attn_output_gate", True),
        ("attn_temperature_tuning", 4),
        ("auto_map", {"AutoModelForCausalLM": "model.Net"}),
        ("embedding_multiplier", True),
        ("final_logit_softcapping", 30.0),
        ("first_layer", 0),
        ("max_attention_scale", 0.5),
        ("logit_scale", 0),
        ("mlp_bias", True),
        ("num_experts", 8),
        ("partial_rotary_factor", 0.5),
        ("per_layer_config", {"0": {"hidden_act": "gelu"}}),
        ("position_embedding_type", "alibi"),
        ("residual_multiplier", 0.22),
        ("softmax_off_by_one", True),
        ("softmax_scale", 0.3),
        ("transformers_weights", "other.safetensors"),
        ("use_mrope", True),
        ("use_token_shift", True),
    ],
)
def test_keys_that_could_change_the_logits_are_refused_by_name(copy_of, key, value):
    path = copy_of()
    change(path, **{key: value})
    assert f"not understood: {key} = {value!r}" in refusal(path)


def test_qwen2_has_its_biases_whatever_attention_bias_says(copy_of):
    path = copy_of("qwen2")
    change(path, attention_bias=True)
    assert difference(path) < 1e-4


def test_what_transformers_assumes_where_config_json_says_nothing(copy_of, tmp_path):
    path = copy_of("qwen3")
    change(path, rope_parameters=..., rms_norm_eps=..., tie_word_embeddings=..., hidden_act=...)
    assert difference(path) < 1e-4
    # Only qwen3 has a width of heads of its own.
    wide = tmp_path / "wide"
    theirs(Qwen3Config(**SHAPE | dict(head_dim=128))).save_pretrained(wide)
    change(wide, head_dim=...)
    assert difference(wide) < 1e-4
    path = copy_of("llama")
    change(path, head_dim=...)
    assert difference(path) < 1e-4


SCALING = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}


@pytest.mark.parametrize(
    "keys",
    [
        dict(rope_scaling={"type": "default"}, rope_theta=500),
        dict(rope_scaling=SCALING, rope_theta=500.0),
        dict(rope_scaling=SCALING | {"type": "llama3", "rope_theta": 700.0}, rope_theta=500.0),
        dict(rope_scaling=SCALING | {"type": "linear"}),
        dict(rope_scaling=SCALING, rope_parameters={"rope_type": "default", "rope_theta": 700.0}),
        dict(rope_scaling={"type": "default"}, rope_parameters=LLAMA3 | {"rope_theta": 700.0}),
        dict(rope_scaling={}, rope_parameters=LLAMA3 | {"rope_theta": 700.0}, rope_theta=500.0),
        dict(rope_scaling=SCALING | {"original_max_position_embeddings": 1_234_567}),
        dict(rope_scaling=SCALING | {"factor": 1.2345678}),
        dict(rope_scaling={k: v for k, v in SCALING.items() if "original" not in k}),
        dict(rope_scaling=SCALING, original_max_position_embeddings=64),
        dict(rope_scaling={"rope_type": "default", "factor": 1.0, "partial_rotary_factor": 1.0}),
    ],
)
def test_of_several_rotary_settings_the_one_of_transformers_wins(copy_of, keys):
    path = copy_of()
    change(path, **{"rope_parameters": ..., "rope_theta": ...} | keys)
    assert difference(path) < 1e-4


def test_the_numbers_of_llama3_are_kept_to_the_last_digit(copy_of):
    path = copy_of()
    length = "original_max_position_embeddings"
    change(path, rope_parameters=LLAMA3 | {"factor": 1.2345678, length: 1_234_567})
    ours = nr.Transformer.load(path)
    assert ours.config.rope_scaling == "1.2345678 1 4 1234567"
    nr.Transformer(ours.config).save(path)
    assert nr.Transformer.load(path).config.rope_scaling == ours.config.rope_scaling


@pytest.mark.parametrize(
    "keys,word",
    [
        (dict(vocab_size=...), "config.json lacks vocab_size"),
        (dict(hidden_size=..., intermediate_size=None), "lacks hidden_size, intermediate_size"),
        (dict(model_type=...), "model_type is None"),
        (dict(model_type=["llama"]), "model_type is ['llama']"),
        (dict(vocab_size=99.0), "vocab_size is 99.0"),
        (dict(hidden_size="48"), "hidden_size is '48'"),
        (dict(num_hidden_layers=True), "num_hidden_layers is True"),
        (dict(num_hidden_layers=0), "num_hidden_layers is 0"),
        (dict(num_attention_heads=-6), "num_attention_heads is -6"),
        (dict(num_key_value_heads=4), "no multiple of num_key_value_heads 4"),
        (dict(num_attention_heads=5, num_key_value_heads=5, head_dim=...), "hidden_size 48 is no"),
        (dict(head_dim=7), "head_dim is 7"),
        (dict(rope_parameters={"rope_theta": "1e4"}), "rope_theta is '1e4'"),
        (dict(rope_parameters={"rope_theta": True}), "rope_theta is True"),
        (dict(rope_parameters={"rope_theta": 0}), "rope_theta is 0"),
        (dict(rope_parameters={"rope_theta": float("inf")}), "rope_theta is inf"),
        (dict(rope_parameters={"rope_theta": 10**400}), "rope_theta is 1000"),
        (dict(rope_parameters="llama3"), "'llama3', and not a JSON object"),
        (dict(rope_parameters={"rope_type": "linear", "factor": 1.0}), "rope_type is 'linear'"),
        (dict(rope_parameters={"rope_type": "default", "factor": 8.0}), "factor = 8.0"),
        (dict(rope_parameters=LLAMA3 | {"factor": float("nan")}), "factor is nan"),
        (dict(rope_parameters=LLAMA3 | {"factor": None}), "factor is None"),
        (dict(rope_parameters=LLAMA3 | {"low_freq_factor": 4.0}), "low_freq_factor 4.0 is not"),
        (dict(rms_norm_eps=float("nan")), "rms_norm_eps is nan"),
        (dict(rms_norm_eps=2), "rms_norm_eps is 2"),
        (dict(rms_norm_eps="1e-6"), "rms_norm_eps is '1e-6'"),
        (dict(tie_word_embeddings=1), "tie_word_embeddings is 1"),
        (dict(is_causal="no"), "is_causal is 'no'"),
        (dict(pad_token_id=99), "pad_token_id is 99"),
        (dict(pad_token_id="0"), "pad_token_id is '0'"),
        (dict(pad_token_id=-2), "pad_token_id is -2"),
        (dict(bos_token_id=99), "bos_token_id is 99"),
        (dict(bos_token_id=-1), "bos_token_id is -1"),
        (dict(eos_token_id=99), "eos_token_id is 99"),
        (dict(eos_token_id=[2, 99]), "eos_token_id is 99"),
        (dict(eos_token_id=[[2]]), "eos_token_id is [2]"),
        (dict(eos_token_id="2"), "eos_token_id is '2'"),
        (dict(mask_token_id=100), "mask_token_id is 100"),
        (dict(mask_token_id=2), "mask_token_id is 2, which begins or ends a text"),
    ],
)
def test_a_value_of_another_kind_or_size_is_one_line_that_names_its_key(copy_of, keys, word):
    path = copy_of()
    change(path, **keys)
    assert word in refusal(path)


@pytest.mark.parametrize(
    "keys",
    [
        dict(num_hidden_layers=10**19),
        dict(num_hidden_layers=10**9),
        dict(hidden_size=10**12),
        dict(hidden_size=2**31 - 1),
        dict(vocab_size=2**31 - 1),
        dict(intermediate_size=2**31 - 1),
        dict(head_dim=2**31 - 2),
        dict(num_attention_heads=2**31 - 2, head_dim=2**31 - 2),
    ],
)
def test_enormous_sizes_are_refused_at_once(copy_of, keys):
    path = copy_of()
    change(path, **keys)
    began = time.time()
    refusal(path)
    assert time.time() - began < 1


@pytest.mark.parametrize(
    "content,word",
    [
        (None, "config.json is missing"),
        (b"[1]", "holds no JSON object"),
        (b"[" * 100_000, "is no JSON"),
        (b'{"model_type": "\xe9"}', "no text in UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    ],
)
def test_a_file_that_is_no_config_is_one_line(copy_of, content, word):
    path = copy_of()
    (path / "config.json").unlink()
    if content is not None:
        (path / "config.json").write_bytes(content)
    assert word in refusal(path)


# ---- Special tokens -------------------------------------------------------------------------------

SPECIAL = ["<s>", "</s>", "<|pad|>", "<|end|>"]


def write_tokenizer(path, special=SPECIAL, ordinary=(), **about):
    """Write a tokenizer of bytes, whose first ids are those of the special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    words = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens(list(special))
    words.add_tokens(list(ordinary))
    words.save(str(path / "tokenizer.json"))
    if about:
        change(path, "tokenizer_config.json", **about)
    return words


@pytest.fixture
def spoken(tmp_path):
    """A folder with 300 ids, of which the tokenizer has 260. It names no special token."""
    shape = nr.Architecture(
        vocab=300, width=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp_width=24, mask_id=300
    )
    nr.Transformer(shape, nr.rng(0, "spoken")).save(tmp_path)
    change(tmp_path, **{f"{name}_token_id": ... for name in ("pad", "bos", "eos", "mask")})
    write_tokenizer(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "config,generation,expected",
    [
        (3, None, [3]),
        ([3, 1], None, [3, 1]),
        ([3, 3, 1], None, [3, 1]),
        (3, [1, 3], [3, 1]),
        (None, 1, [1]),
        ([], [1, 2], [1, 2]),
        ([1], 3, [1, 3]),
        (..., ..., [1]),
        (None, None, [1]),
        ([], [], [1]),
    ],
)
def test_all_ends_are_known_the_first_of_config_json_first(spoken, config, generation, expected):
    write_tokenizer(spoken, eos_token={"content": "</s>"})
    change(spoken, eos_token_id=config)
    change(spoken, "generation_config.json", eos_token_id=generation)
    c = nr.Transformer.load(spoken).config
    assert c.ends == expected and c.bos_id == expected[0]
    # An end is what the tokenizer ends with, only if nobody names an id.
    write_tokenizer(spoken, eos_token="</s>")
    assert nr.Transformer.load(spoken).config.ends == expected


def test_a_folder_that_names_no_end_at_all_is_one_line(spoken):
    assert "names no eos_token_id" in refusal(spoken)
    change(spoken, "tokenizer_config.json", eos_token="<|nowhere|>")
    assert "does not know the eos_token '<|nowhere|>'" in refusal(spoken)
    change(spoken, "tokenizer_config.json", eos_token="</s>")
    (spoken / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in refusal(spoken)
    change(spoken, "generation_config.json", eos_token_id=300)
    assert "eos_token_id is 300" in refusal(spoken)


def test_pad_is_an_id_that_no_text_no_prompt_and_no_end_uses(spoken):
    words = write_tokenizer(spoken, ordinary=["<think>"])
    change(spoken, bos_token_id=0, eos_token_id=[1, 3])

    def pad(value=2, **keys):
        change(spoken, pad_token_id=value, **keys)
        return nr.Transformer.load(spoken).config.pad_id

    # It is special, or no token at all.
    assert pad(2) == 2 and pad(299) == 299
    # BOS, two ends, letters (Ċ is a new line), a token that is not special, and no PAD.
    behind = 301
    letters = [words.token_to_id(token) for token in ("!", "Ċ", "<think>")]
    for value in (0, 1, 3, *letters, -1, None):
        assert pad(value) == behind
    # MASK lies inside.
    assert pad(2, mask_token_id=2) == pad(None) == 300
    # A letter stays one if it is called special too.
    write_tokenizer(spoken, special=[*SPECIAL, "!"])
    assert pad(words.token_to_id("!"), mask_token_id=...) == behind
    # A chat may hold special tokens.
    write_tokenizer(spoken)
    change(spoken, "tokenizer_config.json", chat_template="{{ '<|end|>' }}")
    assert pad(2) == 2
    change(spoken, "tokenizer_config.json", chat_template="{{ '<|pad|>' }}")
    assert pad(2) == behind
    templates = [{"name": "default", "template": "{{ '<|pad|>' }}"}]
    change(spoken, "tokenizer_config.json", chat_template=templates)
    assert pad(2) == behind
    (spoken / "tokenizer_config.json").unlink()
    (spoken / "chat_template.jinja").write_text("{{ '<|pad|>' }}")
    assert pad(2) == behind
    # Without a tokenizer the folder is believed.
    (spoken / "tokenizer.json").unlink()
    assert pad(words.token_to_id("!")) == words.token_to_id("!")


def test_what_stands_for_unknown_words_is_no_pad(spoken):
    letters = {letter: i for i, letter in enumerate("<unk> a", 2)}
    vocab = {"<unk>": 0, "</s>": 1} | letters
    words = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    words.add_special_tokens(["<unk>", "</s>"])
    words.save(str(spoken / "tokenizer.json"))
    change(spoken, eos_token_id=1, pad_token_id=0)
    assert nr.Transformer.load(spoken).config.pad_id == 301


def test_every_id_of_a_text_is_attended_to_as_in_transformers(copy_of):
    """Llama 3 and Qwen folders have been given the PAD 0, which is `!`."""
    path = copy_of()
    write_tokenizer(path)
    ids = torch.tensor([[6, 9, 5, 7, 9, 8, 9]])
    for pad in (9, 2, 1, -1):
        change(path, pad_token_id=pad)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with torch.no_grad():
            expected = model(ids, attention_mask=torch.ones_like(ids)).logits
        assert torch.allclose(nr.Transformer.load(path)(ids), expected, atol=1e-4)


# ---- Tokenizers -----------------------------------------------------------------------------------


def test_a_tokenizer_gives_back_whole_texts_whatever_it_was_used_for_before(tmp_path):
    words = write_tokenizer(tmp_path)
    text = "Ann has 3 eggs. </s> is no end, and é is a letter. " * 9
    words.enable_truncation(16)
    words.enable_padding(length=4000, pad_id=2, pad_token="<|pad|>")
    words.save(str(tmp_path / "tokenizer.json"))
    read = folders.read_tokenizer(tmp_path / "tokenizer.json", 260)
    ids = read.encode(text, add_special_tokens=False).ids
    assert read.decode(ids) == text and min(ids) >= len(SPECIAL)


def test_a_tokenizer_needs_a_vocabulary_that_holds_its_ordinary_tokens(tmp_path):
    path = tmp_path / "tokenizer.json"
    write_tokenizer(tmp_path, special=[*SPECIAL, "<|late|>"])
    # There are 260 tokens, and the special one behind them is written by no text.
    assert folders.read_tokenizer(path, 260).token_to_id("<|late|>") == 260
    with pytest.raises(
        ValueError, match="the id 259, but the vocabulary of the model has only 259"
    ):
        folders.read_tokenizer(path, 259)
    write_tokenizer(tmp_path, ordinary=[AddedToken("<think>", normalized=False)])
    with pytest.raises(ValueError, match="'<think>' with the id 260"):
        folders.read_tokenizer(path, 260)
    folders.read_tokenizer(path, 261)
    folders.read_tokenizer(path)


@pytest.mark.parametrize(
    "content,word",
    [
        (None, "is missing"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b'{"model": {"type": "BPEv2"}}', "of another version of tokenizers"),
        (b"{", "is damaged or of another version"),
        (b"", "is damaged or of another version"),
        (b"\xff\xfe", "no text in UTF-8"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_one_line(spoken, content, word):
    path = spoken / "tokenizer.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=word) as error:
        folders.read_tokenizer(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    if content is not None:
        change(spoken, eos_token_id=1, pad_token_id=2)
        assert word in refusal(spoken)


# ---- Weights --------------------------------------------------------------------------------------


def test_one_file_of_weights_wins_over_an_old_index(copy_of):
    path = copy_of()
    weights = load_file(path / "model.safetensors")
    old = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    save_file(old, path / "old.safetensors", metadata={"format": "pt"})
    places = dict.fromkeys(old, "old.safetensors")
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places})
    )
    assert difference(path) < 1e-4
    (path / "old.safetensors").unlink()
    assert difference(path) < 1e-4


@pytest.mark.parametrize("outside", ["../w.safetensors", "/nowhere/w.safetensors", "..", 3, ["w"]])
def test_an_index_names_files_of_its_folder_only(copy_of, outside):
    path = copy_of()
    (path / "model.safetensors").rename(path.parent / "w.safetensors")
    change(path, "model.safetensors.index.json", weight_map={"lm_head.weight": outside})
    assert "names" in refusal(path) and "no weight file of its folder" in refusal(path)


@pytest.mark.parametrize("places", [None, {}, [], "w"])
def test_an_index_without_places_is_one_line(copy_of, places):
    path = copy_of()
    (path / "model.safetensors").unlink()
    change(path, "model.safetensors.index.json", weight_map=places)
    assert "has no weight_map" in refusal(path)


def test_other_files_in_place_of_weights_are_one_line(copy_of):
    path = copy_of()
    weights = path / "model.safetensors"
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "Git LFS" in refusal(path) and "git lfs pull" in refusal(path)
    weights.write_bytes(b"")
    assert "model.safetensors is damaged" in refusal(path)
    weights.unlink()
    assert "model.safetensors is missing" in refusal(path)
    (path / "adapter_config.json").write_text("{}")
    assert "LoRA" in refusal(path)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_named(copy_of, number):
    path = copy_of()
    weights = load_file(path / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = number
    write_weights(path, weights)
    assert refusal(path) == "the weight layers.1.mlp.up_proj.weight holds NaN or infinity"
    weights["model.layers.1.mlp.up_proj.weight"] = torch.ones(80, 48, dtype=torch.int8)
    write_weights(path, weights)
    assert "layers.1.mlp.up_proj.weight holds torch.int8" in refusal(path)


def test_rotary_frequencies_in_the_file_are_ignored_and_a_second_name_is_refused(copy_of):
    path = copy_of()
    weights = load_file(path / "model.safetensors")
    write_weights(path, weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert difference(path) < 1e-4
    # A base model has no prefix, and so nobody knows which one is meant here.
    write_weights(path, weights | {"norm.weight": torch.ones(48)})
    assert "the weights hold norm.weight twice" in refusal(path)
    bare = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    write_weights(path, bare)
    assert difference(path) < 1e-4


# ---- Saving ---------------------------------------------------------------------------------------


def add_companions(path):
    """Give a folder a tokenizer and what else stands beside it."""
    write_tokenizer(path, eos_token="</s>", chat_template="{{ 'é' }}", tokenizer_class="GPT2")
    change(path, "generation_config.json", eos_token_id=[2, 5], temperature=0.6, do_sample=True)
    for name in ("special_tokens_map.json", "added_tokens.json", "vocab.json"):
        (path / name).write_text("{}")
    (path / "merges.txt").write_text("#version: 0.2\n")
    (path / "tokenizer.model").write_bytes(bytes(range(256)))
    (path / "chat_template.jinja").write_text("{{ 'é' }}", encoding="utf-8")
    (path / "README.md").write_text("not ours")


def test_a_saved_folder_keeps_what_its_source_says_and_holds(folder, tmp_path):
    original, model = folder
    path = Path(shutil.copytree(original, tmp_path / "source"))
    add_companions(path)
    change(path, max_position_embeddings=8192, eos_token_id=[2, 7], sliding_window=None)
    change(path, torch_dtype="bfloat16", dtype=..., unsloth_fixed=True, pad_token_id=2)
    ours = nr.Transformer.load(path)
    assert ours.source == path and ours.config.ends == [2, 7, 5] and ours.config.pad_id == 100
    saved = tmp_path / "saved"
    nr.frozen_copy(ours).save(saved)

    before = json.loads((path / "config.json").read_text())
    after = json.loads((saved / "config.json").read_text())
    del before["torch_dtype"]
    assert after == before | {"dtype": "float32"}
    names = {p.name for p in path.iterdir()} - {"README.md"}
    assert {p.name for p in saved.iterdir()} == names
    for name in names - {"config.json", "model.safetensors"}:
        assert (saved / name).read_bytes() == (path / name).read_bytes(), name

    again = nr.Transformer.load(saved)
    assert again.config == ours.config
    assert torch.equal(again(questions(100)), ours(questions(100)))
    assert difference(saved) < 1e-4
    assert AutoTokenizer.from_pretrained(saved).encode("!") == [
        Tokenizer.from_file(str(path / "tokenizer.json")).token_to_id("!")
    ]


def test_a_model_that_has_grown_says_so_and_keeps_the_rest(copy_of, tmp_path):
    """The diffusion LM of `denoise` has one row more, for MASK, and sees what comes."""
    path = copy_of("smollm2")
    change(path, max_position_embeddings=8192, pad_token_id=2)
    source = nr.Transformer.load(path)
    wide = nr.replace(source.config, vocab=100, mask_id=99, causal=False)
    grown = rough(wide)
    grown.source = path
    grown.save(tmp_path / "grown")
    before = json.loads((path / "config.json").read_text())
    after = json.loads((tmp_path / "grown" / "config.json").read_text())
    assert after == before | dict(vocab_size=100, is_causal=False, mask_token_id=99)
    assert nr.Transformer.load(tmp_path / "grown").config == wide
    assert difference(tmp_path / "grown") < 1e-4


@pytest.mark.parametrize("shards", [False, True])
def test_saving_into_the_folder_itself_loses_nothing(tmp_path, shards):
    model = theirs(FAMILIES["llama3"]).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="40KB" if shards else "1GB")
    add_companions(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    ours = nr.Transformer.load(tmp_path)
    with torch.no_grad():
        for p in ours.parameters():
            p.mul_(1.5)
    ours.save(tmp_path)
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    written = {"config.json", "model.safetensors", "model.safetensors.index.json"}
    for name, content in before.items():
        assert after[name] == content or name in written
    assert json.loads(after["config.json"]) == json.loads(before["config.json"]) | {
        "dtype": "float32"
    }
    assert torch.equal(nr.Transformer.load(tmp_path)(questions()), ours(questions()))
    assert difference(tmp_path) < 1e-4
    if shards:  # whoever reads the index comes to the new weights too
        index = json.loads(after["model.safetensors.index.json"])
        assert set(index["weight_map"].values()) == {"model.safetensors"}
        (tmp_path / "model.safetensors.index.json").unlink()
        assert set(index["weight_map"]) == set(load_file(tmp_path / "model.safetensors"))


def test_a_source_that_has_gone_does_not_stop_the_saving(copy_of, tmp_path):
    path = copy_of("llama3")
    ours = nr.Transformer.load(path)
    shutil.rmtree(path)
    ours.save(tmp_path / "saved")
    assert nr.Transformer.load(tmp_path / "saved").config == ours.config
    assert difference(tmp_path / "saved") < 1e-4


def test_a_model_of_our_own_names_no_pad_behind_its_vocabulary(tmp_path):
    c = nr.replace(TINY, vocab=20, pad_id=21, mask_id=20, other_ends="5 7")
    model = rough(c)
    assert model.source is None
    model.save(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    assert "pad_token_id" not in about and about["eos_token_id"] == [2, 5, 7]
    again = nr.Transformer.load(tmp_path).config
    assert (again.pad_id, again.mask_id, again.ends) == (21, 20, [2, 5, 7])
    assert "mask_token_id" not in about
    rough(nr.replace(c, pad_id=3, other_ends="")).save(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    assert about["pad_token_id"] == 3 and about["eos_token_id"] == 2


# ---- The checksum ---------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A small folder that we have saved ourselves."""
    c = nr.Architecture(vocab=9, width=4, layers=1, heads=1, kv_heads=1, head_dim=4, mlp_width=4)
    rough(c).save(tmp_path)
    return tmp_path


def test_a_flipped_bit_of_the_weights_is_one_line(saved):
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    # One bit of every third byte, and all bits of the word in front of the checksum.
    bits = [(i, i % 8) for i in range(0, len(whole), 3)]
    word = whole.index(b"sha256")
    bits += [(i, bit) for i in range(word, word + 6) for bit in range(8)]
    for i, bit in bits:
        damaged = bytearray(whole)
        damaged[i] ^= 1 << bit
        path.write_bytes(damaged)
        refusal(saved)
    path.write_bytes(whole)
    nr.Transformer.load(saved)


def test_sizes_that_do_not_fit_the_weights_are_one_line(saved):
    about = json.loads((saved / "config.json").read_text())
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "head_dim")
    for key in sizes:
        change(saved, **{key: about[key] * 2})
        assert refusal(saved)
        change(saved, **{key: about[key]})
    nr.Transformer.load(saved)


def test_the_same_weights_are_the_same_bytes(saved, tmp_path):
    files = []
    for i in range(8):
        nr.Transformer.load(saved).save(tmp_path / str(i))
        files.append((tmp_path / str(i) / "model.safetensors").read_bytes())
    assert len(set(files)) == 1 and b"sha256" in files[0]


def test_config_json_can_be_edited_and_transformers_drops_the_checksum(saved):
    with safe_open(saved / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt" and len(file.metadata()["sha256"]) == 64
    change(saved, max_position_embeddings=77, use_cache=False, eos_token_id=[2, 4], pad_token_id=-1)
    change(saved, rope_theta=20_000.0)
    edited = nr.Transformer.load(saved).config
    assert edited.ends == [2, 4] and edited.rope_theta == 20_000.0
    model = AutoModelForCausalLM.from_pretrained(saved)
    model.model.norm.weight.data.mul_(2)
    model.save_pretrained(saved)
    assert torch.equal(nr.Transformer.load(saved).norm.weight, model.model.norm.weight)


def test_files_are_utf_8_whatever_the_machine_speaks(spoken, monkeypatch):
    """Python asks this function for the encoding, which is that of the machine if none is named."""

    def named(encoding, stacklevel=2):
        assert encoding == "utf-8"
        return encoding

    words = Tokenizer(models.WordLevel({"</s>": 1, "é": 2}, unk_token="</s>"))
    words.save(str(spoken / "tokenizer.json"))
    change(spoken, "tokenizer_config.json", eos_token="</s>")
    (spoken / "chat_template.jinja").write_text("é", encoding="utf-8")
    change(spoken, pad_token_id=2)
    monkeypatch.setattr("io.text_encoding", named)
    nr.Transformer.load(spoken).save(spoken / "saved")
    assert (spoken / "saved" / "chat_template.jinja").read_bytes() == "é".encode()


# ---- Models ---------------------------------------------------------------------------------------


def test_log_probs_without_a_mask_token_forbid_pad_and_bos_only():
    config = nr.replace(TINY, vocab=20, mask_id=20, pad_id=3)
    logp = nr.log_softmax(torch.zeros(20), 1.0, config)
    assert torch.equal(logp.isinf().nonzero()[:, 0], torch.tensor([1, 3]))
    assert torch.allclose(logp.exp().sum(), torch.ones(()))


@pytest.mark.parametrize("asked", [True, False])
def test_bf16_is_taken_where_it_is_there(asked, monkeypatch):
    c = nr.replace(TINY, bf16=asked, device="cpu")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert nr.on_device(rough(TINY), c).config.bf16 == asked  # a CPU has it, whatever a GPU has
    monkeypatch.setattr(nr, "pick_device", lambda name: "meta")  # stands in for an old GPU
    assert not nr.on_device(rough(TINY), c).config.bf16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert nr.on_device(rough(TINY), c).config.bf16 == asked


def test_bf16_gives_nearly_the_same_gradients():
    ids, grads = questions(n=3, P=8) % 30, []
    for bf16 in (False, True):
        model = rough(nr.replace(TINY, bf16=bf16))
        model(ids).logsumexp(-1).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert 1e-6 < (grads[1] - grads[0]).norm() / grads[0].norm() < 0.05


def test_a_replayed_step_with_fixed_shapes_is_the_step():
    """The cache of CUDA graphs: `used` is a tensor, and all places are looked at.

    Those that are not written yet are masked.
    """
    model = rough(TINY)
    ids = torch.randint(6, 30, (3, 9), generator=nr.rng(0, "x"))
    ids[1, :4] = TINY.pad_id
    expected = model.hidden(ids)
    cache = nr.Cache(TINY, 3, 20, model.lm_head.weight)
    first = model.hidden(ids[:, :6], cache)
    cache.used = torch.tensor([cache.used])
    rest = [model.hidden(ids[:, t : t + 1], cache) for t in range(6, 9)]
    assert torch.allclose(torch.cat([first, *rest], 1)[ids != 0], expected[ids != 0], atol=1e-5)
    assert int(cache.used) == 9


# ---- CUDA graphs without a GPU -------------------------------------------------------------------


class StandInGraph:
    """Stands in for torch.cuda.CUDAGraph: a list of operations on fixed tensors.

    As with a real graph, Python is gone when it is replayed: only the recorded operations run
    again, and their results go to where they went before.
    """

    def __init__(self):
        self.operations = []
        self.replays = 0

    def replay(self):
        self.replays += 1
        for operation, args, kwargs, before in self.operations:
            now = operation(*args, **kwargs)
            for old, new in zip(tree_leaves(before), tree_leaves(now), strict=True):
                # A view of something, or something changed in place, is already where it was.
                if isinstance(old, torch.Tensor) and address(old) != address(new):
                    old.copy_(new)


def address(x):
    """Where the memory of a tensor begins."""
    return x.untyped_storage().data_ptr()


class StandInCapture(TorchDispatchMode):
    """Stands in for torch.cuda.graph: `with` it, operations are written into a graph.

    They have no effect when they are recorded, so whatever they changed is put back at the end.
    """

    # These need a number on the CPU, or make a tensor whose shape depends on numbers.
    FORBIDDEN = {
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.masked_select.default,
    }

    def __init__(self, graph):
        super().__init__()
        self.graph = graph
        self.changed = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert operation not in self.FORBIDDEN, f"{operation} cannot be part of a CUDA graph"
        kwargs = kwargs or {}
        for x, about in zip(args, operation._schema.arguments, strict=False):
            if about.alias_info is not None and about.alias_info.is_write:
                self.changed.append((x, x.clone()))
        found = operation(*args, **kwargs)
        self.graph.operations.append((operation, args, kwargs, found))
        return found

    def __exit__(self, *error):
        super().__exit__(*error)
        for x, before in reversed(self.changed):
            x.copy_(before)


@pytest.fixture
def graphs(monkeypatch):
    """The stand-ins, and a list of the graphs that were made."""
    made = []

    def make():
        made.append(StandInGraph())
        return made[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", make)
    monkeypatch.setattr(torch.cuda, "graph", StandInCapture)
    return made


@torch.no_grad()
@pytest.mark.parametrize("bf16", [False, True])
def test_a_cuda_graph_reads_token_after_token_as_the_model_does(graphs, bf16):
    c = nr.replace(TINY, bf16=bf16)
    model = rough(c)
    ids = torch.randint(6, 30, (3, 12), generator=nr.rng(0, "x"))
    ids[1, :4] = c.pad_id
    given = ids.clone()
    expected = model.hidden(ids)
    cache = nr.Cache(c, 3, 20, model.lm_head.weight)
    model.hidden(ids[:, :6], cache)
    replay = nr.CudaGraph(model, cache)
    for t in range(6, 12):
        difference = (replay(ids[:, t]) - expected[:, t]).abs().max()
        assert difference < (0.05 if bf16 else 1e-5)
        assert int(cache.used) == t + 1
    # The graph has a place of its own for the token, and writes nowhere else.
    assert torch.equal(ids, given)
    # The first token only warms up, and the second one is recorded, once for all.
    assert [graph.replays for graph in graphs] == [5]


class OnGpu(torch.Tensor):
    """A tensor of the CPU that says it were on a GPU; what is computed from it does not."""

    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sampling_by_a_replayed_graph_writes_the_same_tokens(graphs, temperature, bf16):
    c = nr.replace(TINY, response=20, temperature=temperature, bf16=bf16)
    model = rough(c)
    prompt = torch.randint(6, 30, (16, 5), generator=nr.rng(0, "prompt"))
    prompt[3, :2] = c.pad_id
    # Each row begins with one given token more, so that rows end for lack of room, too.
    start = torch.randint(6, 30, (16, 20), generator=nr.rng(0, "start"))
    start = start.masked_fill(torch.arange(20) >= torch.arange(16)[:, None], c.pad_id)
    expected = nr.sample(model, prompt, c, start, generator=nr.rng(0, "sample"))
    b = nr.sample(model, prompt.as_subclass(OnGpu), c, start, generator=nr.rng(0, "sample"))
    assert torch.equal(b.response, expected.response) and torch.equal(b.order, expected.order)
    # Rows that have ended are written on without a trace, so they must end at several places.
    assert len(b.mask.sum(1).unique()) > 2
    assert len(graphs) == 1 and graphs[0].replays >= 10
