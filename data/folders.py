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
the one function `write_folder`. A folder also holds the tokenizer, which `read_tokenizer` reads.

Whatever is wrong with a folder is a ValueError whose text is one line for the user.
"""

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

# Our field -> the key in config.json. The family and the rope scaling are not in this table,
# because they are more than a change of name. Neither are the further ends of a text, which stand
# in config.json together with the first one.
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

# Without these keys nobody knows which model it is.
NECESSARY = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
]

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

# These keys may have any value, because they do not change the logits of the model.
HARMLESS_KEYS = {
    # How texts are generated.
    "early_stopping",
    "min_p",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    # What a program gives back beside the logits, and in how many pieces it computes.
    "chunk_size_feed_forward",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    # The size of a sliding window, which matters only if use_sliding_window is true.
    "sliding_window",
    # Notes of programs.
    "is_decoder",
    "is_llama_config",
    "torchscript",
    "transformers.js_config",
}

# Neither do keys that hold one of these words. The words of "hidden_dropout" are "hidden" and
# "dropout". The left side says what such a key is about.
HARMLESS_WORDS = {
    "how the model was trained": "init initializer dropout pdrop loss pretraining train training",
    "how it would be trained": "checkpointing neftune problem task label labels id2label label2id",
    "how fast it is computed": "cache flash implementation return",
    "in which type, which is float32 here": "dtype fp16 bf16 bfloat16",
    "how long a text may be": "max length",
    "how texts are generated": "sample beam beams penalty ngram cutoff assistant",
    "how texts become tokens": "tokenizer",
    "who wrote the folder": "architectures axolotl class name path tags unsloth version",
}

# Neither do keys that end like this: they name special tokens, or count tokens.
HARMLESS_ENDINGS = ("_token", "_tokens", "_token_id", "_token_ids")

# The names of numbers that something is multiplied with. They are harmless only if they are 1.
FACTOR = re.compile("factor|multiplier|scale|scaling")

# Whole numbers of this range can be sizes. No matrix has more rows or columns.
SIZES = range(1, 2**31)

# Hugging Face puts this prefix in front of the name of every weight except the output matrix. We
# leave it out, so the names of the weights are the names of the modules in our model.
PREFIX = "model."

# The matrix that turns states into logits, and the one that turns tokens into states.
OUTPUT = "lm_head.weight"
EMBEDDING = "embed_tokens.weight"

# Where the weights are, and where their shards are listed if there are any.
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# What `peft` calls the two files of adapters.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
SUFFIX = ".safetensors"

# What a folder holds beside its model: the tokenizer, and how texts are generated.
COMPANIONS = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
]

# A folder that was copied without Git LFS holds small text files in place of the large ones. They
# begin with this.
GIT_LFS = b"version https://git-lfs"


# ---- Files ---------------------------------------------------------------------------------------


def check_file(path: Path) -> None:
    """Raise a ValueError if the file is not there, or if Git LFS has left only a pointer to it."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    with path.open("rb") as file:
        if file.read(len(GIT_LFS)) == GIT_LFS:
            raise ValueError(f"{path} is only a pointer of Git LFS; run `git lfs pull` there")


def read_text(path: Path) -> str:
    """The text of a file, which is UTF-8 on every machine."""
    check_file(path)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


# ---- The architecture: config.json ---------------------------------------------------------------


def read_architecture(folder: Path) -> dict[str, Any]:
    """Read config.json and return the fields that describe the architecture of the model.

    Anything that we do not understand raises a ValueError, because a model that ignores a setting
    would silently compute wrong logits.
    """
    keys = without_nulls(read_json(folder / "config.json"))
    fields = model_fields(keys)
    return fields | special_tokens(folder, keys, fields["vocab"])


def without_nulls(keys: dict[str, Any]) -> dict[str, Any]:
    """The same keys. A null in the file means the same as a key that is not there."""
    return {key: value for key, value in keys.items() if value is not None}


def model_fields(keys: dict[str, Any]) -> dict[str, Any]:
    """All fields of an architecture but its special tokens, from the keys of config.json."""
    # The keys that are understood are taken out of this copy, so that the others are left.
    keys = dict(keys)
    family = keys.pop("model_type", None)
    if family not in FAMILIES:
        raise ValueError(f"model_type is {family!r:.50}; it can be one of {', '.join(FAMILIES)}")
    missing = [key for key in NECESSARY if key not in keys]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")

    rope_theta, rope_scaling = take_rope(keys)
    fields = {"family": family, "rope_theta": rope_theta, "rope_scaling": rope_scaling}
    for field in ("vocab", "width", "layers", "heads", "mlp_width"):
        fields[field] = whole(KEYS[field], keys.pop(KEYS[field]), SIZES)
    width = fields["width"]
    heads = fields["heads"]

    # Here and below: what Hugging Face assumes when config.json leaves a key out.
    fields["kv_heads"] = whole("num_key_value_heads", keys.pop("num_key_value_heads", heads), SIZES)
    if heads % fields["kv_heads"] != 0:
        raise ValueError(
            f"num_attention_heads {heads} is no multiple of num_key_value_heads"
            f" {fields['kv_heads']}"
        )
    if "head_dim" not in keys and family == "qwen3":
        keys["head_dim"] = 128
    if "head_dim" not in keys and width % heads != 0:
        raise ValueError(f"hidden_size {width} is no multiple of num_attention_heads {heads}")
    fields["head_dim"] = whole("head_dim", keys.pop("head_dim", width // heads), SIZES)
    if fields["head_dim"] % 2 != 0:
        raise ValueError(f"head_dim is {fields['head_dim']}, and rotary angles need an even number")

    fields["norm_eps"] = positive("rms_norm_eps", keys.pop("rms_norm_eps", 1e-6))
    if fields["norm_eps"] > 1:
        raise ValueError(f"rms_norm_eps is {fields['norm_eps']}, and it can be 1 at most")
    fields["tied"] = true_or_false("tie_word_embeddings", keys.pop("tie_word_embeddings", False))
    fields["causal"] = true_or_false("is_causal", keys.pop("is_causal", True))
    refuse_unknown(keys, family)
    return fields


def take_rope(keys: dict[str, Any]) -> tuple[float, str]:
    """Remove what is said about rotary angles from the keys; return rope_theta and rope_scaling.

    The scaling is that of Llama 3. It is empty if the model does not scale its rotary angles.
    """
    # The settings stand in a dictionary of their own. Older versions of transformers call it
    # rope_scaling, and newer versions call it rope_parameters. The older one wins, as it does in
    # transformers.
    older = keys.pop("rope_scaling", {})
    newer = keys.pop("rope_parameters", {})
    rope = older or newer
    if not isinstance(rope, dict):
        raise ValueError(f"rope_scaling is {rope!r:.50}, and not a JSON object")
    rope = without_nulls(rope)

    # What stands inside of it wins over what stands beside it.
    beside = keys.pop("rope_theta", 10_000.0)
    theta = positive("rope_theta", rope.pop("rope_theta", beside))
    older_kind = rope.pop("type", "default")
    kind = rope.pop("rope_type", older_kind)

    numbers = []
    if kind == "llama3":
        # Here it is the other way round: an old length that stands beside it wins. Without any it
        # is the length of the longest text.
        old_length = LLAMA3_KEYS[-1]
        rope.setdefault(old_length, keys.get("max_position_embeddings"))
        if old_length in keys:
            rope[old_length] = keys[old_length]
        for key in LLAMA3_KEYS:
            numbers.append(positive(key, rope.pop(key, None)))
        _, low, high, _ = numbers
        if low >= high:
            raise ValueError(f"low_freq_factor {low} is not below high_freq_factor {high}")
    elif kind != "default":
        raise ValueError(f"rope_type is {kind!r:.50}; it can be default or llama3")
    refuse_unknown(rope, "")
    # A whole number is written without its ".0".
    return theta, " ".join(str(number).removesuffix(".0") for number in numbers)


def whole(key: str, value: Any, allowed: range) -> int:
    """The value, if it is a whole number of this range. True and 8.0 are none."""
    if type(value) is not int or value not in allowed:
        raise ValueError(
            f"{key} is {value!r:.50}, and not a whole number from {allowed[0]} to {allowed[-1]}"
        )
    return value


def positive(key: str, value: Any) -> float:
    """The value, if it is a finite number above 0. True is none."""
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise ValueError(f"{key} is {value!r:.50}, and not a finite number above 0")
    return float(value)


def true_or_false(key: str, value: Any) -> bool:
    """The value, if it is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{key} is {value!r:.50}, and neither true nor false")
    return value


def refuse_unknown(keys: dict[str, Any], family: str) -> None:
    """Raise a ValueError that names every key which could change the logits in an unknown way."""
    # These keys change what the model computes, and we compute it if they have one of these values.
    understood = {
        "hidden_act": ["silu", "swish"],
        "layer_types": ["full_attention"],
        # transformers knows what a family has and does not look at this key. Earlier versions of
        # this project wrote the two others, which say what the family already says.
        "attention_bias": [family == "qwen2", False],
        "qkv_bias": [family == "qwen2"],
        "qk_norm": [family == "qwen3"],
    }
    odd = []
    for key, value in keys.items():
        if key in understood:
            # The types of the layers are a list with one entry a layer.
            values = value if isinstance(value, list) else [value]
            known = all(entry in understood[key] for entry in values)
        else:
            known = is_harmless(key, value)
        if not known:
            odd.append(f"{key} = {value!r:.50}")
    if odd:
        raise ValueError(f"not understood: {', '.join(odd)}")


def is_harmless(key: str, value: Any) -> bool:
    """Whether a key that we do not read can have no effect on the logits of the model."""
    # These values switch nothing on, whatever the key is about. Zero may be a number like others.
    if value is False or value in ("", [], {}):
        return True
    if FACTOR.search(key):
        return type(value) in (int, float) and value == 1
    # A leading underscore marks the notes of a program to itself.
    if key.startswith("_") or key.endswith(HARMLESS_ENDINGS) or key in HARMLESS_KEYS:
        return True
    harmless = " ".join(HARMLESS_WORDS.values()).split()
    return any(word in harmless for word in key.split("_"))


# ---- The special tokens --------------------------------------------------------------------------


def special_tokens(folder: Path, keys: dict[str, Any], vocab: int) -> dict[str, Any]:
    """The fields of the special tokens. Their ids have to lie inside the vocabulary."""
    ends = read_ends(folder, keys, vocab)
    bos = whole("bos_token_id", keys.get("bos_token_id", ends[0]), range(vocab))
    # A language model has no MASK token, and we say so with an id just behind the vocabulary.
    mask = whole("mask_token_id", keys.get("mask_token_id", vocab), range(vocab + 1))
    if mask in (bos, *ends):
        raise ValueError(f"mask_token_id is {mask}, which begins or ends a text")

    # We never attend to PAD and never train on it, so it must be an id that no text, no prompt and
    # no end uses. Many folders name one that is used. Their PAD lies behind the vocabulary, and
    # behind MASK. Old folders of Llama have -1 for no PAD.
    pad = keys.get("pad_token_id", -1)
    if pad != -1:
        whole("pad_token_id", pad, range(vocab))
    if pad in (-1, bos, mask, *ends) or is_used(folder, pad):
        pad = max(vocab, mask + 1)

    others = " ".join(str(end) for end in ends[1:])
    return {"pad_id": pad, "bos_id": bos, "eos_id": ends[0], "mask_id": mask, "other_ends": others}


def read_ends(folder: Path, keys: dict[str, Any], vocab: int) -> list[int]:
    """All ids that end a text.

    config.json and generation_config.json name one id or several. Where neither of them names any,
    the tokenizer knows the token that ends a text.
    """
    named = [keys.get("eos_token_id")]
    generation = folder / "generation_config.json"
    if generation.exists():
        named.append(read_json(generation).get("eos_token_id"))
    ends = []
    for ids in named:
        if ids is None:
            continue
        for end in ids if isinstance(ids, list) else [ids]:
            whole("eos_token_id", end, range(vocab))
            if end not in ends:
                ends.append(end)
    if not ends:
        ends.append(whole("the id of eos_token", eos_of_tokenizer(folder), range(vocab)))
    return ends


def eos_of_tokenizer(folder: Path) -> int:
    """The id of the token that the tokenizer calls the end of a text."""
    about = folder / "tokenizer_config.json"
    token = None
    if about.exists():
        token = read_json(about).get("eos_token")
    # Some files have the token itself, others say more about it.
    if isinstance(token, dict):
        token = token.get("content")
    if not isinstance(token, str):
        raise ValueError(
            "config.json names no eos_token_id, and tokenizer_config.json no eos_token"
        )
    found = read_tokenizer(folder / "tokenizer.json").token_to_id(token)
    if found is None:
        raise ValueError(f"tokenizer.json does not know the eos_token {token!r:.50}")
    return found


def is_used(folder: Path, pad: int) -> bool:
    """Whether a text or a chat may hold this id. Without a tokenizer nobody knows: then it is not.

    A text writes a token if it holds the letters of the token, and the token is not special or can
    be learned too, or if the token stands for whatever the tokenizer does not know.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        return False
    tokenizer = read_tokenizer(path)
    token = tokenizer.id_to_token(pad)
    if token is None:
        return False
    # Whatever was not added to the tokenizer was learned from texts.
    if pad not in tokenizer.get_added_tokens_decoder():
        return True
    # The last letter is private, so hardly a tokenizer knows it.
    text = f"{token} a{token} \ue000"
    return pad in tokenizer.encode(text, add_special_tokens=False).ids or token in chat(folder)


def chat(folder: Path) -> str:
    """The template that turns a chat into a text. It is empty if the folder has none."""
    template = ""
    about = folder / "tokenizer_config.json"
    if about.exists():
        template += str(read_json(about).get("chat_template", ""))
    for name in ("chat_template.jinja", "chat_template.json"):
        if (folder / name).exists():
            template += read_text(folder / name)
    return template


# ---- The tokenizer: tokenizer.json ---------------------------------------------------------------


def read_tokenizer(path: Path, vocab: int | None = None) -> Tokenizer:
    """Read a tokenizer that turns whole texts into ids, and only into ordinary ones.

    `vocab` is the size of the model's vocabulary, which then has to hold every ordinary token.
    Special tokens may lie behind it, because no text produces them.
    """
    text = read_text(path)
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library has no error of its own
        raise ValueError(
            f"{path} cannot be read; it is damaged or of another version of tokenizers: {error}"
        ) from error
    # The file keeps how it was last called, which may have cut or filled the texts.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # A text that spells a special token stays a text.
    tokenizer.encode_special_tokens = True

    if vocab is not None:
        added = tokenizer.get_added_tokens_decoder()
        for token, i in tokenizer.get_vocab().items():
            if i >= vocab and not (i in added and added[i].special):
                raise ValueError(
                    f"{path} has the token {token!r:.50} with the id {i}, but the vocabulary of the"
                    f" model has only {vocab} ids"
                )
    return tokenizer


# ---- The weights: model.safetensors --------------------------------------------------------------


class Weights:
    """The weights of a folder. Opening them reads their names, and `read` reads the numbers.

    In between, `shapes` makes it possible to check that all weights fit before any memory is spent.
    The names are those of our model, without the prefix that Hugging Face adds, for example
    "layers.0.self_attn.q_proj.weight".

    A model is `tied` if its output matrix is its embedding. Then one of them is enough. If a folder
    says that it is tied and yet holds two that differ, it is not tied. So does transformers.
    """

    def __init__(self, folder: Path) -> None:
        """Open all weight files of the folder and compare their sizes with config.json."""
        self.keys = without_nulls(read_json(folder / "config.json"))
        # Our name -> the file that holds the weight, and its name in that file.
        self.places: dict[str, tuple[Any, str]] = {}
        self.metadata: dict[str, str] = {}
        for path in weight_files(folder):
            file = open_weights(path)
            self.metadata |= file.metadata() or {}
            for key in file.offset_keys():
                name = key.removeprefix(PREFIX)
                # Old folders also hold the rotary frequencies, which are computed anyway.
                if name.endswith("rotary_emb.inv_freq"):
                    continue
                if name in self.places and self.places[name][1] != key:
                    raise ValueError(f"the weights hold {name} twice, with and without {PREFIX!r}")
                self.places[name] = (file, key)
        self.check_sizes()

    def check_sizes(self) -> None:
        """Compare the sizes with those of config.json, and find out whether the model is tied.

        A model of other sizes may be too large to be built even without numbers, so this comes
        before it is built. Whatever else does not fit is found then.
        """
        fields = model_fields(self.keys)
        self.tied = fields["tied"]
        held = [name for name in (EMBEDDING, OUTPUT) if name in self.places]
        if self.tied and len(held) == 1:
            self.places[EMBEDDING] = self.places[OUTPUT] = self.places[held[0]]

        numbers = {name.split(".")[1] for name in self.places if name.startswith("layers.")}
        if len(numbers) != fields["layers"]:
            raise ValueError(
                f"num_hidden_layers is {fields['layers']}, but the weights are those of"
                f" {len(numbers)} layers"
            )
        rows = {
            EMBEDDING: fields["vocab"],
            "layers.0.self_attn.q_proj.weight": fields["heads"] * fields["head_dim"],
            "layers.0.self_attn.k_proj.weight": fields["kv_heads"] * fields["head_dim"],
            "layers.0.mlp.gate_proj.weight": fields["mlp_width"],
        }
        shapes = self.shapes
        for name, count in rows.items():
            expected = [count, fields["width"]]
            if shapes.get(name, expected) != expected:
                raise ValueError(
                    f"size mismatch: {name} would be {expected} by config.json, and it is"
                    f" {shapes[name]} in the weights"
                )
        if self.tied and len(held) == 2:
            self.tied = torch.equal(self.tensor(EMBEDDING), self.tensor(OUTPUT))

    @property
    def shapes(self) -> dict[str, list[int]]:
        """The shape of each weight. This does not read the weights themselves."""
        shapes = {}
        for name, (file, key) in self.places.items():
            shapes[name] = file.get_slice(key).get_shape()
        return shapes

    def tensor(self, name: str) -> Tensor:
        """One of the weights as float32, whatever the type in which it was saved."""
        file, key = self.places[name]
        tensor = file.get_tensor(key)
        if not tensor.is_floating_point():
            raise ValueError(f"the weight {name} holds {tensor.dtype} and not numbers with a point")
        return tensor.to(torch.float32)

    def read(self) -> dict[str, Tensor]:
        """Read all weights. They are those that were saved, and none of them is NaN or infinite."""
        weights = {}
        for name in self.places:
            # A tied output matrix would be the same numbers in memory a second time.
            if not (self.tied and name == OUTPUT):
                weights[name] = self.tensor(name)

        # Our own files carry a checksum. It is known by its 64 digits, because damage may have
        # changed the word in front of them too.
        if any(len(value) == 64 for value in self.metadata.values()):
            if self.metadata != {"format": "pt", "sha256": checksum(weights)}:
                raise ValueError("the weights were changed or damaged since they were saved")
        for name, tensor in weights.items():
            if not tensor.isfinite().all():
                raise ValueError(f"the weight {name} holds NaN or infinity")
        if self.tied:
            weights[OUTPUT] = weights[EMBEDDING]
        return weights


def open_weights(path: Path) -> Any:
    """Open a weight file. This reads only its head, which lists names, shapes and positions."""
    check_file(path)
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights.

    This is one file, or else the shards of the index. The one file wins if there are both, as it
    does in transformers.
    """
    if (folder / "adapter_config.json").exists():
        raise ValueError("it holds an adapter (LoRA); merge the adapter into the weights first")
    index = folder / INDEX
    if (folder / WEIGHTS).exists() or not index.exists():
        if not (folder / WEIGHTS).exists() and any(folder.glob("pytorch_model*.bin*")):
            raise ValueError(
                f"there is no {WEIGHTS}, only pytorch_model.bin; save the model as safetensors"
            )
        return [folder / WEIGHTS]

    # The index says for each weight in which shard it stands, so each shard is named often.
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index} has no weight_map")
    shards = []
    for name in places.values():
        if not isinstance(name, str) or Path(name).name != name or Path(name).suffix != SUFFIX:
            raise ValueError(f"{index} names {name!r:.50}, which is no weight file of its folder")
        shards.append(folder / name)
    return sorted(set(shards))


def checksum(weights: dict[str, Tensor]) -> str:
    """The SHA-256 of all weights in float32, with their names and shapes.

    What config.json says is not part of it, because people edit that file with good reason.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].cpu()
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).numpy())
    return digest.hexdigest()


# ---- Writing both --------------------------------------------------------------------------------


def write_folder(
    folder: Path,
    fields: dict[str, Any],
    weights: dict[str, Tensor],
    write_whole: Callable[[Path, Callable[[Path], Any]], None],
    source: Path | None = None,
) -> None:
    """Write a folder that transformers can read, and that we can read again.

    `fields` may hold more than the architecture. Only the fields of this file are written. The
    caller passes `write_whole(path, write)`, which makes sure that a file is written whole or not
    at all, even if the program is killed in the middle. `source` is the folder that the model was
    loaded from, if there is one. What it says beside our fields is kept, and so is its tokenizer.
    """
    keys = keys_to_write(fields, source)
    ours = {}
    for name, tensor in weights.items():
        # The output matrix of a tied model is the embedding, which is written anyway. The format
        # also does not allow two names for the same memory.
        if not (fields["tied"] and name == OUTPUT):
            # The format wants the numbers of a tensor one after the other in memory.
            ours[name] = tensor.to(torch.float32).contiguous()
    theirs = {}
    for name, tensor in ours.items():
        theirs[name if name == OUTPUT else PREFIX + name] = tensor

    def write_weights(path: Path) -> None:
        save_file(theirs, path, {"format": "pt", "sha256": checksum(ours)})
        sort_head(path)

    def write_json(name: str, value: dict[str, Any]) -> None:
        text = json.dumps(value, indent=1)
        write_whole(folder / name, lambda path: path.write_text(text, encoding="utf-8"))

    write_json("config.json", keys)
    write_whole(folder / WEIGHTS, write_weights)
    # An older index would send some programs to its shards.
    if (folder / INDEX).exists():
        write_json(INDEX, {"metadata": {}, "weight_map": dict.fromkeys(theirs, WEIGHTS)})
    if source is not None:
        for name in COMPANIONS:
            companion = source / name
            if companion.is_file():
                write_whole(folder / name, lambda path: shutil.copyfile(companion, path))


def write_adapters(
    folder: Path,
    weights: dict[str, Tensor],
    rank: int,
    alpha: float,
    write_whole: Callable[[Path, Callable[[Path], Any]], None],
    source: Path | None = None,
) -> None:
    """Write adapters alone, as `peft` writes and reads them. For `write_whole` see `write_folder`.

    weights: by names such as layers.0.self_attn.q_proj.lora_A.weight, (rank, in) and (out, rank).
    """
    theirs = {}
    for name, tensor in weights.items():
        theirs["base_model.model." + PREFIX + name] = tensor.detach().float().cpu().contiguous()
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(source or ""),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.split(".")[-3] for name in weights}),
        "inference_mode": True,
    }
    text = json.dumps(about, indent=1)

    def write_weights(path: Path) -> None:
        save_file(theirs, path, {"format": "pt"})
        sort_head(path)

    write_whole(folder / ADAPTER_CONFIG, lambda path: path.write_text(text, encoding="utf-8"))
    write_whole(folder / ADAPTER_WEIGHTS, write_weights)


def sort_head(path: Path) -> None:
    """Sort what stands at the head of a weight file, so that the same weights are the same bytes.

    The library writes its metadata in a random order.
    """
    with path.open("r+b") as file:
        # The file begins with the length of the head, in 8 bytes, and the head itself, in JSON.
        length = int.from_bytes(file.read(8), "little")
        head = json.loads(file.read(length))
        text = json.dumps(head, sort_keys=True, separators=(",", ":"))
        file.seek(8)
        file.write(text.encode().ljust(length))


def keys_to_write(fields: dict[str, Any], source: Path | None) -> dict[str, Any]:
    """The keys of config.json: those of the source, with what our fields say differently."""
    ours = own_keys(fields)
    if source is None:
        return ours
    try:
        theirs = read_json(source / "config.json")
        said = own_keys(read_architecture(source))
    except (OSError, ValueError):
        # The folder was moved or changed since it was read, and our fields still say all we need.
        return ours
    for key in said | ours:
        if key not in ours:
            theirs.pop(key, None)
        elif ours[key] != said.get(key):
            theirs[key] = ours[key]
    theirs.pop("torch_dtype", None)
    theirs["dtype"] = ours["dtype"]
    return theirs


def own_keys(fields: dict[str, Any]) -> dict[str, Any]:
    """Translate the fields of an architecture into the keys of config.json."""
    family = fields["family"]
    # The architecture is the name of a class in transformers, for example Qwen2ForCausalLM.
    keys = {"model_type": family, "architectures": [family.capitalize() + "ForCausalLM"]}
    for field, key in KEYS.items():
        keys[key] = fields[field]
    # What lies behind the vocabulary is no token of the model, and transformers would look it up.
    for field in ("pad_id", "mask_id"):
        if fields[field] >= fields["vocab"]:
            del keys[KEYS[field]]
    others = [int(end) for end in fields["other_ends"].split()]
    if others:
        keys["eos_token_id"] = [fields["eos_id"], *others]
    keys["dtype"] = "float32"

    if fields["rope_scaling"]:
        numbers = map(float, fields["rope_scaling"].split())
        scaling = dict(zip(LLAMA3_KEYS, numbers, strict=True))
        keys["rope_scaling"] = {"rope_type": "llama3"} | scaling
    return keys
