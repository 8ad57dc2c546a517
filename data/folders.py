"""Read and write model folders in the format of Hugging Face.

Such a folder holds two things that matter here. `config.json` says how large the model is and which
family it belongs to. `model.safetensors` holds the weights, each one under a name. A large model is
split into several weight files, called shards, and `model.safetensors.index.json` then lists them.

Three families of models can be read. Their only differences are these:

    llama    no biases and no norms inside attention (SmolLM2 is one of these)
    qwen2    a bias on the queries, keys and values
    qwen3    a norm on the queries and on the keys

Every setting has two names. This project calls the width of the model `width`, for example, and
Hugging Face calls it `hidden_size`. In this file our own names are called fields and the names of
Hugging Face are called keys. The table `KEYS` translates between them.

Loading needs three steps: `read_architecture` says which model to build, `Weights(...).shapes` says
whether the weights fit into it, and `Weights(...).read()` returns the weights themselves. Saving is
the one function `write_folder`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

# Our field -> the key in config.json. The family and the rope scaling are not in this table,
# because they are more than a change of name.
KEYS = {
    # The sizes of the model.
    "vocab": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_width": "intermediate_size",
    # How positions are encoded, how states are normalized, and what each position may see.
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
    "causal": "is_causal",
    # The ids of the tokens that have a special meaning.
    "pad_id": "pad_token_id",
    "bos_id": "bos_token_id",
    "eos_id": "eos_token_id",
    "mask_id": "mask_token_id",
}

# The values of model_type that we can read. They are explained at the top of this file.
FAMILIES = ["llama", "qwen2", "qwen3"]

# Llama 3 slows down the rotary angles that turn slowly, so that the model can read longer texts.
# These four numbers say how. We keep them in one string, in this order, for example "8 1 4 8192".
LLAMA3_KEYS = [
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
]

# These keys change what the model computes, and we can compute it only if they have one of the
# values listed here.
UNDERSTOOD = {
    "model_type": FAMILIES,
    "hidden_act": ["silu"],
    "pretraining_tp": [1],
    "rope_type": ["default"],
    "layer_types": [{"full_attention"}],
    "mlp_bias": [False],
    "attention_bias": [False],
    "use_sliding_window": [False],
    "rope_interleaved": [False],
}

# These keys may have any value, because they do not change the logits of the model.
HARMLESS = {
    # How the model was trained.
    "attention_dropout",
    "initializer_range",
    "max_position_embeddings",
    # The size of a sliding window, which matters only if use_sliding_window is true.
    "max_window_layers",
    "sliding_window",
    # The type of the weights in the file. We compute in float32 anyway.
    "dtype",
    "torch_dtype",
    # Notes of the programs that wrote or read the folder.
    "architectures",
    "is_llama_config",
    "transformers.js_config",
    "transformers_version",
    "use_cache",
    "_model_name_or_path",
    "_name_or_path",
    # The id of a token that only the tokenizer needs.
    "unk_token_id",
}

# Hugging Face puts this prefix in front of the name of every weight except the output matrix. We
# leave it out, so the names of the weights are the names of the modules in our model.
PREFIX = "model."

# The matrix that turns states into logits, and the one that turns tokens into states.
OUTPUT = "lm_head.weight"
EMBEDDING = "embed_tokens.weight"


# ---- The architecture: config.json ---------------------------------------------------------------


def read_architecture(folder: Path) -> dict[str, Any]:
    """Read config.json and return the fields that describe the architecture of the model.

    A field is missing from the result if the folder does not mention it and Hugging Face has no
    default of its own for it. Anything that we do not understand raises a ValueError, because a
    model that ignores a setting would silently compute wrong logits.
    """
    keys = read_keys(folder)
    rope_scaling = take_rope_scaling(keys)
    refuse_unknown(keys)

    # Some models have several tokens that end a text. We use the first one.
    eos = keys["eos_token_id"]
    if isinstance(eos, list):
        eos = eos[0]
    keys["eos_token_id"] = eos

    # What Hugging Face assumes when config.json leaves these keys out. A language model has no MASK
    # token, and we say so with an id that is just outside of the vocabulary.
    heads = keys["num_attention_heads"]
    keys.setdefault("num_key_value_heads", heads)
    keys.setdefault("head_dim", keys["hidden_size"] // heads)
    keys.setdefault("rms_norm_eps", 1e-6)
    keys.setdefault("mask_token_id", keys["vocab_size"])
    keys.setdefault("bos_token_id", eos)
    keys.setdefault("pad_token_id", eos)

    # Many folders use EOS as PAD. We never attend to PAD and never train on it, so a model with
    # such a PAD could not learn where a text ends. It gets another PAD.
    if keys["pad_token_id"] == eos:
        keys["pad_token_id"] = spare_token(folder, keys)

    # Now all keys that we need are there, and they only have to get our names.
    fields = {"family": keys["model_type"], "rope_scaling": rope_scaling}
    for field, key in KEYS.items():
        if key in keys:
            fields[field] = keys[key]
    return fields


def read_keys(folder: Path) -> dict[str, Any]:
    """Read config.json into one flat dictionary, in which older spellings look like newer ones."""
    keys = {}
    for key, value in json.loads((folder / "config.json").read_text()).items():
        # A null in the file means the same as a key that is not there.
        if value is not None:
            keys[key] = value

    # The settings of the rotary angles stand in a dictionary of their own. Older versions of
    # transformers call it rope_scaling, and newer versions call it rope_parameters.
    older = keys.pop("rope_scaling", {})
    newer = keys.pop("rope_parameters", {})
    keys |= older | newer

    # There is one entry a layer. We only need to know which kinds of layers there are.
    keys["layer_types"] = set(keys.get("layer_types", ["full_attention"]))
    return keys


def take_rope_scaling(keys: dict[str, Any]) -> str:
    """Remove the rope scaling of Llama 3 from the keys and return it as a string.

    The string is empty if the model does not scale its rotary angles. Other kinds of scaling stay
    in the keys, where `refuse_unknown` will find them.
    """
    if keys.get("rope_type") != "llama3":
        return ""
    del keys["rope_type"]
    numbers = []
    for key in LLAMA3_KEYS:
        # The format "g" writes 8.0 as "8".
        numbers.append(f"{keys.pop(key):g}")
    return " ".join(numbers)


def refuse_unknown(keys: dict[str, Any]) -> None:
    """Raise a ValueError that names every key which could change the logits in an unknown way."""
    # Earlier versions of this project also wrote two keys that say what the family already says.
    # They are fine as long as they agree with it.
    family = keys.get("model_type")
    understood = UNDERSTOOD | {
        "qkv_bias": [family == "qwen2"],
        "qk_norm": [family == "qwen3"],
    }

    odd = {}
    for key, value in keys.items():
        # The keys of the table may have any value, because our model can be built with any of them.
        if key in HARMLESS or key in KEYS.values():
            continue
        # A key that we have never heard of has no understood values, so it always counts as odd.
        if value not in understood.get(key, []):
            odd[key] = value
    if odd:
        raise ValueError(f"not understood: {odd}")


def spare_token(folder: Path, keys: dict[str, Any]) -> int:
    """Choose a token that no text contains, so that it can serve as PAD.

    This is the special token with the highest id that neither begins nor ends a text. If there is
    no such token, or no tokenizer in the folder, it is the last token of the vocabulary.
    """
    # Here the tokenizer lists the tokens that it did not learn from texts.
    added_tokens = []
    tokenizer = folder / "tokenizer.json"
    if tokenizer.exists():
        added_tokens = json.loads(tokenizer.read_text())["added_tokens"]

    spare = set()
    for token in added_tokens:
        if token["special"]:
            spare.add(token["id"])
    spare -= {keys["eos_token_id"], keys["bos_token_id"]}
    return max(spare, default=keys["vocab_size"] - 1)


# ---- The weights: model.safetensors --------------------------------------------------------------


class Weights:
    """The weights of a folder. Opening them reads their names, and `read` reads the numbers.

    In between, `shapes` makes it possible to check that all weights fit before any memory is spent.
    The names are those of our model, without the prefix that Hugging Face adds, for example
    "layers.0.self_attn.q_proj.weight".

    A model is tied if its output matrix is its embedding. Some tied folders still hold an output
    matrix of their own. It is ignored.
    """

    def __init__(self, folder: Path, tied: bool) -> None:
        """Open all weight files of the folder and remember where each weight stands."""
        self.tied = tied
        # Our name -> the file that holds the weight, and its name in that file.
        self.places: dict[str, tuple[Any, str]] = {}
        for file_name in weight_files(folder):
            # This reads only the head of the file, which lists names, shapes and positions.
            file = safe_open(folder / file_name, "pt")
            for key in file.offset_keys():
                self.places[key.removeprefix(PREFIX)] = (file, key)
        if tied:
            self.places[OUTPUT] = self.places[EMBEDDING]

    @property
    def shapes(self) -> dict[str, list[int]]:
        """The shape of each weight. This does not read the weights themselves."""
        shapes = {}
        for name, (file, key) in self.places.items():
            shapes[name] = file.get_slice(key).get_shape()
        return shapes

    def read(self) -> dict[str, Tensor]:
        """Read all weights as float32, whatever the type in which they were saved."""
        weights = {}
        for name, (file, key) in self.places.items():
            # A tied output matrix would be the same numbers in memory a second time.
            if not (self.tied and name == OUTPUT):
                weights[name] = file.get_tensor(key).to(torch.float32)
        if self.tied:
            weights[OUTPUT] = weights[EMBEDDING]
        return weights


def weight_files(folder: Path) -> list[str]:
    """The names of the files that hold the weights.

    These are the shards of the index if the folder has an index, and else it is one file.
    """
    index = folder / "model.safetensors.index.json"
    shards = set()
    if index.exists():
        # The index says for each weight in which shard it stands, so each shard is named often.
        shards = set(json.loads(index.read_text())["weight_map"].values())
    return sorted(shards) or ["model.safetensors"]


# ---- Writing both --------------------------------------------------------------------------------


def write_folder(
    folder: Path,
    fields: dict[str, Any],
    weights: dict[str, Tensor],
    write_whole: Callable[[Path, Callable[[Path], Any]], None],
) -> None:
    """Write a folder that transformers can read, and that we can read again.

    `fields` may hold more than the architecture. Only the fields of this file are written. The
    caller passes `write_whole(path, write)`, which makes sure that a file is written whole or not
    at all, even if the program is killed in the middle.
    """
    keys = keys_to_write(fields)

    named = {}
    for name, tensor in weights.items():
        if name == OUTPUT:
            # The output matrix of a tied model is the embedding, which is written anyway. The
            # format also does not allow two names for the same memory.
            if not fields["tied"]:
                named[name] = tensor.contiguous()
        else:
            # The format wants the numbers of a tensor one after the other in memory.
            named[PREFIX + name] = tensor.contiguous()

    write_whole(folder / "config.json", lambda path: path.write_text(json.dumps(keys, indent=1)))
    write_whole(folder / "model.safetensors", lambda path: save_file(named, path))


def keys_to_write(fields: dict[str, Any]) -> dict[str, Any]:
    """Translate the fields of an architecture into the keys of config.json."""
    family = fields["family"]
    # The architecture is the name of a class in transformers, for example Qwen2ForCausalLM.
    keys = {"model_type": family, "architectures": [family.capitalize() + "ForCausalLM"]}
    for field, key in KEYS.items():
        keys[key] = fields[field]
    keys["dtype"] = "float32"

    if fields["rope_scaling"]:
        numbers = map(float, fields["rope_scaling"].split())
        scaling = dict(zip(LLAMA3_KEYS, numbers, strict=True))
        keys["rope_scaling"] = {"rope_type": "llama3"} | scaling
    return keys
