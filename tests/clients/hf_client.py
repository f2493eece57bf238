"""What programs of users do with huggingface_hub and transformers: a script of its own, for any interpreter that has them.

Each line on stdin is a command, such as `["snapshot", "org/model"]`; its answer is a line on stdout: the result, or for an
exception `{"error": class, "said": text}`. It imports nothing of this project.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

_made: dict[str, Any] = {}
"""The tensors of what `make` saved, by folder."""


def snapshot(name: str, revision: str | None = None) -> dict[str, str]:
    """Download a model; the digest of each file, as it lies in the cache."""
    from huggingface_hub import snapshot_download

    root = Path(snapshot_download(name, revision=revision))
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def cached(name: str, revision: str | None = None) -> str:
    """The folder of a model that is in the cache."""
    from huggingface_hub import snapshot_download

    return str(snapshot_download(name, revision=revision, local_files_only=True))


def download(name: str, endpoint: str, cache: str) -> str:
    """Download a model from somewhere else into another cache."""
    from huggingface_hub import snapshot_download

    return str(snapshot_download(name, endpoint=endpoint, cache_dir=cache))


def file(name: str, path: str, revision: str | None = None) -> str:
    """Download one file; its digest."""
    from huggingface_hub import hf_hub_download

    return hashlib.sha256(Path(hf_hub_download(name, path, revision=revision)).read_bytes()).hexdigest()


def size(name: str, path: str) -> int | None:
    """How large a file is by what a HEAD says; None where it does not say."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    return get_hf_file_metadata(hf_hub_url(name, path)).size


def listing(name: str) -> list[Any]:
    """What the file system interface shows, from the root and from a folder."""
    from huggingface_hub import HfFileSystem

    rows: list[Any] = [*HfFileSystem().ls(name), *HfFileSystem().ls(f"{name}/extra")]
    return [[row["name"], row["type"], row["size"]] for row in rows]


def part(name: str, path: str, begin: int, end: int) -> str:
    """Bytes of a file in hex, by the file system interface: a range request."""
    from huggingface_hub import HfFileSystem

    with HfFileSystem().open(f"{name}/{path}", "rb", block_size=1 << 20) as opened:
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


def scan() -> dict[str, Any]:
    """What is in the cache, by `hf cache ls`."""
    from huggingface_hub import scan_cache_dir

    found = scan_cache_dir()
    revisions = [
        [repo.repo_id, item.commit_hash, sorted(item.refs), item.nb_files] for repo in found.repos for item in repo.revisions
    ]
    return {"revisions": sorted(revisions), "warnings": [str(warning) for warning in found.warnings]}


def remove(commit: str) -> int:
    """Delete a revision from the cache, as `hf cache rm` does."""
    from huggingface_hub import scan_cache_dir

    strategy = scan_cache_dir().delete_revisions(commit)
    strategy.execute()
    return strategy.expected_freed_size


def verify(name: str, endpoint: str) -> dict[str, Any]:
    """Compare the cache with the digests of the Hub, as `hf cache verify` does."""
    from huggingface_hub import HfApi

    found = HfApi(endpoint=endpoint).verify_repo_checksums(name)
    return {
        "checked": found.checked_count,
        "wrong": found.mismatches,
        "missing": found.missing_paths,
        "extra": found.extra_paths,
    }


def make(family: str, folder: str) -> dict[str, Any]:
    """Save a tiny model of this family with random weights; what `compare` must give."""
    import torch

    torch.manual_seed(11)
    model = _model_of(family)
    model.save_pretrained(folder)
    _made[folder] = state = model.state_dict()
    return {"class": type(model).__name__, "dtypes": _dtypes(state), "different": []}


def compare(folder: str, name: str) -> dict[str, Any]:
    """Load by name what `make` saved in a folder; class and tensors of it, and those that are not equal bit by bit."""
    import torch
    import transformers

    (architecture,) = transformers.AutoConfig.from_pretrained(name).architectures or []
    model = getattr(transformers, architecture).from_pretrained(name)
    state, saved = model.state_dict(), _made[folder]
    different = [key for key, value in state.items() if key not in saved or not torch.equal(value, saved[key])]
    return {"class": type(model).__name__, "dtypes": _dtypes(state), "different": different}


def make_tokenizer(folder: str) -> list[int]:
    """Save a tokenizer; what it makes of a sentence."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "stars": 1, "are": 2, "far": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(folder)
    return _tokens(tokenizer)


def tokens(name: str) -> list[int]:
    """What a tokenizer that is loaded by name makes of the sentence."""
    from transformers import AutoTokenizer

    return _tokens(AutoTokenizer.from_pretrained(name))


def _model_of(family: str) -> Any:  # noqa: ANN401  # torch is not imported where types are checked
    import transformers as t

    match family:
        case "gpt2":
            gpt2 = t.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=16)
            # Half of today's models are in this type, and the output shares the tensor of the embeddings.
            return t.GPT2LMHeadModel(gpt2).bfloat16()
        case "bert":
            bert = t.BertConfig(
                vocab_size=64,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                max_position_embeddings=16,
            )
            return t.BertModel(bert).half()  # type: ignore[no-untyped-call]
        case "xlnet":
            # transformers 5.23 loads half of this one's tensors in float32, whatever type they were saved in.
            return t.XLNetModel(t.XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=2, d_inner=64))
        case "resnet":
            # Counts its batches in integers.
            return t.ResNetModel(t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"))
        case _:
            raise ValueError(family)


def _dtypes(state: Any) -> dict[str, str]:  # noqa: ANN401  # torch is not imported where types are checked
    return {key: str(value.dtype) for key, value in sorted(state.items())}


def _tokens(tokenizer: Any) -> list[int]:  # noqa: ANN401  # transformers is not imported where types are checked
    return [int(token) for token in tokenizer("stars are far away")["input_ids"]]


COMMANDS = {
    item.__name__: item
    for item in (
        snapshot,
        cached,
        download,
        file,
        size,
        listing,
        part,
        metadata,
        upload,
        scan,
        remove,
        verify,
        make,
        compare,
        make_tokenizer,
        tokens,
    )
}


def main() -> None:
    """Do what stdin says."""
    # What libraries print is talk.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        verb, *arguments = json.loads(line)
        try:
            result: Any = COMMANDS[verb](*arguments)
        except Exception as exc:
            result = {"error": type(exc).__name__, "said": str(exc)}
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main()
