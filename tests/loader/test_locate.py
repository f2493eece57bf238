"""What a reference means and whom it lets us believe: no daemon, no network, only signatures and pins."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from modelp2p.loader import load, open_release
from modelp2p.loader.home import default_home
from modelp2p.protocol.errors import (
    FormatError,
    NotFoundError,
    UnknownPublisherError,
    UntrustedError,
    UsageError,
)
from modelp2p.protocol.publisher import encode_chain
from modelp2p.protocol.statement import verify_statement
from tests.loader.models import file_of
from tests.releases import Home, bundle_of, publisher, statement_of, write_files

if TYPE_CHECKING:
    from modelp2p.protocol.links import Link

SMALL = {"m.safetensors": file_of(1, x=64)}
OTHER = {"m.safetensors": file_of(2, x=64)}


@pytest.fixture
def empty(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def x_of(ref: str | Path, home: Home, **options: str) -> bytes:
    return bytes(load(ref, home=home.path, **options)["x"].numpy().tobytes())  # type: ignore[arg-type]


def x_in(files: dict[str, bytes]) -> bytes:
    return files["m.safetensors"][-64:]


class TestNames:
    def test_the_newest_sequence_wins(self, empty: Home) -> None:
        empty.trust()
        empty.add(statement_of(SMALL, sequence=9), SMALL)
        empty.add(statement_of(OTHER, sequence=2), OTHER)
        assert x_of("lab/model", empty) == x_in(SMALL)

    def test_a_revision_picks(self, empty: Home) -> None:
        empty.trust()
        empty.add(statement_of(SMALL, sequence=9), SMALL)
        tree = empty.add(statement_of(OTHER, sequence=2), OTHER)
        assert x_of(f"lab/model@{tree.name}", empty) == x_in(OTHER)
        assert x_of(f"lab/model@{tree.name[:7]}", empty) == x_in(OTHER)

    def test_absent(self, empty: Home) -> None:
        empty.trust()
        empty.add(statement_of(SMALL), SMALL)
        for ref in ("lab/nothing", "lab/model@" + "0" * 40, "elsewhere"):
            with pytest.raises(NotFoundError) as caught:
                load(ref, home=empty.path)
            assert "modelp2p fetch" in caught.value.hint
        with pytest.raises(UsageError):
            load("a/b/c", home=empty.path)

    def test_one_segment(self, empty: Home) -> None:
        empty.trust(pattern="solo")
        empty.add(statement_of(SMALL, name="solo"), SMALL)
        assert x_of("solo", empty) == x_in(SMALL)

    def test_a_newer_statement_than_the_record_knows(self, empty: Home) -> None:
        empty.trust()
        empty.trust("other", "*")
        empty.add(statement_of(SMALL, sequence=1), SMALL)
        empty.state(statement_of(SMALL, sequence=5, by="other"))
        with open_release("lab/model", home=empty.path, publisher=publisher("other").id) as release:
            assert release.release.manifest.sequence == 5

    def test_a_dangling_or_foreign_link_is_no_release(self, empty: Home, tmp_path: Path) -> None:
        empty.trust()
        place = empty.path / "models" / "lab" / "model"
        place.mkdir(parents=True)
        (place / ("1" * 40)).symlink_to("/nowhere")
        (place / ("2" * 40)).symlink_to(tmp_path)
        with pytest.raises(NotFoundError):
            load("lab/model", home=empty.path)

    def test_the_default_home(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("MODELP2P_HOME", str(tmp_path))
        assert default_home() == str(tmp_path)
        monkeypatch.delenv("MODELP2P_HOME")
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
        assert default_home() == str(tmp_path / "data" / "modelp2p")


class TestTrust:
    def test_no_pins_no_release(self, empty: Home) -> None:
        empty.add(statement_of(SMALL), SMALL)
        with pytest.raises(UnknownPublisherError) as caught:
            load("lab/model", home=empty.path)
        assert caught.value.facts["publisher"] == publisher().id

    def test_a_pin_for_another_name_is_none(self, empty: Home) -> None:
        empty.trust(pattern="lab/other")
        empty.add(statement_of(SMALL), SMALL)
        with pytest.raises(UnknownPublisherError):
            load("lab/model", home=empty.path)

    def test_publisher_is_an_anchor_of_its_own(self, empty: Home) -> None:
        empty.add(statement_of(SMALL), SMALL, is_named=False)
        with pytest.raises(NotFoundError):
            load("lab/model", home=empty.path)
        with open_release("lab/model", home=empty.path, publisher=publisher().id) as release:
            assert not release.is_name_verified

    def test_the_wrong_publisher(self, empty: Home) -> None:
        empty.trust()
        empty.add(statement_of(SMALL), SMALL)
        with pytest.raises(UnknownPublisherError, match="not by"):
            load("lab/model", home=empty.path, publisher=publisher("other").id)
        with pytest.raises(UsageError):
            load("lab/model", home=empty.path, publisher="lab")

    def test_a_tree_in_a_foreign_home_does_not_vouch_for_itself(self, empty: Home, tmp_path: Path) -> None:
        empty.trust()
        tree = empty.add(statement_of(SMALL), SMALL)
        mine = Home(tmp_path / "mine")
        with pytest.raises(UnknownPublisherError):
            load(tree, home=mine.path)
        assert x_of(tree, mine, publisher=publisher().id) == x_in(SMALL)
        mine.trust()
        assert x_of(tree, mine) == x_in(SMALL)

    @pytest.mark.parametrize("part", ["manifest", "layers", "publisher"])
    def test_a_tampered_statement(self, empty: Home, shards: dict[str, bytes], part: str) -> None:
        empty.trust()
        statement = statement_of(shards)
        empty.add(statement, shards)
        place = empty.path / "manifests" / statement.digest.hex() / part
        data = bytearray(place.read_bytes())
        data[len(data) // 2] ^= 1
        place.write_bytes(data)
        with pytest.raises(UntrustedError):
            load("lab/model", home=empty.path)

    def test_a_statement_with_foreign_layers(self, empty: Home, shards: dict[str, bytes]) -> None:
        empty.trust()
        statement = statement_of(shards)
        empty.add(statement, shards)
        other = {**shards, "model-2.safetensors": shards["model-1.safetensors"]}
        (empty.path / "manifests" / statement.digest.hex() / "layers").write_bytes(statement_of(other).layers)
        with pytest.raises(FormatError):
            load("lab/model", home=empty.path)

    def test_a_chain_kept_under_a_foreign_id(self, empty: Home) -> None:
        empty.trust()
        empty.add(statement_of(SMALL), SMALL)
        place = empty.path / "trust" / "publishers" / publisher().id
        place.write_bytes(encode_chain([publisher("other").document]))
        with pytest.raises(FormatError, match="belongs to"):
            load("lab/model", home=empty.path)

    def test_a_statement_about_other_content_is_not_used(self, empty: Home) -> None:
        empty.trust()
        statement = statement_of(SMALL)
        empty.add(statement, SMALL, has_record=False)
        folder = empty.path / "manifests" / statement.digest.hex()
        for part, data in statement_of(OTHER).files().items():
            (folder / part).write_bytes(data)
        with pytest.raises(NotFoundError, match="no signed statement"):
            load("lab/model", home=empty.path)


class TestPaths:
    def test_bundle_inside_beside_and_by_file(self, empty: Home, tmp_path: Path) -> None:
        folder = write_files(tmp_path / "plain", SMALL)
        with pytest.raises(NotFoundError, match="no bundle"):
            load(folder, home=empty.path, publisher=publisher().id)
        beside = tmp_path / "plain.modelp2p"
        beside.write_bytes(bundle_of(SMALL))
        assert x_of(folder, empty, publisher=publisher().id) == x_in(SMALL)
        assert x_of(str(beside), empty, publisher=publisher().id) == x_in(SMALL)
        inside = folder / "release.modelp2p"
        beside.rename(inside)
        assert x_of(folder, empty, publisher=publisher().id) == x_in(SMALL)
        assert x_of(str(inside), empty, publisher=publisher().id) == x_in(SMALL)
        (folder / "second.modelp2p").write_bytes(bundle_of(SMALL))
        with pytest.raises(UsageError, match="several"):
            load(folder, home=empty.path, publisher=publisher().id)

    def test_a_bundle_needs_an_anchor(self, empty: Home, tmp_path: Path) -> None:
        folder = write_files(tmp_path / "plain", SMALL)
        (folder / "m.modelp2p").write_bytes(bundle_of(SMALL))
        with pytest.raises(UnknownPublisherError):
            load(folder, home=empty.path)
        empty.trust()
        assert x_of(folder, empty) == x_in(SMALL)

    def test_a_bundle_alone_means_the_store(self, empty: Home, tmp_path: Path) -> None:
        empty.trust()
        bundle = tmp_path / "alone.modelp2p"
        bundle.write_bytes(bundle_of(SMALL))
        with pytest.raises(NotFoundError, match="not here"):
            load(bundle, home=empty.path)
        empty.add(statement_of(SMALL), SMALL)
        with open_release(bundle, home=empty.path) as release:
            release.load()
            assert release.stats.transfer == "mmap"

    def test_a_visible_path_and_its_target(self, empty: Home) -> None:
        empty.trust()
        tree = empty.add(statement_of(SMALL), SMALL)
        link = empty.path / "models" / "lab" / "model" / tree.name
        for ref in (tree, link, str(link), f"{link}/"):
            assert x_of(ref, empty) == x_in(SMALL)

    def test_a_relative_path(self, empty: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = write_files(tmp_path / "plain", SMALL)
        (folder / "m.modelp2p").write_bytes(bundle_of(SMALL))
        monkeypatch.chdir(tmp_path)
        assert x_of("./plain", empty, publisher=publisher().id) == x_in(SMALL)
        assert x_of(Path("plain"), empty, publisher=publisher().id) == x_in(SMALL)
        with pytest.raises(NotFoundError, match=r"no 'absent\.modelp2p'"):
            load("absent.modelp2p", home=empty.path)

    def test_a_bundle_that_is_none(self, tmp_path: Path, empty: Home) -> None:
        (tmp_path / "x.modelp2p").write_bytes(b"\x00" * 100)
        with pytest.raises(FormatError):
            load(tmp_path / "x.modelp2p", home=empty.path)


class TestLinks:
    def link(self) -> Link:
        return verify_statement(statement_of(SMALL)).link()

    def test_a_link_is_an_anchor(self, empty: Home) -> None:
        empty.add(statement_of(SMALL), SMALL, is_named=False)
        assert x_of(str(self.link()), empty) == x_in(SMALL)

    def test_absent(self, empty: Home) -> None:
        with pytest.raises(NotFoundError, match="not here"):
            load(str(self.link()), home=empty.path)

    def test_another_publishers_statement_about_the_same_bytes(self, empty: Home) -> None:
        empty.add(statement_of(SMALL, by="other"), SMALL, is_named=False)
        with pytest.raises(UntrustedError):
            load(str(self.link()), home=empty.path)
        empty.state(statement_of(SMALL))
        assert x_of(str(self.link()), empty) == x_in(SMALL)

    def test_link_and_publisher_must_agree(self, empty: Home) -> None:
        empty.add(statement_of(SMALL), SMALL, is_named=False)
        with pytest.raises(UnknownPublisherError):
            load(str(self.link()), home=empty.path, publisher=publisher("other").id)
