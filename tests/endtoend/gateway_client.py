"""What programs of users do with HF_ENDPOINT set: a script of its own, for any interpreter that has huggingface_hub.

`python gateway_client.py '[["snapshot", "org/model"], ["listing", "org/model"]]'` prints a list with one result for each command;
an exception is the result `{"error": class, "said": text}`. It imports nothing of this project.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")


def snapshot(name: str, revision: str | None = None) -> dict[str, str]:
    """Download a model; the digest of each file, as it lies in the cache."""
    from huggingface_hub import snapshot_download

    root = Path(snapshot_download(name, revision=revision))
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def file(name: str, path: str, revision: str | None = None) -> str:
    """Download one file; its digest."""
    from huggingface_hub import hf_hub_download

    return hashlib.sha256(Path(hf_hub_download(name, path, revision=revision)).read_bytes()).hexdigest()


def listing(name: str) -> list[Any]:
    """What the file system interface shows, from the root and from a folder."""
    from huggingface_hub import HfFileSystem

    rows: list[Any] = [*HfFileSystem().ls(name), *HfFileSystem().ls(f"{name}/extra")]
    return [[row["name"], row["type"], row["size"]] for row in rows]


def part(name: str, path: str, begin: int, end: int) -> str:
    """Bytes of a file in hex, by the file system interface: a range request."""
    from huggingface_hub import HfFileSystem

    with HfFileSystem().open(f"{name}/{path}", "rb") as opened:
        opened.seek(begin)
        return bytes(opened.read(end - begin)).hex()


def metadata(name: str) -> list[str]:
    """The names of all tensors, without downloading them."""
    from huggingface_hub import get_safetensors_metadata

    found = get_safetensors_metadata(name)
    return sorted(tensor for item in found.files_metadata.values() for tensor in item.tensors)


def upload(name: str) -> str:
    """Try to upload a file."""
    from huggingface_hub import HfApi

    return str(HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=name))


def make(folder: str) -> dict[str, Any]:
    """Save a tiny model with random weights and its tokenizer; what `use` must give."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(11)
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    model = BertModel(config)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "stars": 1, "are": 2, "far": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(folder)
    return _made(model, tokenizer)


def use(name: str) -> dict[str, Any]:
    """Load a model and its tokenizer by name."""
    from transformers import AutoModel, AutoTokenizer

    return _made(AutoModel.from_pretrained(name), AutoTokenizer.from_pretrained(name))


def _made(model: Any, tokenizer: Any) -> dict[str, Any]:  # noqa: ANN401  # torch is not imported where types are checked
    state = model.state_dict()
    tensors = {key: hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest() for key, value in sorted(state.items())}
    return {"tensors": tensors, "tokens": tokenizer("stars are far away")["input_ids"]}


COMMANDS = {item.__name__: item for item in (snapshot, file, listing, part, metadata, upload, make, use)}


def main() -> None:
    """Run the commands of the first argument."""
    results: list[Any] = []
    for verb, *arguments in json.loads(sys.argv[1]):
        try:
            results.append(COMMANDS[verb](*arguments))
        except Exception as exc:
            results.append({"error": type(exc).__name__, "said": str(exc)})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
