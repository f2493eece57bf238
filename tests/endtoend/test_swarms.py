"""More than two nodes: several seeds, several publishers, and the ways in which nodes find each other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.endtoend.site import MIB, Site, check_uploaded, fetched, inodes, model, size_of
from tests.nodes import tree_bytes, wait_until

pytestmark = pytest.mark.swarm


def test_two_seeds_share_the_work(site: Site) -> None:
    files = model("two", 2 * MIB, 3 * MIB)
    source = site.write(files)
    slow = {"max_up": 2 * MIB}
    one, two, node = site.node("one", slow), site.node("two", slow), site.node("node")
    published = one.publish(source, "lab/two")
    # The second seed had the files already: only the statement crosses the wire.
    adopted = two.ok("adopt", published["link"], str(source), "--peer", one.address)
    assert (adopted["adopted"], adopted["from_peers"]) == (size_of(files), 0)

    result = fetched(node, published, one, two)
    assert tree_bytes(Path(result["path"])) == files
    assert result["from_peers"] == size_of(files)

    def shares() -> list[int]:
        return [seed.release("lab/two")["uploaded"] for seed in (one, two)]

    wait_until(lambda: sum(shares()) >= size_of(files), 5, "both counted")
    assert min(shares()) >= MIB, shares()


def test_publishers_of_the_same_files_meet_in_one_swarm(site: Site) -> None:
    files = model("same", 3 * MIB)
    ours, theirs = site.node("ours"), site.node("theirs", {"max_up": 400_000})
    by_us = ours.publish(site.write(files), "lab/same")
    by_them = theirs.publish(site.write(files), "lab/same")
    assert by_us["publisher"] != by_them["publisher"]
    assert by_us["info_hash"] == by_them["info_hash"]
    assert by_us["manifest"] != by_them["manifest"]

    first, second = site.node("first"), site.node("second")
    fetched(first, by_us, ours)
    assert ours.stop() == 0
    # Whoever has only our statement serves whoever has only theirs: `theirs` is too slow to bring it all.
    result = fetched(second, by_them, first, theirs)
    assert result["publisher"] == by_them["publisher"]
    assert tree_bytes(Path(result["path"])) == files
    wait_until(lambda: first.release("lab/same")["uploaded"] > size_of(files) // 2, 5, "the other statement's node uploads")

    # The second statement about bytes that are here costs no byte of payload, and no second copy.
    again = fetched(first, by_them, theirs)
    assert (again["state"], again["from_peers"]) == ("complete", 0)
    assert first.ok("show", by_us["link"])["statements"] == 2
    assert set(inodes(again["path"]).values()) == set(inodes(first.ok("show", by_us["link"])["path"]).values())


def test_each_way_to_know_a_peer_is_enough(site: Site) -> None:
    files = model("way", MIB)
    seed = site.node("seed")
    link, address = seed.publish(site.write(files), "lab/way")["link"], seed.address
    peers_file = site.folder / "peers"
    peers_file.write_text(f"# the seed\n{address}\n")
    # No daemon runs here: the command brings one, says so, and takes it along.
    ways = {
        f"{link}&x.pe={address}": site.node("by-link", start=False),
        link: site.node("by-config", {"peers": [address]}, start=False),
        f"{link}&so=0": site.node("by-file", {"peers_file": str(peers_file)}, start=False),
    }
    with ThreadPoolExecutor(len(ways)) as pool:
        commands = {pool.submit(node.run, "fetch", ref, "--timeout", "20", "--json"): node for ref, node in ways.items()}
    for command, node in commands.items():
        done = command.result()
        assert done.code == 0, done.err
        assert "started one for this command" in done.err
        assert tree_bytes(Path(done.json["path"])) == files
        assert node.run("status").code == 8
    check_uploaded(seed, "lab/way", len(ways) * size_of(files))


def test_a_private_address_in_a_link_counts_only_inside_a_site(site: Site) -> None:
    seed = site.node("seed")
    published = seed.publish(site.write(model("private", MIB)), "lab/private")
    outside = {"profile": "wan", "dht": False, "trackers": False, "utp": False}
    node = site.node("node", outside, start=False)
    done = node.run("fetch", f"{published['link']}&x.pe={seed.address}", "--timeout", "2", "--json")
    assert done.code == 5
    assert done.json["error"]["code"] == 5
