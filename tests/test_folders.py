"""Folders of Hugging Face, compared with transformers: logits, greedy tokens, what is refused."""

import json
from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

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
    # Some folders hold a copy of the output matrix.
    with_copy = weights | {"lm_head.weight": torch.zeros(99, 48)}
    save_file(with_copy, tmp_path / "model.safetensors")
    assert torch.equal(nr.Transformer.load(tmp_path)(questions()), ours(questions()))


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
        assert torch.allclose(ours(ids), theirs(ids).logits, atol=1e-3)


def test_pad_is_an_id_that_no_text_has(tmp_path):
    model = theirs(LlamaConfig(**SHAPE | dict(pad_token_id=2)))
    model.save_pretrained(tmp_path)
    # Without a tokenizer it is the last one.
    assert nr.Transformer.load(tmp_path).config.pad_id == 98
    words = [
        {"id": i, "special": special}
        for i, special in ((1, True), (2, True), (7, True), (9, False))
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": words}))
    # It is special, and neither the beginning nor the end of a text.
    assert nr.Transformer.load(tmp_path).config.pad_id == 7


def test_log_probs_without_a_mask_token_forbid_pad_only():
    config = nr.replace(TINY, vocab=20, mask_id=20, pad_id=3)
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


def test_the_table_of_keys_names_fields_of_the_architecture():
    """What is left out of the table is more than a name, or no part of a folder."""
    ours = {f.name for f in fields(nr.Architecture)}
    assert ours - set(folders.KEYS) == {"family", "rope_scaling", "bf16"}
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
def test_a_cuda_graph_reads_token_after_token_as_the_model_does(graphs):
    model = rough(TINY)
    ids = torch.randint(6, 30, (3, 12), generator=nr.rng(0, "x"))
    ids[1, :4] = TINY.pad_id
    given = ids.clone()
    expected = model.hidden(ids)
    cache = nr.Cache(TINY, 3, 20, model.lm_head.weight)
    model.hidden(ids[:, :6], cache)
    replay = nr.CudaGraph(model, cache)
    for t in range(6, 12):
        assert torch.allclose(replay(ids[:, t]), expected[:, t], atol=1e-5)
        assert int(cache.used) == t + 1
    # The graph has a place of its own for the token, and writes nowhere else.
    assert torch.equal(ids, given)
    # The first token only warms up, and the second one is recorded, once for all.
    assert [graph.replays for graph in graphs] == [5]


class OnGpu(torch.Tensor):
    """A tensor of the CPU that says it were on a GPU; what is computed from it does not."""

    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sampling_by_a_replayed_graph_writes_the_same_tokens(graphs, temperature):
    model = rough(TINY)
    c = nr.replace(TINY, response=20, temperature=temperature)
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
