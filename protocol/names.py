"""Names of models, releases and publishers: parsed once, refused when odd, printed one way.

Invariants:
- a model name has one or two segments `[A-Za-z0-9][A-Za-z0-9._-]{0,95}` without `..` or `--` (docs/DESIGN.md); one segment lives
  under the organisation `_`, which no two-segment name can spell;
- a revision is 40 lower-case hex; a publisher id is `mp1` + 52 characters of lower-case unpadded base32.

The charset is the Hugging Face Hub's, so a name here is a name there.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from typing import NewType

from modelp2p.protocol.errors import FormatError, UsageError

Revision = NewType("Revision", str)
PublisherId = NewType("PublisherId", str)

BARE_ORG = "_"
_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[0-9a-f]{40}", re.ASCII)
_PUBLISHER = re.compile(r"mp1[a-z2-7]{52}", re.ASCII)


@dataclass(frozen=True, slots=True)
class ModelName:
    """`org/model`; `org` is `_` for a one-segment name."""

    org: str
    model: str

    def __post_init__(self) -> None:
        if self.org != BARE_ORG:
            _check_segment(self.org)
        _check_segment(self.model)
        if self.org.lower() == "by-publisher":
            # models/by-publisher/ is where releases of untrusted publishers appear (docs/DESIGN.md); in any case of letters,
            # because on a file system that folds case "By-Publisher" is the same folder.
            raise FormatError(f"the organisation name '{self.org}' is reserved", hint="Choose another organisation.")

    @classmethod
    def parse(cls, text: str) -> ModelName:
        """The name `text` spells.

        Raises:
            FormatError: not one or two legal segments.
        """
        segments = text.split("/")
        if len(segments) == 1:
            return cls(BARE_ORG, segments[0])
        if len(segments) != 2 or segments[0] == BARE_ORG:
            raise FormatError(f"'{text[:200]}' is not a model name", hint="A name is 'model' or 'org/model'.")
        return cls(segments[0], segments[1])

    def __str__(self) -> str:
        return self.model if self.org == BARE_ORG else f"{self.org}/{self.model}"


@dataclass(frozen=True, slots=True)
class NameRef:
    """A release asked for by name; without a revision, the current one."""

    name: ModelName
    revision: str | None

    def __str__(self) -> str:
        return str(self.name) if self.revision is None else f"{self.name}@{self.revision}"


@dataclass(frozen=True, slots=True)
class LinkRef:
    """A release asked for by link (`magnet:?...`)."""

    text: str


@dataclass(frozen=True, slots=True)
class BundleRef:
    """A release asked for by a bundle file; the path is the caller's own and never crosses the control socket."""

    path: str


Ref = NameRef | LinkRef | BundleRef


def parse_ref(text: str) -> Ref:
    """What kind of reference a user typed (docs/DESIGN.md).

    Raises:
        UsageError: empty, or neither a link, a bundle path nor a legal name.
    """
    if text.startswith("magnet:"):
        return LinkRef(text)
    if text.endswith(".modelp2p") or text.startswith(("./", "../", "/")):
        return BundleRef(text)
    name, at, revision = text.partition("@")
    try:
        parsed = ModelName.parse(name)
        return NameRef(parsed, _short_revision(revision) if at else None)
    except FormatError as exc:
        hint = "Use org/model, org/model@revision, a magnet link or a .modelp2p bundle."
        raise UsageError(exc.message, hint=hint) from exc


def check_revision(text: str) -> Revision:
    """`text` as a full revision.

    Raises:
        FormatError: not 40 lower-case hex digits.
    """
    if not _REVISION.fullmatch(text):
        raise FormatError(f"'{text[:80]}' is not a revision of 40 hex digits")
    return Revision(text)


def check_publisher_id(text: str) -> PublisherId:
    """`text` as a publisher id.

    Raises:
        FormatError: not `mp1` and 52 base32 characters.
    """
    if not _PUBLISHER.fullmatch(text):
        raise FormatError(f"'{text[:80]}' is not a publisher id", hint="A publisher id is mp1 and 52 letters or digits.")
    return PublisherId(text)


def publisher_id_of(first_root: bytes) -> PublisherId:
    """The self-certifying id of the publisher whose exact `1.root.json` bytes these are."""
    digest = hashlib.sha256(first_root).digest()
    return PublisherId("mp1" + base64.b32encode(digest).decode("ascii").rstrip("=").lower())


def _check_segment(segment: str) -> None:
    if not _SEGMENT.fullmatch(segment) or ".." in segment or "--" in segment:
        raise FormatError(
            f"'{segment[:120]}' is not a legal part of a model name",
            hint="Use letters, digits, '.', '_' and '-', at most 96, starting with a letter or digit.",
        )


def _short_revision(text: str) -> str:
    # Users paste shortened commits; 7 is the shortest git itself prints.
    if not re.fullmatch(r"[0-9a-f]{7,40}", text, re.ASCII):
        raise FormatError(f"'{text[:80]}' is not a revision (7 to 40 hex digits)")
    return text
