"""transformers' door: `from_release("org/model", device="cuda:0")` gives what `from_pretrained` gives, from proven bytes only.

    from modelp2p.loader.transformers import from_release
    model = from_release("org/model", AutoModelForCausalLM, device="cuda:0", dtype=torch.bfloat16)

What is promised:
- the class and its sizes come from the release's `config.json`, whose bytes are proven before they are parsed. Nothing in it may
  name code to run: remote classes and attention kernels from a hub are dropped from it, and ways of quantization for which
  transformers takes kernels from a hub are refused. Files are looked up on no hub (`local_files_only`). transformers has no
  stronger switch than `HF_HUB_OFFLINE`, which counts for the whole process and is the user's to set;
- names, tied weights, buffers that no checkpoint holds and fused tensors are transformers' own work, so they are right where
  `from_pretrained` is right. What is missing or left over is an error, before a weight is read;
- parameters are private memory that may be written to, made once and filled in place by `OpenRelease.into`: no second copy, on
  the host or on the GPU, also where they are cast.

How: transformers is first given stand-ins (`standins`) of the right shapes and dtypes, as if they were the checkpoint. Where each
ends up in the finished model says which parameter a stored tensor is. It is then replaced by memory on the device, and filled. A
stored tensor whose stand-in did not survive (it was merged with others, cast to another dtype than the model's, or is one of two
stored ends of a tie) is loaded, and given to transformers for what it is, by way of the host.

`device_map=` of transformers is not used: it wants another package, and reserves the model's size a second time on the GPU.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from modelp2p.loader.arriving import DEFAULT_TIMEOUT_S
from modelp2p.loader.checkpoint import open_checkpoint
from modelp2p.loader.standins import StandIns
from modelp2p.protocol.errors import FormatError, ModelP2PError, UsageError
from modelp2p.protocol.text import some_of

if TYPE_CHECKING:
    from modelp2p.loader.delivery import Progress
    from modelp2p.loader.release import OpenRelease

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
NOT_THE_RELEASE_S_TO_SAY = frozenset({"auto_map", "attn_implementation", "experts_implementation", "transformers_weights"})
"""Keys by which a configuration can have code fetched from a hub, or a file read that nobody proved."""
QUANTIZATION = "quantization_config"
QUANTIZED_WITHOUT_A_HUB = frozenset({"bitsandbytes", "compressed-tensors", "hqq", "quanto", "torchao"})
"""Methods for which transformers 5.23 has no code that asks a hub (its `quantizers/` and `integrations/`). It has for mxfp4, fp8,
fbgemm_fp8, eetq, nvfp4, gguf and metal. Others, as gptq, it leaves to packages that nobody has read for this."""
MAX_DEPTH = 32
"""Of objects and lists in a configuration; sub-configurations of sub-configurations take six."""


def from_release(
    ref: str | os.PathLike[str],
    model_class: Any = None,  # noqa: ANN401 - a class of transformers, which has its own types
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    config: Any = None,  # noqa: ANN401
    strict: bool = True,
    views: bool = False,
    files: str | Sequence[str] | None = None,
    verify: str = "auto",
    publisher: str | None = None,
    home: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    reader: str = "auto",
    progress: Progress | None = None,
    timeout: float = DEFAULT_TIMEOUT_S,
) -> Any:  # noqa: ANN401
    """A transformers model with the weights of a release, in evaluation mode.

    Args:
        ref: a name, link, bundle or folder (see `locate`).
        model_class: a model class of transformers, or one of its `AutoModel...`; the class the release was saved from by default.
        device: `cpu`, `cuda` or `cuda:N`.
        dtype: of floating-point parameters; by default the configuration's, else that of the first stored one.
        config: a configuration to take in place of the release's.
        strict: refuse where the model has parameters the release has not, or the other way. Otherwise transformers makes up the
            former and leaves out the latter.
        views: on the host, parameters that show the store's files instead of copies: nothing is copied, and a write to one, as
            in training, ends the process (SIGSEGV).
        files: globs of weight files; those of the root folder by default.
        verify: as for `open_release`, like all that follow.
        publisher: who must have signed.
        home: the modelp2p home.
        workers: threads that read and hash.
        reader: how copies are read.
        progress: called with bytes done and in all.
        timeout: seconds without a newly proven piece.

    Raises:
        UsageError: the model does not fit the release, or transformers cannot make it.
        FormatError: a configuration is nonsense.
        NotFoundError, UntrustedError, IntegrityError: see `open_release`.
    """
    if views and torch.device(device).type != "cpu":
        raise UsageError("views=True is for the cpu", hint="On a GPU, parameters are memory of the GPU.")
    with open_checkpoint(
        ref,
        device,
        files=files,
        publisher=publisher,
        home=home,
        verify=verify,
        mapping="mmap" if views else "auto",
        workers=workers,
        reader=reader,
        timeout=timeout,
    ) as release:
        return model_of(release, model_class, dtype=dtype, config=config, strict=strict, views=views, progress=progress)


def model_of(
    release: OpenRelease,
    model_class: Any = None,  # noqa: ANN401
    *,
    dtype: torch.dtype | None = None,
    config: Any = None,  # noqa: ANN401
    strict: bool = True,
    views: bool = False,
    progress: Progress | None = None,
) -> Any:  # noqa: ANN401
    """As `from_release`, of an open release and on its device. `views` wants one that gives views: see `OpenRelease`."""
    if config is None:
        config = config_of(release)
    model_class, config = _resolved(model_class, config)
    names = release.keys()
    given = dtype or _dtype(getattr(config, "dtype", None)) or _first_floating(release.dtype(name) for name in names)
    real = frozenset(names) if views else frozenset[str]()
    while True:
        shapes = {name: (release.shape(name), _becomes(release.dtype(name), given)) for name in names if name not in real}
        standing = StandIns(shapes)
        tensors = release.load(progress=progress) if views else _copies(release, sorted(real))
        model = _built(release, model_class, config, given, tensors | standing.tensors, strict=strict)
        del tensors
        found = standing.found_in(model)
        lost = standing.tensors.keys() - found.keys()
        if not lost:
            break
        # transformers ties what is stored twice only where both ends are equal, so both have to be what they are.
        tied = _tied(model)
        real |= lost | {name for name, tensor in found.items() if id(tensor) in tied}
    device = torch.device(release.stats.device)
    for tensor in found.values():
        tensor.data = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    model.to(device)
    if found:
        release.into({name: tensor.detach() for name, tensor in found.items()}, list(found), progress)
    model.config.name_or_path = release.name
    return model


def _copies(release: OpenRelease, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Tensors of the release in memory that may be written to, however the release was opened."""
    device = torch.device(release.stats.device)
    tensors = {name: torch.empty(release.shape(name), dtype=release.dtype(name), device=device) for name in names}
    if tensors:
        release.into(tensors, names)
    return tensors


def config_of(release: OpenRelease) -> Any:  # noqa: ANN401
    """The release's own configuration, its bytes proven.

    Raises:
        UsageError: there is none, or transformers has no class for it without running code of the release, or its weights are
            quantized in a way that takes code from a hub.
        FormatError: it is not JSON, or nothing that transformers takes.
        IntegrityError: it is not what was signed.
    """
    found = _document(release, CONFIG)
    if found is None:
        raise UsageError(f"{release.name} has no {CONFIG}", hint="Give the configuration yourself: config=.")
    kind = found.get("model_type")
    known = import_module("transformers").CONFIG_MAPPING
    if not isinstance(kind, str) or kind not in known:
        hint = "A class that a release brings along as code is never run. Give a configuration of your own: config=."
        raise UsageError(f"transformers has no model of type '{str(kind)[:100]}'", hint=hint)
    harmless = _harmless(found, MAX_DEPTH)
    with _translated(f"transformers does not take '{CONFIG}' of {release.name}", FormatError, CONFIG):
        return known[kind].from_dict(harmless)


def _document(release: OpenRelease, path: str) -> dict[str, Any] | None:
    data = release.document(path)
    if data is None:
        return None
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise FormatError(f"'{path}' is not JSON", path=path) from exc
    if not isinstance(found, dict):
        raise FormatError(f"'{path}' is no object of keys and values", path=path)
    return found


def _harmless(value: Any, depth: int) -> Any:  # noqa: ANN401
    """A configuration without the keys that are not the release's to say, in its sub-configurations as well.

    Raises:
        FormatError: it is deeper than any, which transformers would meet with a RecursionError.
        UsageError: quantization would take code from a hub.
    """
    if not isinstance(value, dict | list):
        return value
    if depth == 0:
        raise FormatError(f"'{CONFIG}' is deeper than {MAX_DEPTH} levels", path=CONFIG)
    if isinstance(value, list):
        return [_harmless(item, depth - 1) for item in value]
    if value.get(QUANTIZATION) is not None:
        _check_quantization(value[QUANTIZATION])
    return {key: _harmless(item, depth - 1) for key, item in value.items() if _bare(key) not in NOT_THE_RELEASE_S_TO_SAY}


def _bare(key: str) -> str:
    """A key as a configuration's class would have it: some take it with an underscore, or as they keep it inside, as well."""
    return key.lstrip("_").removesuffix("_internal")


def _check_quantization(value: Any) -> None:  # noqa: ANN401
    """Return if transformers needs no hub for weights that are quantized like this."""
    if not isinstance(value, dict):
        raise FormatError(f"'{CONFIG}': {QUANTIZATION} is no object of keys and values", path=CONFIG)
    is_bitsandbytes = bool(value.get("load_in_8bit") or value.get("load_in_4bit"))
    method = "bitsandbytes" if is_bitsandbytes else value.get("quant_method")
    if not isinstance(method, str) or method not in QUANTIZED_WITHOUT_A_HUB:
        hint = "If you want that, give the configuration yourself: config=."
        raise UsageError(f"'{CONFIG}': quantization by '{str(method)[:100]}' may take code from a hub", hint=hint)


@contextmanager
def _translated(what: str, kind: type[ModelP2PError], path: str) -> Iterator[None]:
    """Errors of transformers as one of ours. Of whatever class: a stranger's configuration brings out any (ZeroDivisionError)."""
    try:
        yield
    except (ModelP2PError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as exc:
        raise kind(f"{what}: {type(exc).__name__}: {str(exc)[:400]}", path=path) from exc


def _resolved(model_class: Any, config: Any) -> tuple[Any, Any]:  # noqa: ANN401
    """The model class that is meant, and the configuration that is its: of an automatic class, what that would choose.

    Raises:
        UsageError: there is no such class, or it is not for this configuration.
    """
    transformers = import_module("transformers")
    if model_class is None:
        return _saved_from(config), config
    if isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel):
        return model_class, config
    what = f"{model_class.__name__} has no class for {type(config).__name__}, or '{CONFIG}' does not suit it"
    with _translated(what, UsageError, CONFIG), torch.device("meta"):
        # The public way to ask; `from_pretrained` of the automatic classes takes no tensors.
        chosen = model_class.from_config(config)
    return type(chosen), chosen.config


def _saved_from(config: Any) -> Any:  # noqa: ANN401
    """The class of transformers that the configuration was saved from."""
    transformers = import_module("transformers")
    said = config.architectures
    names = [str(name) for name in said] if isinstance(said, list | tuple) else []
    found = getattr(transformers, names[0], None) if names else None
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    if found is None or not is_model or found.config_class is not type(config):
        named = f"names {names[0][:100]}, which is no model of transformers for it" if names else "names no class"
        raise UsageError(f"the configuration {named}", hint="Say which: from_release(ref, AutoModel).")
    return found


def _built(
    release: OpenRelease,
    model_class: Any,  # noqa: ANN401
    config: Any,  # noqa: ANN401
    dtype: torch.dtype,
    tensors: Mapping[str, torch.Tensor],
    *,
    strict: bool,
) -> Any:  # noqa: ANN401
    """What transformers makes of a checkpoint of these tensors.

    Raises:
        UsageError: it does not fit.
    """
    document, generation = _document(release, GENERATION_CONFIG), None
    if document is not None:
        with _translated(f"transformers does not take '{GENERATION_CONFIG}' of {release.name}", FormatError, GENERATION_CONFIG):
            generation = import_module("transformers").GenerationConfig.from_dict(document)
    with _translated(f"transformers makes no {model_class.__name__} of '{CONFIG}' of {release.name}", UsageError, CONFIG):
        model, found = model_class.from_pretrained(
            None,
            config=config,
            state_dict=dict(tensors),
            dtype=dtype,
            generation_config=generation,
            ignore_mismatched_sizes=True,  # told below, all of them, in words of our own
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    wrong = [f"{name} {tuple(expected)}, stored {tuple(stored)}" for name, stored, expected in sorted(found["mismatched_keys"])]
    _refuse("shapes differ", wrong, "Is it the right configuration?")
    if strict:
        hint = "Choose another class, or load what fits with strict=False."
        _refuse("the release has nothing for", sorted(found["missing_keys"]), hint)
        _refuse("the model has no place for", sorted(found["unexpected_keys"]), hint)
    return model


def _tied(model: Any) -> set[int]:  # noqa: ANN401
    """The parameters that a model shares between places, by identity."""
    return {id(model.get_parameter(name)) for pair in model.all_tied_weights_keys.items() for name in pair}


def _becomes(stored: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """What transformers makes of most tensors: it casts floating point, and leaves codes of quantized weights alone."""
    return dtype if stored.is_floating_point and stored.itemsize > 1 else stored


def _dtype(value: Any) -> torch.dtype | None:  # noqa: ANN401
    """A configuration's dtype: a name, or a dtype already."""
    found = getattr(torch, value, None) if isinstance(value, str) else value
    return found if isinstance(found, torch.dtype) else None


def _first_floating(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    return next((dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1), torch.get_default_dtype())


def _refuse(what: str, names: Sequence[str], hint: str) -> None:
    if names:
        raise UsageError(f"{what}: {some_of(names)}", hint=hint)
