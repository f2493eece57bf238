"""The vLLM door, over a stub that does what vLLM does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from safetensors.torch import save

from modelp2p.loader.vllm import LOAD_FORMAT, device_of, options_of, ref_of, register
from modelp2p.protocol.errors import IntegrityError, NotFoundError, UnknownPublisherError, UsageError
from tests.loader.models import MIB
from tests.loader.test_integrity import flip
from tests.loader.vllm_stub import LoadConfig, ModelConfig, Served, Vllm, VllmConfig, Weights, vllm
from tests.releases import Home, bundle_of, publisher, statement_of, write_files

__all__ = ["vllm"]  # the fixture


def stored() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    # `norm` comes first in the file; the matrix lies in a later piece.
    return {"norm": torch.rand(4096), "proj.weight": torch.rand(64, 512)}


def checkpoint() -> dict[str, bytes]:
    return {
        "model.safetensors": save(stored()),
        "config.json": b'{"model_type": "served"}',
        "tokenizer.json": b"{}",
        "modeling.py": b"1",
    }


@pytest.fixture
def served(own_home: Path) -> Home:
    home = Home(own_home / "modelp2p")
    home.trust()
    home.add(statement_of(checkpoint()), checkpoint())
    return home


def tree_of(home: Home) -> Path:
    (link,) = (home.path / "models" / "lab" / "model").iterdir()
    return link


def config(
    model: object,
    *,
    architecture: Callable[[], torch.nn.Module] = Served,
    extra: object = None,
    revision: str | None = None,
    quantization: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> VllmConfig:
    load = LoadConfig(LOAD_FORMAT, model_loader_extra_config={} if extra is None else extra)
    return VllmConfig(ModelConfig(str(model), architecture, revision, quantization, dtype), load)


def is_filled(model: torch.nn.Module, rank: int = 0, ranks: int = 1) -> bool:
    want = stored()
    rows = want["proj.weight"].chunk(ranks)[rank]
    held = dict(model.named_parameters())
    return torch.equal(held["proj.weight"], rows) and torch.equal(held["norm"], want["norm"] * 2)


class Untouched(Served):
    def load_weights(self, weights: Weights) -> set[str]:
        raise AssertionError("weights were loaded")


class TestRegistration:
    def test_vllm_finds_the_door_by_its_entry_point(self, vllm: Vllm) -> None:
        (found,) = (point for point in entry_points(group="vllm.general_plugins") if point.name == "modelp2p")
        assert found.load() is register
        vllm.load_general_plugins()
        assert set(vllm.loaders) == {"modelp2p"}

    def test_registering_again_changes_nothing(self, vllm: Vllm) -> None:
        vllm.load_general_plugins()
        before = dict(vllm.loaders)
        register()
        assert (vllm.loaders, vllm.overwritten) == (before, [])

    @pytest.mark.slow
    def test_finding_the_door_imports_neither_torch_nor_vllm(self) -> None:
        code = (
            "import sys; from importlib.metadata import entry_points as e;"
            "[p.load() for p in e(group='vllm.general_plugins') if p.name == 'modelp2p'];"
            "bad = {'torch', 'vllm', 'trio', 'libtorrent'} & set(sys.modules); assert not bad, bad"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

    def test_without_vllm_the_door_says_so(self) -> None:
        register.cache_clear()
        with pytest.raises(ModuleNotFoundError, match="vllm"):
            register()


class TestServing:
    def test_the_folder_of_a_release(self, vllm: Vllm, served: Home) -> None:
        model = vllm.get_model(config(tree_of(served)))
        assert is_filled(model)
        assert not model.training

    def test_a_name_with_a_revision(self, vllm: Vllm, served: Home) -> None:
        assert is_filled(vllm.get_model(config("lab/model", revision=tree_of(served).name[:8])))
        with pytest.raises(NotFoundError):
            vllm.get_model(config("lab/model", revision="0" * 40))

    def test_a_release_beside_the_folder(self, vllm: Vllm, served: Home, tmp_path: Path) -> None:
        place = write_files(tmp_path / "configs", {"config.json": checkpoint()["config.json"]})
        extra = {"ref": "lab/model", "publisher": publisher().id, "home": str(served.path), "verify": "cpu", "workers": 1}
        assert is_filled(vllm.get_model(config(place, extra=extra)))

    @pytest.mark.usefixtures("own_home")
    def test_a_plain_folder_needs_a_pin(self, vllm: Vllm, tmp_path: Path) -> None:
        place = write_files(tmp_path / "plain", checkpoint())
        (place / "lab.modelp2p").write_bytes(bundle_of(checkpoint()))
        with pytest.raises(UnknownPublisherError):
            vllm.get_model(config(place))
        with pytest.raises(UnknownPublisherError):
            vllm.get_model(config(place, extra={"publisher": publisher("other").id}))
        assert is_filled(vllm.get_model(config(place, extra={"publisher": publisher().id})))

    @pytest.mark.parametrize("rank", [0, 1])
    def test_each_rank_narrows_whole_tensors(self, vllm: Vllm, served: Home, rank: int) -> None:
        model = vllm.get_model(config(tree_of(served), architecture=partial(Served, rank, 2)))
        assert is_filled(model, rank, 2)

    def test_the_default_dtype_of_the_model_does_not_leak_into_tensors(self, vllm: Vllm, served: Home) -> None:
        model = vllm.get_model(config(tree_of(served), dtype=torch.bfloat16))
        want = stored()
        held = dict(model.named_parameters())
        assert torch.equal(held["proj.weight"], want["proj.weight"].to(torch.bfloat16))
        assert torch.equal(held["norm"], (want["norm"] * 2).to(torch.bfloat16))

    def test_weights_can_be_loaded_again_in_place(self, vllm: Vllm, served: Home) -> None:
        wanted = config(tree_of(served))
        model = vllm.get_model(wanted)
        for parameter in model.parameters():
            parameter.data.zero_()
        vllm.get_model_loader(wanted.load_config).load_weights(model, wanted.model_config)
        assert is_filled(model)

    def test_download_model_finds_the_release_and_fetches_nothing(self, vllm: Vllm, served: Home) -> None:
        vllm.load_general_plugins()
        wanted = config(tree_of(served))
        vllm.get_model_loader(wanted.load_config).download_model(wanted.model_config)
        absent = config("lab/other")
        with pytest.raises(NotFoundError):
            vllm.get_model_loader(absent.load_config).download_model(absent.model_config)

    def test_only_the_checkpoint_of_the_root_folder_is_loaded(self, vllm: Vllm, own_home: Path) -> None:
        files = checkpoint() | {
            "consolidated.safetensors": save({"tok": torch.ones(3)}),
            "original/a.safetensors": save(stored()),
        }
        home = Home(own_home / "modelp2p")
        home.trust()
        home.add(statement_of(files), files)
        model = vllm.get_model(config("lab/model"))
        assert isinstance(model, Served)
        assert set(model.seen) == set(stored())


class TestIntegrity:
    @pytest.fixture
    def large(self, own_home: Path) -> Home:
        """A release of several pieces."""
        files = checkpoint() | {"model.safetensors": save(stored() | {"z": torch.zeros(3 * MIB // 4)})}
        home = Home(own_home / "modelp2p")
        home.trust()
        home.add(statement_of(files), files, has_record=False)
        return home

    def test_a_bad_tensor_never_reaches_the_model(self, vllm: Vllm, large: Home) -> None:
        class Greedy(Served):
            def load_weights(self, weights: Weights) -> set[str]:
                given.extend(name for name, _ in weights)
                return set()

        given: list[str] = []
        flip(tree_of(large) / "model.safetensors", -1)
        with pytest.raises(IntegrityError):
            vllm.get_model(config(tree_of(large), architecture=Greedy))
        assert "z" not in given

    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "modeling.py"])
    def test_a_changed_configuration_is_refused_before_any_weight(self, vllm: Vllm, served: Home, name: str) -> None:
        flip(tree_of(served) / name, -1)
        with pytest.raises(IntegrityError, match=name):
            vllm.get_model(config(tree_of(served), architecture=Untouched))

    @pytest.mark.parametrize(
        "name", ["generation_config.json", "tokenizer.model", "modeling_x.py", "chat_template.jinja", "sub/config.json"]
    )
    def test_files_nobody_signed_are_refused_before_any_weight(self, vllm: Vllm, tmp_path: Path, served: Home, name: str) -> None:
        place = write_files(tmp_path / "plain", checkpoint() | {name: b"{}"})
        (place / "lab.modelp2p").write_bytes(bundle_of(checkpoint()))
        with pytest.raises(UsageError, match=f"may have read them: {name}$"):
            vllm.get_model(config(place, architecture=Untouched, extra={"home": str(served.path)}))
        # It says that it compares nothing.
        assert is_filled(vllm.get_model(config(place, extra={"home": str(served.path), "verify": "off"})))

    def test_files_that_nobody_reads_may_lie_there(self, vllm: Vllm, tmp_path: Path, served: Home) -> None:
        place = write_files(tmp_path / "plain", checkpoint() | {"notes.md": b"mine", ".git/config.json": b"{}"})
        (place / "lab.modelp2p").write_bytes(bundle_of(checkpoint()))
        (place / "again").symlink_to(place)
        assert is_filled(vllm.get_model(config(place, extra={"home": str(served.path)})))
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "config.json").write_bytes(b"{}")
        (place / "linked").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(UsageError, match=r"linked/config\.json"):
            vllm.get_model(config(place, extra={"home": str(served.path)}))

    @pytest.mark.parametrize("name", ["vocab.bpe", "notes.md", "sub/merges.txt", "adapter.bin", "tokenizer.json"])
    def test_every_signed_file_but_tensors_is_compared(self, vllm: Vllm, own_home: Path, name: str) -> None:
        files = checkpoint() | {name: bytes(3 * MIB + 5)}
        home = Home(own_home / "modelp2p")
        home.trust()
        home.add(statement_of(files), files)
        assert is_filled(vllm.get_model(config(tree_of(home))))
        flip(tree_of(home) / name, -1)
        with pytest.raises(IntegrityError, match=f"{name}': piece 3"):
            vllm.get_model(config(tree_of(home), architecture=Untouched))

    @pytest.mark.slow
    def test_a_signed_file_of_more_than_64_mib_is_compared(self, vllm: Vllm, own_home: Path) -> None:
        files = checkpoint() | {"tokenizer.json": bytes(64 * MIB + 1)}
        home = Home(own_home / "modelp2p")
        home.trust()
        home.add(statement_of(files), files)
        assert is_filled(vllm.get_model(config(tree_of(home))))
        flip(tree_of(home) / "tokenizer.json", -1)
        with pytest.raises(IntegrityError, match=r"tokenizer\.json': piece 64"):
            vllm.get_model(config(tree_of(home), architecture=Untouched))

    def test_a_parameter_nobody_filled_is_an_error(self, vllm: Vllm, served: Home) -> None:
        class More(Served):
            def __init__(self) -> None:
                super().__init__()
                self.extra = torch.nn.Linear(2, 2)

        with pytest.raises(UsageError, match=r"nothing for extra\.bias, extra\.weight"):
            vllm.get_model(config(tree_of(served), architecture=More))
        # What quantization makes of parameters, only its method knows.
        vllm.get_model(config(tree_of(served), architecture=More, quantization="fp8"))

    def test_scales_of_a_cache_may_be_left_at_their_defaults(self, vllm: Vllm, served: Home) -> None:
        class Method:
            def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
                processed.append(layer)

        class Layer(torch.nn.Module):
            quant_method = Method()

        class Attention(Served):
            def __init__(self, name: str) -> None:
                super().__init__()
                self.attn = Layer()
                self.attn.register_parameter(name, torch.nn.Parameter(torch.ones(())))

        processed: list[torch.nn.Module] = []
        model = vllm.get_model(config(tree_of(served), architecture=partial(Attention, "k_scale")))
        assert processed == [model.get_submodule("attn")]
        with pytest.raises(UsageError, match=r"attn\.weight"):
            vllm.get_model(config(tree_of(served), architecture=partial(Attention, "weight")))


class TestRefusals:
    @pytest.mark.parametrize(
        ("extra", "match"),
        [
            ({"publishers": "mp1"}, "no key publishers"),
            ({"workers": "two"}, "workers is 'two'"),
            ({"workers": True}, "workers is True"),
            ({"files": [1]}, "files is"),
            (["ref"], "not a list"),
            (None, "not a NoneType"),
        ],
    )
    def test_a_wrong_extra_configuration(self, extra: object, match: str) -> None:
        with pytest.raises(UsageError, match=match):
            options_of(extra)

    def test_the_nearest_key_is_named(self, vllm: Vllm, served: Home) -> None:
        with pytest.raises(UsageError) as caught:
            vllm.get_model(config(tree_of(served), extra={"verfy": "cpu"}))
        assert caught.value.hint == "Did you mean verify?"

    def test_a_wrong_value_is_the_loaders_to_name(self, vllm: Vllm, served: Home) -> None:
        with pytest.raises(UsageError, match="verify='all'"):
            vllm.get_model(config(tree_of(served), extra={"verify": "all"}))

    def test_bitsandbytes(self, vllm: Vllm, served: Home) -> None:
        with pytest.raises(UsageError, match="bitsandbytes"):
            vllm.get_model(config(tree_of(served), quantization="bitsandbytes"))

    def test_a_model_of_two_repositories(self, vllm: Vllm, served: Home) -> None:
        class Two(Served):
            secondary_weights = ("org/vision",)

        with pytest.raises(UsageError, match="org/vision"):
            vllm.get_model(config(tree_of(served), architecture=Two))


class TestDevice:
    def test_of_the_parameters_that_have_memory(self) -> None:
        model = torch.nn.ModuleList([torch.nn.Linear(1, 1, device="meta"), torch.nn.Linear(1, 1)])
        assert device_of(model, "cuda:1") == torch.device("cpu")

    @pytest.mark.parametrize("devices", [("cpu", "cuda:1"), ("cuda:1", "cpu")])
    def test_of_the_accelerator_where_some_parameters_are_offloaded(self, devices: tuple[str, str]) -> None:
        class Offloaded(torch.nn.Module):
            def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]:
                for device in devices:
                    # No memory of a device is needed to say that a tensor is there.
                    yield cast("torch.nn.Parameter", SimpleNamespace(device=torch.device(device), is_meta=False))

        assert device_of(Offloaded(), None) == torch.device("cuda:1")

    def test_of_the_configuration_while_all_are_meta(self) -> None:
        model = torch.nn.Linear(1, 1, device="meta")
        assert device_of(model, "cuda:1") == torch.device("cuda:1")
        with pytest.raises(UsageError, match="on a device"):
            device_of(model, None)

    def test_of_the_user_before_all(self, vllm: Vllm, served: Home) -> None:
        with pytest.raises(UsageError, match="tpu"):
            vllm.get_model(config(tree_of(served), extra={"device": "tpu"}))


@pytest.mark.parametrize(
    ("model", "revision", "options", "want"),
    [
        ("lab/model", None, {}, "lab/model"),
        ("lab/model", "abcdef1", {}, "lab/model@abcdef1"),
        ("lab/model@0123abc", "main", {}, "lab/model@0123abc"),
        ("magnet:?xt=urn:btmh:1220", "main", {}, "magnet:?xt=urn:btmh:1220"),
        (".", "main", {}, Path()),
        (".", None, {"ref": "lab/model"}, "lab/model"),
    ],
)
def test_which_release_is_meant(model: str, revision: str | None, options: dict[str, str], want: str | Path) -> None:
    assert ref_of(model, revision, options) == want
