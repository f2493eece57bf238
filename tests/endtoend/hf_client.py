"""What programs of users do with huggingface_hub and transformers: a script of its own, for any interpreter that has them.

`python hf_client.py '[["snapshot", "org/model"], ["scan"]]'` prints a list with one result for each command; an exception's class
name is a result, too. It imports nothing of this project.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from typing import Any

warnings.filterwarnings("ignore")


def snapshot(name: str, revision: str | None = None) -> str:
    """The folder of a model that is in the cache."""
    from huggingface_hub import snapshot_download

    return str(snapshot_download(name, revision=revision, local_files_only=True))


def download(name: str, endpoint: str, cache: str) -> str:
    """Download a model into a cache."""
    from huggingface_hub import snapshot_download

    return str(snapshot_download(name, endpoint=endpoint, cache_dir=cache))


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


def make(folder: str) -> dict[str, str]:
    """Save a tiny model with random weights; its tensors."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(7)
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
    return _digests(model)


def load(name: str) -> dict[str, str]:
    """The tensors of a model that is loaded by name."""
    from transformers import AutoModel

    return _digests(AutoModel.from_pretrained(name))


def _digests(model: Any) -> dict[str, str]:  # noqa: ANN401  # torch is not imported where types are checked
    state = model.state_dict()
    return {key: hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest() for key, value in sorted(state.items())}


COMMANDS = {item.__name__: item for item in (snapshot, download, scan, remove, verify, make, load)}


def main() -> None:
    """Run the commands of the first argument."""
    results: list[Any] = []
    for verb, *arguments in json.loads(sys.argv[1]):
        try:
            results.append(COMMANDS[verb](*arguments))
        except Exception as exc:
            results.append(type(exc).__name__)
            print(f"{verb}: {exc}", file=sys.stderr)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
