"""vLLM's door: `vllm serve FOLDER --load-format=modelp2p` fills the model with proven tensors of a release.

vLLM finds `register` through the entry point `vllm.general_plugins` and calls it in each of its processes, before any of them
touches CUDA; so this module imports neither vllm nor torch until then. `FOLDER` is a release's folder (or one with a bundle):
vLLM reads config and tokenizer from it by itself. Before a weight is loaded, every file there that is signed and holds no tensors
is compared with what was signed, and one that vLLM may read and nobody signed is refused. `verify="off"` compares nothing.

`--model-loader-extra-config` takes a JSON object:
- `ref`: the release, where `FOLDER` is not it: a name, link, bundle or folder (see `locate`);
- `publisher`, `home`, `files`, `verify`, `mapping`, `reader`, `workers`, `timeout`: as for `open_release`;
- `device`: where tensors are made, where that is not the device of the model's parameters.

Read for this: what vLLM's documentation shows of its sources at 0.9.2, 0.11.2, 0.12.0, 0.15.0, 0.28.0, 0.31.0 and 0.32.0, and a
later development state (`model_loader/__init__.py`, `base_loader.py`, `default_loader.py`, `config/load.py` and
`plugins/__init__.py` below https://github.com/vllm-project/vllm/tree/main/vllm). 0.11.2 has `register_model_loader`, 0.9.0 has
not; since then a loader is a `BaseModelLoader` with `download_model` and `load_weights`, and the base's `load_model` makes the
model on its device, calls `load_weights`, and then lets quantization and attention process the weights. It has not been run
inside vLLM.

What follows from how vLLM does it:
- each rank of tensor parallelism asks for whole tensors and narrows them itself, so each rank reads and proves all of them;
- `load_weights` of a model may change what it is given, so on the CPU it is given copies, not read-only views;
- the names a model says it has loaded are held against its parameters, as the default loader does, because a parameter
  that nobody filled is a random one.

Not done: `download_dir`, `ignore_patterns` and `use_tqdm_on_load` mean nothing here; nothing is downloaded. Refused: models that
take weights of a second repository, and bitsandbytes, which has a loader of its own.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelp2p.protocol.errors import UsageError
from modelp2p.protocol.kinds import FileKind, kind_of
from modelp2p.protocol.text import some_of

if TYPE_CHECKING:
    import torch

    from modelp2p.loader.release import OpenRelease
    from modelp2p.protocol.manifest import FileEntry
    from modelp2p.protocol.statement import Release

LOAD_FORMAT = "modelp2p"
OPTIONS: dict[str, type | tuple[type, ...]] = {
    "ref": str,
    "publisher": str,
    "home": str,
    "files": (str, list),
    "verify": str,
    "mapping": str,
    "reader": str,
    "workers": int,
    "timeout": (int, float),
    "device": str,
}
"""Keys of the extra configuration, and what their values are."""

_log = logging.getLogger("modelp2p.loader")


@cache
def register() -> None:
    """Make `--load-format=modelp2p` known to this process's vLLM. Further calls do nothing."""
    registry = import_module("vllm.model_executor.model_loader")
    registry.register_model_loader(LOAD_FORMAT)(_loader_class())


def options_of(extra: object) -> dict[str, Any]:
    """The extra configuration, checked.

    Raises:
        UsageError: a key is unknown or a value has the wrong type.
    """
    if not isinstance(extra, Mapping):
        raise UsageError(f"model_loader_extra_config is an object of keys and values, not a {type(extra).__name__}")
    for key, value in extra.items():
        if key not in OPTIONS:
            nearest = difflib.get_close_matches(str(key), OPTIONS, n=1, cutoff=0.0)[0]
            raise UsageError(f"model_loader_extra_config has no key {key}", hint=f"Did you mean {nearest}?", nearest=nearest)
        # JSON's true is an int to Python, and means nothing here.
        is_right = isinstance(value, OPTIONS[key]) and not isinstance(value, bool)
        if not is_right or (isinstance(value, list) and not all(isinstance(item, str) for item in value)):
            raise UsageError(f"model_loader_extra_config: {key} is {value!r}, of the wrong type")
    return dict(extra)


def ref_of(model: str, revision: str | None, options: Mapping[str, Any]) -> str | Path:
    """Which release is meant: `ref` if given, else vLLM's `--model`, a folder before a name, with its `--revision`."""
    if "ref" in options:
        return str(options["ref"])
    if os.path.isdir(model):
        return Path(model)
    is_bare = revision is not None and "@" not in model and ":" not in model
    return f"{model}@{revision}" if is_bare else model


def device_of(model: torch.nn.Module, fallback: str | None) -> torch.device:
    """Where the model's parameters are: on an accelerator if one of them is, since those on the host may be offloaded ones.

    Args:
        model: vLLM's.
        fallback: for models whose parameters are all still on the meta device.

    Raises:
        UsageError: there is nothing to tell by.
    """
    import torch

    found = list(dict.fromkeys(parameter.device for parameter in model.parameters() if not parameter.is_meta))
    if not found and fallback is not None:
        found = [torch.device(fallback)]
    if not found:
        hint = 'Say where: --model-loader-extra-config \'{"device": "cuda"}\''
        raise UsageError("the model has no parameter that is on a device yet", hint=hint)
    return next((device for device in found if device.type != "cpu"), found[0])


def _loader_class() -> type:
    base = import_module("vllm.model_executor.model_loader.base_loader").BaseModelLoader

    class ReleaseModelLoader(base):  # type: ignore[misc, valid-type]  # vllm is not installed where types are checked
        """Verified weights of a modelp2p release. What vLLM calls, and when: see its `BaseModelLoader`."""

        def __init__(self, load_config: Any) -> None:  # noqa: ANN401 - vLLM's own values, here and below
            super().__init__(load_config)
            self._options = options_of(load_config.model_loader_extra_config)

        def download_model(self, model_config: Any) -> None:  # noqa: ANN401
            """Return if the release is here or on its way; fetching is the daemon's work."""
            _open(model_config, self._options, "cpu", None).close()

        def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:  # noqa: ANN401
            """Fill the model; nothing reaches it before it is proven."""
            fill(model, model_config, self._options, self.load_config.device)

    return ReleaseModelLoader


def fill(model: Any, model_config: Any, options: Mapping[str, Any], default_device: str | None) -> None:  # noqa: ANN401
    """Give a vLLM model the tensors of the release it is to serve.

    Args:
        model: vLLM's, with `load_weights`.
        model_config: vLLM's: `model`, `revision` and `quantization` are read.
        options: as `options_of` gives them.
        default_device: of `load_config`, for a model that is not on a device yet.

    Raises:
        UsageError: the release does not fill the model, vLLM asks for what this loader cannot do, or its folder holds files that
            nobody signed.
        NotFoundError, UntrustedError, IntegrityError: see `open_release`; a bad tensor was not handed to the model.
    """
    if model_config.quantization == "bitsandbytes":
        raise UsageError(
            "bitsandbytes has a loader of its own", hint="Serve the release's folder with --load-format=bitsandbytes."
        )
    if sources := tuple(getattr(model, "secondary_weights", ())):
        named = ", ".join(str(getattr(source, "model_or_path", source)) for source in sources)
        raise UsageError(f"the model takes more weights than one release holds: {named}", hint="Use --load-format=auto.")
    device = options.get("device") or device_of(model, default_device)
    with _open(model_config, options, device, getattr(model, "allow_patterns_overrides", None)) as release:
        if release.stats.verify != "off" and os.path.isdir(model_config.model):
            _check_folder(release, model_config.model)
        loaded = model.load_weights(release.stream())
        _log.info("%s: %s", release.name, release.stats)
    if model_config.quantization is None and loaded is not None:
        _check_filled(model, loaded)


def _open(model_config: Any, options: Mapping[str, Any], device: str | torch.device, patterns: list[str] | None) -> OpenRelease:  # noqa: ANN401
    from modelp2p.loader.checkpoint import open_checkpoint

    rest = {key: value for key, value in options.items() if key not in ("ref", "device")}
    # A model's `load_weights` may write to a tensor it was given; into a view, that would end the process.
    rest = {"mapping": "pread", "files": patterns} | rest
    return open_checkpoint(ref_of(model_config.model, model_config.revision, options), device, **rest)


def _check_folder(release: OpenRelease, folder: str) -> None:
    """Compare what vLLM may have read from the folder with the release: all of it but tensors, which are not taken from there.

    Raises:
        IntegrityError: a file is not what was signed.
        UsageError: nobody signed it.
    """
    entries = {entry.path: entry for entry in release.release.manifest.files}
    unsigned = sorted(path for path in _files_below(folder) if path not in entries and _is_read(path))
    if unsigned:
        raise UsageError(
            f"'{folder}' holds files that nobody signed, and vLLM may have read them: {some_of(unsigned)}",
            hint="Take them away, or serve another folder.",
        )
    for path, entry in entries.items():
        if not path.endswith(".safetensors") and os.path.exists(os.path.join(folder, path)):
            _check_file(release.release, folder, entry)


def _check_file(release: Release, folder: str, entry: FileEntry) -> None:
    """Return if a file of the release that lies in another folder is what was signed; raises as `check_file`."""
    from modelp2p.loader.documents import check_file
    from modelp2p.loader.pieces import PieceTable, repair_hint
    from modelp2p.loader.source import SourceFile

    source = SourceFile(os.path.join(folder, entry.path), entry, repair_hint(release))
    check_file(source, PieceTable.in_release(release, entry))


def _files_below(folder: str) -> Iterator[str]:
    """Paths of all files in a folder, but for those in hidden folders, as `.git` and `.cache` are."""
    seen: set[str] = set()
    # A linked folder is read like any other, so it is looked into; once, since it may lead back here.
    for place, folders, names in os.walk(folder, followlinks=True):
        is_new = (real := os.path.realpath(place)) not in seen
        seen.add(real)
        folders[:] = [name for name in folders if is_new and not name.startswith(".")]
        yield from (os.path.relpath(os.path.join(place, name), folder) for name in names if is_new)


def _is_read(path: str) -> bool:
    """Whether vLLM may read such a file by itself; code, if it was told to trust it."""
    return kind_of(path) in (FileKind.CONFIG, FileKind.TOKENIZER, FileKind.CODE)


def _check_filled(model: torch.nn.Module, loaded: set[str]) -> None:
    """Return if every parameter was filled.

    Scales of a quantized key-value cache, which the default loader exempts as well, have defaults and are in few checkpoints.

    Raises:
        UsageError: the release has nothing for some.
    """
    missing = {name for name, _ in model.named_parameters()} - loaded
    for prefix, module in model.named_modules():
        if getattr(module, "quant_method", None) is not None:
            own = {f"{prefix}.{name}" if prefix else name for name, _ in module.named_parameters(recurse=False)}
            missing -= {name for name in own if name.endswith("scale")}
    if missing:
        hint = "Is it the right release? Where it holds several models, choose with the key files."
        raise UsageError(f"the release has nothing for {some_of(sorted(missing))}", hint=hint)
