"""The documentation says what the program does: commands, links, exit codes, verbs and messages are looked up in the code."""

from __future__ import annotations

import ast
import json
import re
import shlex
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import NamedTuple, get_args

import click
import pytest

from modelp2p.cli.main import cli
from modelp2p.protocol import engine_wire, layout
from modelp2p.protocol.errors import Kind
from modelp2p.protocol.manifest import FileEntry, Manifest

ROOT = Path(__file__).resolve().parents[1]
PAGES = tuple(sorted((*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))))
PROGRAM = "modelp2p"
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_ENDS_COMMAND = frozenset({"&", "&&", "|", ">", "<", ";", "||"})


class Mention(NamedTuple):
    """One command line of ours in a page: the words after `modelp2p`."""

    page: str
    words: tuple[str, ...]


def commands_in(text: str) -> list[tuple[str, ...]]:
    """The command lines of ours in a page's code blocks and inline code."""
    lines = [line for block in _FENCE.findall(text) for line in block.splitlines()[1:-1]]
    lines += _INLINE.findall(_FENCE.sub("", text))
    return [words for line in lines if PROGRAM in line and (words := _words_of(line))]


def _words_of(line: str) -> tuple[str, ...]:
    try:
        tokens = shlex.split(line.rstrip("\\"), comments=True)
    except ValueError:
        return ()
    # `sudo -u modelp2p modelp2p status`: the last one that has something behind it is the program.
    starts = [at for at, token in enumerate(tokens[:-1]) if token == PROGRAM or token.endswith(f"bin/{PROGRAM}")]
    if not starts:
        return ()
    words = tokens[starts[-1] + 1 :]
    end = next((at for at, token in enumerate(words) if token in _ENDS_COMMAND), len(words))
    return tuple(words[:end])


def objection(words: tuple[str, ...]) -> str:
    """Why the program would not take these words; empty where it would."""
    command: click.Command = cli
    rest = list(words)
    if rest and rest[0].isupper():
        return ""  # a placeholder: `modelp2p VERB --help`
    while isinstance(command, click.Group):
        if rest and rest[0].startswith("-"):
            break
        if not rest:
            return ""  # a group by itself: `modelp2p keys`
        found = command.get_command(click.Context(command), rest.pop(0))
        if found is None:
            return f"there is no '{' '.join(words)}'"
        command = found
    known = {opt for param in command.params for opt in (*param.opts, *param.secondary_opts)} | {"--help", "-h"}
    wrong = [flag for word in rest if word.startswith("-") and (flag := word.partition("=")[0]) not in known]
    return f"'{command.name}' takes no {', '.join(wrong)}" if wrong else ""


MENTIONS = tuple(
    Mention(page.relative_to(ROOT).as_posix(), words)
    for page in PAGES
    for words in dict.fromkeys(commands_in(page.read_text(encoding="utf-8")))
)


def test_every_command_of_the_documentation_exists() -> None:
    wrong = [f"{mention.page}: {why}" for mention in MENTIONS if (why := objection(mention.words))]
    assert not wrong, "\n".join(wrong)
    assert {"README.md", "docs/OPERATIONS.md"} <= {mention.page for mention in MENTIONS}


PLANTED = {
    "a verb that does not exist": "```\nmodelp2p teleport org/model\n```",
    "a flag that does not exist": '```\nmodelp2p fetch "$LINK" --faster\n```',
    "a flag behind a prompt": "```\nsudo -u modelp2p modelp2p status --loud\n```",
    "a sub-verb that does not exist": "```\nmodelp2p trust guess\n```",
    "inline": "Run `modelp2p rm REF --force`.",
}


@pytest.mark.parametrize("text", PLANTED.values(), ids=PLANTED)
def test_a_wrong_command_is_noticed(text: str) -> None:
    (words,) = commands_in(text)
    assert objection(words)


def test_every_relative_link_leads_somewhere() -> None:
    wrong = []
    for page in PAGES:
        for target in _LINK.findall(_INLINE.sub("", _FENCE.sub("", page.read_text(encoding="utf-8")))):
            if "://" in target:
                continue
            path, _, anchor = target.partition("#")
            there = (page.parent / path).resolve() if path else page
            if not there.exists():
                wrong.append(f"{page.relative_to(ROOT)}: {target}: no such file")
            elif anchor and anchor not in _anchors(there.read_text(encoding="utf-8")):
                wrong.append(f"{page.relative_to(ROOT)}: {target}: no such heading")
    assert not wrong, "\n".join(wrong)


def _anchors(text: str) -> set[str]:
    """The anchors that a page's headings get on the usual hosts: lower case, words joined by hyphens."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_path_of_the_code_that_a_page_names_exists() -> None:
    wrong = []
    for page in PAGES:
        for code in _INLINE.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
            is_path = re.fullmatch(r"(protocol|daemon|loader|cli|configs|tests|docs)/[\w./-]*", code)
            if is_path and not (ROOT / code).exists():
                wrong.append(f"{page.relative_to(ROOT)}: {code}")
    assert not wrong, "\n".join(wrong)


def test_every_exit_code_is_in_the_command_line_page() -> None:
    text = _page("CLI.md")
    missing = [kind.name for kind in Kind if not re.search(rf"\b{kind.exit_code}\b", text)]
    assert not missing


def test_every_exit_code_is_in_the_troubleshooting_table() -> None:
    codes = {int(number) for cell in re.findall(r"^\| ([\d, ]+) \|", _page("OPERATIONS.md"), re.M) for number in cell.split(",")}
    assert {kind.exit_code for kind in Kind} <= codes


def test_every_control_verb_is_in_the_protocol_page() -> None:
    verbs = _verbs(ast.parse((ROOT / "daemon/service.py").read_text(encoding="utf-8")))
    assert {"fetch", "status", "publish_commit"} <= verbs
    assert set(re.findall(r"^\| `(\w+)` \|", _section("Verbs"), re.M)) == verbs


def _verbs(tree: ast.AST) -> set[str]:
    """The keys of the one table of verbs: the assignment to `self._verbs`."""
    for node in ast.walk(tree):
        match node:
            case ast.AnnAssign(target=ast.Attribute(attr="_verbs"), value=ast.Dict(keys=keys)):
                return {key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}
            case _:
                pass
    raise AssertionError("daemon/service.py has no table of verbs")


VALUES = (
    engine_wire.Peer,
    engine_wire.TorrentFile,
    engine_wire.TorrentSpec,
    engine_wire.MagnetSpec,
    engine_wire.EngineSettings,
    engine_wire.PeerStatus,
)


@pytest.mark.parametrize("kind", [*VALUES, *get_args(engine_wire.Message)], ids=lambda kind: kind.__name__)
def test_every_engine_message_is_in_the_protocol_page_with_its_fields(kind: type) -> None:
    rows = re.findall(rf"^\| `{kind.__name__}` \|([^|]*)\|", _section("22. Engine messages"), re.M)
    assert len(rows) == 1
    assert is_dataclass(kind)
    assert re.findall(r"`(\w+)` (?:hash|str|int|bool|bin|bitmap|\[|[A-Z])", rows[0]) == [item.name for item in fields(kind)]


@pytest.mark.parametrize(("kind", "heading"), [(Manifest, "6. Manifest"), (FileEntry, "6. Manifest")])
def test_every_signed_field_is_in_the_protocol_page(kind: type, heading: str) -> None:
    assert is_dataclass(kind)
    described = set(re.findall(r"^\| `(\w+)` \|", _section(heading), re.M))
    assert {item.name for item in fields(kind) if not item.name.startswith("_")} <= described


def test_the_golden_values_of_the_protocol_page_are_those_of_the_vectors() -> None:
    expected = json.loads((ROOT / "tests/protocol/golden.json").read_text(encoding="utf-8"))["expected"]
    text = _section("25. Golden vectors")
    rows = dict(re.findall(r"^\| `(\w+)` \|[^|]*\| `(\w+)` \|$", text, re.M))
    values = {key: value for key, value in rows.items() if key in expected}
    assert len(values) > 10
    assert values == {key: expected[key] for key in values}
    assert expected["link"] in text


def test_the_folders_of_a_home_are_in_the_protocol_page() -> None:
    text = _section("15. Home")
    for name in (
        layout.DATA,
        layout.STORE,
        layout.MANIFESTS,
        layout.MODELS,
        layout.JOURNAL,
        layout.JOBS,
        layout.PINS,
        layout.TRUST,
        layout.KEYS,
        layout.LOCK,
    ):
        assert f"| `{name}" in text


def _page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def _section(heading: str) -> str:
    """One section of docs/PROTOCOL.md, up to the next heading of its level or above; sub-sections are part of it."""
    lines = _page("PROTOCOL.md").splitlines()
    start = next(at for at, line in enumerate(lines) if re.fullmatch(rf"#+ {re.escape(heading)}", line))
    level = len(lines[start]) - len(lines[start].lstrip("#"))
    end = next((at for at, line in enumerate(lines) if at > start and re.match(rf"#{{1,{level}}} ", line)), len(lines))
    return "\n".join(lines[start:end])
