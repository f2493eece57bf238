"""The transformers door: what `from_pretrained` gives, from proven bytes, in memory that was made once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load, save

from modelp2p.loader import open_release
from modelp2p.loader.transformers import config_of, from_release, model_of
from modelp2p.protocol.errors import FormatError, IntegrityError, UnknownPublisherError, UsageError
from tests.loader.fake_cuda import FakeCuda
from tests.loader.models import MIB, same
from tests.loader.test_integrity import flip
from tests.loader.test_pipeline import open_on
from tests.releases import Home, bundle_of, publisher, statement_of, write_files

pytestmark = pytest.mark.slow  # importing transformers takes seconds, in whichever test comes first

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA: dict[str, Any] = SMALL | {"vocab_size": 96, "num_key_value_heads": 2}
BERT: dict[str, Any] = SMALL | {"vocab_size": 96, "max_position_embeddings": 64}
MODELS: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**BERT)),
    "bert with a head": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**BERT)),
    "llama: rotary buffers": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
    "llama: tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "gpt2: tied, transposed": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=96)
    ),
    "mixtral: experts are fused": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2)
    ),
    "t5: kept in float32": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=96)
    ),
}


def saved(make: Callable[[], Any], folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, bytes]:
    """The files `save_pretrained` writes, of a model whose values follow from a seed."""
    torch.manual_seed(5)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def publish(own_home: Path, files: dict[str, bytes]) -> Home:
    home = Home(own_home / "modelp2p")
    home.trust()
    home.add(statement_of(files), files)
    return home


def tensors_in(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All that a model computes with, the buffers no checkpoint holds included."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach() for name, tensor in named}


def check_same(got: torch.nn.Module, want: torch.nn.Module) -> None:
    left, right = tensors_in(got), tensors_in(want)
    assert left.keys() == right.keys()
    assert [name for name in right if not same(left[name], right[name])] == []
    ties = [
        {name for name in each if each[name].data_ptr() == tensor.data_ptr()}
        for each in (left, right)
        for tensor in each.values()
    ]
    assert ties[: len(left)] == ties[len(left) :]
    assert type(got) is type(want)
    assert not got.training
    flags = [[parameter.requires_grad for parameter in model.parameters()] for model in (got, want)]
    assert flags[0] == flags[1]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["as saved", "cast"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_equal_to_from_pretrained(make: Callable[[], Any], dtype: torch.dtype | None, own_home: Path, tmp_path: Path) -> None:
    publish(own_home, saved(make, tmp_path / "saved"))
    got = from_release("lab/model", dtype=dtype)
    want = type(got).from_pretrained(tmp_path / "saved", dtype=dtype)
    check_same(got, want)


@pytest.fixture
def bert(own_home: Path, tmp_path: Path) -> Home:
    return publish(own_home, saved(MODELS["bert"], tmp_path / "saved"))


class TestClasses:
    @pytest.mark.usefixtures("bert")
    def test_an_auto_class(self, tmp_path: Path) -> None:
        check_same(from_release("lab/model", transformers.AutoModel), transformers.AutoModel.from_pretrained(tmp_path / "saved"))
        with pytest.raises(UsageError, match="AutoModelForCTC has no class for BertConfig"):
            from_release("lab/model", transformers.AutoModelForCTC)

    @pytest.mark.usefixtures("bert")
    def test_a_head_the_release_has_not_is_an_error(self) -> None:
        with pytest.raises(UsageError, match=r"nothing for: classifier\.bias, classifier\.weight"):
            from_release("lab/model", transformers.BertForSequenceClassification)

    def test_the_body_of_a_model_with_a_head(self, own_home: Path, tmp_path: Path) -> None:
        publish(own_home, saved(MODELS["bert with a head"], tmp_path / "saved"))
        with pytest.raises(UsageError, match=r"no place for: classifier\.bias, classifier\.weight"):
            from_release("lab/model", transformers.BertModel)
        got = from_release("lab/model", transformers.BertModel, strict=False)
        check_same(got, transformers.BertModel.from_pretrained(tmp_path / "saved"))

    @pytest.mark.usefixtures("bert")
    def test_a_head_may_be_made_up_if_asked_for(self, tmp_path: Path) -> None:
        got = from_release("lab/model", transformers.BertForSequenceClassification, strict=False)
        want = transformers.BertModel.from_pretrained(tmp_path / "saved")
        check_same(got.bert, want)
        assert bool(got.classifier.weight.isfinite().all())

    @pytest.mark.usefixtures("bert")
    def test_a_configuration_that_does_not_fit(self) -> None:
        with pytest.raises(UsageError, match=r"shapes differ: .*stored"):
            from_release("lab/model", config=transformers.BertConfig(**BERT | {"vocab_size": 97}, architectures=["BertModel"]))

    @pytest.mark.parametrize("name", ["PreTrainedModel", "GPT2Model", "AutoModel", "Trainer", "a.b", None])
    def test_a_class_that_is_no_model_of_the_configuration(self, name: str | None, own_home: Path, tmp_path: Path) -> None:
        files = saved(MODELS["bert"], tmp_path / "saved")
        changed = json.loads(files["config.json"]) | {"architectures": [name] if name else None}
        publish(own_home, files | {"config.json": json.dumps(changed).encode()})
        with pytest.raises(UsageError, match="the configuration names"):
            from_release("lab/model")


class TestMemory:
    """No second copy: parameters are what `into` filled, or the mapped file."""

    @pytest.mark.usefixtures("bert")
    def test_a_device_allocates_nothing_beside_the_model(self) -> None:
        class Frugal(FakeCuda):
            def allocate(self, size_bytes: int) -> torch.Tensor:
                # `position_ids` and the like, which transformers drops, are the only tensors it is handed.
                assert size_bytes < MIB // 64, "memory beside the model's own"
                return super().allocate(size_bytes)

        with open_on(Frugal(proves=True, slot_bytes=MIB)) as release:
            model = model_of(release)
            assert release.stats.verified_bytes > sum(parameter.nbytes for parameter in model.parameters())
            assert release.attest(model).bad == ()
            assert set(release.attest(model).attested) == set(release.keys())

    @pytest.mark.usefixtures("bert")
    def test_parameters_may_be_written_to(self, bert: Home) -> None:
        model = from_release("lab/model")
        with torch.no_grad():
            for tensor in tensors_in(model).values():
                tensor.zero_()
        model.train()
        model(input_ids=torch.zeros(1, 3, dtype=torch.long)).last_hidden_state.sum().backward()
        with open_release("lab/model", verify="cpu") as release:
            assert bool(release.tensor("embeddings.word_embeddings.weight").any())

    def test_views_show_the_file(self, bert: Home, tmp_path: Path) -> None:
        model = from_release("lab/model", views=True)
        check_same(model, transformers.BertModel.from_pretrained(tmp_path / "saved"))
        place = str(next((bert.path / "models" / "lab" / "model").iterdir()).resolve() / "model.safetensors")
        spans = [
            tuple(int(end, 16) for end in line.split()[0].split("-"))
            for line in Path("/proc/self/maps").read_text().splitlines()
            if line.endswith(place)
        ]
        assert all(any(low <= parameter.data_ptr() < high for low, high in spans) for parameter in model.parameters())

    def test_views_are_for_the_host(self) -> None:
        with pytest.raises(UsageError, match="views"):
            from_release("lab/model", device="cuda", views=True)

    @pytest.mark.usefixtures("bert")
    @pytest.mark.parametrize(("dtype", "views"), [(None, False), (torch.bfloat16, False), (None, True)])
    def test_progress_is_told(self, dtype: torch.dtype | None, views: bool) -> None:
        # Of what is filled in place, as everything here is, or of what is viewed.
        told: list[tuple[int, int]] = []
        model = from_release("lab/model", dtype=dtype, views=views, progress=lambda done, total: told.append((done, total)))
        assert told[-1][0] == told[-1][1] >= model.num_parameters() * 4


class TestTies:
    """Stored at both ends, which safetensors files made from older formats are."""

    def release(self, own_home: Path, tmp_path: Path, change: float) -> tuple[Any, Any]:
        files = saved(MODELS["llama: tied"], tmp_path / "saved")
        tensors = load(files["model.safetensors"])
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + change
        files["model.safetensors"] = save(tensors, metadata={"format": "pt"})
        (tmp_path / "saved" / "model.safetensors").write_bytes(files["model.safetensors"])
        publish(own_home, files)
        return from_release("lab/model"), transformers.LlamaForCausalLM.from_pretrained(tmp_path / "saved")

    def test_equal_ends_are_tied(self, own_home: Path, tmp_path: Path) -> None:
        got, want = self.release(own_home, tmp_path, 0)
        check_same(got, want)
        assert got.lm_head.weight is got.model.embed_tokens.weight
        # They were not filled in place, and may be written to all the same.
        got.lm_head.weight.data.zero_()

    def test_unequal_ends_are_not(self, own_home: Path, tmp_path: Path) -> None:
        got, want = self.release(own_home, tmp_path, 1)
        check_same(got, want)
        assert not torch.equal(got.lm_head.weight, got.model.embed_tokens.weight)


class TestTrust:
    @pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
    @pytest.mark.parametrize("verify", ["auto", "cpu"])
    def test_a_changed_byte_is_an_error(self, bert: Home, name: str, verify: str) -> None:
        flip(next((bert.path / "models" / "lab" / "model").iterdir()) / name, -1)
        with pytest.raises(IntegrityError, match=name):
            from_release("lab/model", verify=verify)

    def test_the_configuration_is_proven_whatever_the_weights_are(self, bert: Home) -> None:
        flip(next((bert.path / "models" / "lab" / "model").iterdir()) / "config.json", -1)
        with pytest.raises(IntegrityError, match=r"config\.json"):
            from_release("lab/model", verify="off")

    @pytest.mark.usefixtures("own_home")
    def test_a_plain_folder_needs_a_pin(self, tmp_path: Path) -> None:
        files = saved(MODELS["bert"], tmp_path / "saved")
        place = write_files(tmp_path / "plain", files)
        (place / "lab.modelp2p").write_bytes(bundle_of(files))
        with pytest.raises(UnknownPublisherError):
            from_release(place)
        assert from_release(place, publisher=publisher().id).num_parameters() > 0

    def config_with(self, own_home: Path, tmp_path: Path, **keys: object) -> object:
        files = saved(MODELS["bert"], tmp_path / "saved")
        changed = json.loads(files["config.json"]) | keys
        publish(own_home, files | {"config.json": json.dumps(changed).encode()})
        with open_release("lab/model") as release:
            return config_of(release)

    def test_a_configuration_cannot_ask_for_code(self, own_home: Path, tmp_path: Path) -> None:
        keys = {
            "auto_map": {"AutoModel": "evil--model.Evil"},
            "attn_implementation": "evil/kernel",
            "transformers_weights": "x.bin",
        }
        found = self.config_with(
            own_home, tmp_path, **keys, _attn_implementation="evil/kernel", sub=[{"auto_map": {}, "kept": 1}]
        )
        assert not any(hasattr(found, key) for key in ("auto_map", "transformers_weights"))
        assert getattr(found, "_attn_implementation", "") is None
        assert getattr(found, "sub", None) == [{"kept": 1}]

    @pytest.mark.parametrize("kind", ["evil", None, 5, ["bert"]])
    def test_a_type_only_code_of_the_release_would_know(self, kind: object, own_home: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="no model of type"):
            self.config_with(own_home, tmp_path, model_type=kind)

    @pytest.mark.parametrize("data", [b"{", b"[]", b"\xff", b"[" * 100_000], ids=["cut", "list", "binary", "deep"])
    def test_a_signed_configuration_may_be_nonsense(self, data: bytes, own_home: Path, tmp_path: Path) -> None:
        publish(own_home, saved(MODELS["bert"], tmp_path / "saved") | {"config.json": data})
        with pytest.raises(FormatError, match=r"config\.json"):
            from_release("lab/model")

    @pytest.mark.parametrize(
        ("keys", "match"),
        [
            ({"dtype": "load"}, r"config\.json.*IndexError"),
            ({"hidden_size": "x"}, r"config\.json.*hidden_size"),
            ({"hidden_size": 1 << 40}, r"config\.json.*overflow"),
            ({"num_attention_heads": 0}, r"config\.json.*ZeroDivisionError"),
            ({"id2label": {"a": "b"}}, r"config\.json.*ValueError"),
            ({"use_return_dict": False}, r"config\.json.*AttributeError"),
            ({"architectures": 5}, "the configuration names no class"),
            ({"architectures": "BertModel"}, "the configuration names no class"),
        ],
    )
    def test_a_signed_configuration_may_have_any_value(
        self, keys: dict[str, object], match: str, own_home: Path, tmp_path: Path
    ) -> None:
        files = saved(MODELS["bert"], tmp_path / "saved")
        changed = json.loads(files["config.json"]) | keys
        publish(own_home, files | {"config.json": json.dumps(changed).encode()})
        with pytest.raises((UsageError, FormatError), match=match):
            from_release("lab/model")

    def test_an_automatic_class_meets_such_a_value_as_well(self, own_home: Path, tmp_path: Path) -> None:
        files = saved(MODELS["bert"], tmp_path / "saved")
        changed = json.loads(files["config.json"]) | {"num_attention_heads": 0}
        publish(own_home, files | {"config.json": json.dumps(changed).encode()})
        with pytest.raises(UsageError, match=r"config\.json.*ZeroDivisionError"):
            from_release("lab/model", transformers.AutoModel)

    @pytest.mark.parametrize(("opening", "closing"), [('{"x":', "}"), ("[", "]")], ids=["objects", "lists"])
    @pytest.mark.parametrize("levels", [33, 600])
    def test_a_configuration_is_not_deep(self, opening: str, closing: str, levels: int, own_home: Path, tmp_path: Path) -> None:
        files = saved(MODELS["bert"], tmp_path / "saved")
        text = files["config.json"].decode().rstrip()[:-1] + f',"deep":{opening * levels}1{closing * levels}}}'
        publish(own_home, files | {"config.json": text.encode()})
        with pytest.raises(FormatError, match=r"config\.json.*deeper"):
            from_release("lab/model")

    def test_a_generation_configuration_may_be_nonsense(self, own_home: Path, tmp_path: Path) -> None:
        files = saved(MODELS["bert"], tmp_path / "saved")
        publish(own_home, files | {"generation_config.json": b'{"watermarking_config": 5}'})
        with pytest.raises(FormatError, match=r"generation_config\.json"):
            from_release("lab/model")

    @pytest.mark.parametrize("quantization", [{"quant_method": name} for name in ("mxfp4", "fp8", "eetq", "evil", 5)] + [{}])
    def test_quantization_that_may_take_code_from_a_hub(
        self, quantization: dict[str, object], own_home: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(UsageError, match="may take code from a hub"):
            self.config_with(own_home, tmp_path, quantization_config=quantization)
        with pytest.raises(UsageError, match="may take code from a hub"):
            self.config_with(own_home, tmp_path, sub={"quantization_config": quantization})

    @pytest.mark.parametrize("quantization", [{"quant_method": "compressed-tensors"}, {"load_in_8bit": True}, None])
    def test_quantization_that_needs_no_hub(self, quantization: dict[str, object] | None, own_home: Path, tmp_path: Path) -> None:
        found = self.config_with(own_home, tmp_path, quantization_config=quantization)
        assert getattr(found, "quantization_config", None) == quantization

    def test_quantization_is_an_object(self, own_home: Path, tmp_path: Path) -> None:
        with pytest.raises(FormatError, match="quantization_config"):
            self.config_with(own_home, tmp_path, quantization_config="mxfp4")

    def test_without_a_configuration_the_user_gives_one(self, own_home: Path, tmp_path: Path) -> None:
        files = saved(MODELS["bert"], tmp_path / "saved")
        publish(own_home, {"model.safetensors": files["model.safetensors"]})
        with pytest.raises(UsageError, match=r"has no config\.json"):
            from_release("lab/model")
        got = from_release("lab/model", transformers.BertModel, config=transformers.BertConfig(**BERT))
        check_same(got, transformers.BertModel.from_pretrained(tmp_path / "saved"))


def test_what_the_release_says_about_generation_is_kept(own_home: Path, tmp_path: Path) -> None:
    files = saved(MODELS["llama: rotary buffers"], tmp_path / "saved")
    publish(own_home, files | {"generation_config.json": b'{"temperature": 0.25, "do_sample": true}'})
    assert from_release("lab/model").generation_config.temperature == 0.25


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama: tied", "mixtral: experts are fused"])
def test_on_a_gpu(name: str, own_home: Path, tmp_path: Path) -> None:
    publish(own_home, saved(MODELS[name], tmp_path / "saved"))
    got = from_release("lab/model", device="cuda:0")
    assert {tensor.device for tensor in tensors_in(got).values()} == {torch.device("cuda:0")}
    check_same(got.cpu(), type(got).from_pretrained(tmp_path / "saved"))
