"""What a release file is, judged by its name, and whether its first bytes agree.

Owns the default policy's notion of "executes code": pickles and programs are refused unless the user allows code
(docs/DESIGN.md). The publisher's own `kind` is a label only; every node judges again by name and by the bytes it has proven.
"""

from __future__ import annotations

from enum import Enum

from modelp2p.protocol.safetensors import MAX_HEADER_BYTES

HEAD_BYTES = 8
"""How many leading bytes of a file `contradiction` wants to see."""


class FileKind(Enum):
    """The label a manifest carries for a file."""

    WEIGHTS = "weights"
    CONFIG = "config"
    TOKENIZER = "tokenizer"
    TEXT = "text"
    PICKLE = "pickle"
    CODE = "code"
    OTHER = "other"

    @property
    def executes_code(self) -> bool:
        """Whether merely opening such a file the usual way runs what its author wrote."""
        return self in (FileKind.PICKLE, FileKind.CODE)


_BY_SUFFIX = {
    FileKind.WEIGHTS: (".safetensors", ".gguf"),
    FileKind.PICKLE: (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".h5", ".keras", ".joblib", ".msgpack"),
    FileKind.CODE: (".py", ".pyc", ".so", ".sh", ".ipynb", ".js", ".exe", ".dll", ".dylib", ".whl", ".jar"),
    FileKind.CONFIG: (".json", ".yaml", ".yml", ".toml", ".jinja"),
    FileKind.TEXT: (".md", ".txt", ".rst", ".csv", ".tsv"),
    FileKind.TOKENIZER: (".model", ".tiktoken", ".spm"),
}
_PICKLE_MAGIC = tuple(bytes((0x80, version)) for version in range(2, 6))
_ZIP_MAGIC = b"PK\x03\x04"
_ELF_MAGIC = b"\x7fELF"
_HDF5_MAGIC = b"\x89HDF"
_GGUF_MAGIC = b"GGUF"


def kind_of(path: str) -> FileKind:
    """The kind a file's name promises; unknown suffixes are `OTHER`."""
    name = path.rsplit("/", 1)[-1].lower()
    promised = _suffix_kind(name)
    if promised.executes_code:
        # Comes first: `tokenizer.pt` is a pickle, whatever else its name says.
        return promised
    if name.startswith("tokenizer") or name in ("vocab.txt", "vocab.json", "merges.txt", "special_tokens_map.json"):
        return FileKind.TOKENIZER
    if name.startswith(("license", "licence", "notice", "readme")) and "." not in name:
        return FileKind.TEXT
    return promised


def contradiction(path: str, head: bytes) -> str:
    """Why the first bytes of a file belie its name; empty where they agree.

    Args:
        path: the file's path in the release.
        head: its first `HEAD_BYTES` bytes, or all of a shorter file. Proven bytes only.
    """
    kind = kind_of(path)
    if kind.executes_code:
        return ""
    if head.startswith(_PICKLE_MAGIC) and not path.lower().endswith(".safetensors"):
        return "it begins like a Python pickle"
    if head.startswith(_ZIP_MAGIC):
        return "it begins like a zip archive (PyTorch pickles are such archives)"
    if head.startswith(_ELF_MAGIC):
        return "it begins like a program"
    if head.startswith(_HDF5_MAGIC):
        return "it begins like an HDF5 file"
    if path.lower().endswith(".gguf") and head and not head.startswith(_GGUF_MAGIC):
        return "it does not begin like a GGUF file"
    if path.lower().endswith(".safetensors") and len(head) == HEAD_BYTES and int.from_bytes(head, "little") > MAX_HEADER_BYTES:
        return "it does not begin like a safetensors file"
    return ""


def _suffix_kind(name: str) -> FileKind:
    for kind, suffixes in _BY_SUFFIX.items():
        if name.endswith(suffixes):
            return kind
    return FileKind.OTHER
