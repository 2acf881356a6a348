"""What a Hub may say: the forms of its names, hashes, addresses and JSON. Pure: bytes in, data out.

Each reply that the client would read is parsed here first, and made again of the fields that are
used; so a field that nobody asked for reaches nobody, and one of a wrong type is an error here.

A hash that is missing or is none is written as "": the client takes any text there, and `lookup`
makes it None. What that means is for `fetch` to say.
"""

from __future__ import annotations

import ipaddress
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from nf4_pipeline.checkpoint.strict_json import MAX_CONTAINERS
from nf4_pipeline.printable import printable

Json = dict[str, Any]

COMMIT: Final = re.compile(r"[0-9a-f]{40}")
SHA256: Final = re.compile(r"[0-9a-f]{64}")
HASH: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
PULL_REQUEST: Final = re.compile(r"refs/pr/[1-9][0-9]{0,8}")

MOST_FILES: Final = 100_000
LONGEST_NAME: Final = 1_024  # characters of a path in a repo
_LONGEST_PART = 255  # bytes of a file's name, on the file systems that there are
_LONGEST_ADDRESS = 16_384
_LARGEST = 1 << 53  # bytes: what JSON holds exactly
_MOST_DIGITS = 20
_MOST_PARTS = 10_000  # of an upload, as S3 has it
_SHOWN = 80  # characters of what was wrong

_ETAG = re.compile(r'(?:W/)?("?)([0-9a-f]{40}|[0-9a-f]{64})\1')
# No user, no backslash, nothing that is not visible ASCII: what different parsers read alike.
_ADDRESS = re.compile(
    r"(?P<scheme>https?)://(?P<host>[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<rest>[/?#][!-\[\]-~]*)?",
    re.IGNORECASE,
)
_IN_NO_REVISION = ("..", "//", "@{", "/.", ".lock/", *" ~^:?*[\\")
_PULL_REQUEST_ADDRESS = re.compile(r".*/discussions/([1-9][0-9]{0,8})")
_PORTS = {"http": 80, "https": 443}


class ReplyError(Exception):
    """A Hub, or who stands in for it, said or did what no Hub does; `passing` if once may do.

    `address` is the one that was asked, as far as that is known.
    """

    address = ""

    def __init__(self, text: str, *, passing: bool = False) -> None:
        super().__init__(text)
        self.passing = passing


def shown(value: object) -> str:
    """A strange value for a message: short, and printable."""
    text = value if isinstance(value, str) else repr(value)[: 4 * _SHOWN]
    return f"'{printable(text, _SHOWN)}'" if isinstance(value, str) else printable(text, _SHOWN)


# Addresses.


@dataclass(frozen=True)
class Origin:
    """Where an address leads: scheme, host and port, the port as a number in any case."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        default = self.port == _PORTS.get(self.scheme)
        return f"{self.scheme}://{self.host}" + ("" if default else f":{self.port}")


def origin(address: str) -> Origin:
    """Where an address leads.

    Raises:
        ReplyError: the address is no plain http or https one, or names a user.
    """
    match = _ADDRESS.fullmatch(address) if len(address) <= _LONGEST_ADDRESS else None
    if match is None or not 0 <= int(match["port"] or 1) <= 65_535:
        raise ReplyError(f"named an address that is none: {shown(address)}")
    scheme = match["scheme"].lower()
    return Origin(scheme, match["host"].lower(), int(match["port"] or _PORTS[scheme]))


def check_target(address: str, endpoint: Origin) -> Origin:
    """Where an address leads that a Hub named, and that is asked without the token.

    Raises:
        ReplyError: the text is no address; the address goes from https to http; or a Hub out in
            the world names this machine or its network.
    """
    target = origin(address)
    if endpoint.scheme == "https" and target.scheme != "https":
        raise ReplyError(f"led from https to {target}, which is not encrypted")
    if _is_near(target.host) and not _is_near(endpoint.host):
        raise ReplyError(f"led to {target}, an address of this machine or its network")
    return target


def _is_near(host: str) -> bool:
    """Whether a host is this machine or its network, as far as the name says."""
    bare = host.strip("[]").rstrip(".")
    try:
        return not ipaddress.ip_address(bare).is_global
    except ValueError:
        last = bare.rpartition(".")[2]
        # 2130706433, 127.1 and 0x7f.1 are numbers to the resolver, too.
        return last in ("localhost", "local", "internal") or re.match(r"\d|0x", last) is not None


# Names and hashes.


def check_name(path: object) -> str:
    """The path of a file or folder in a repo, if it can be one on any disk.

    Raises:
        ReplyError: the name is no text, or empty, or absolute; leads out of its folder; holds
            backslashes, or characters that cannot be shown; or is too long.
    """
    if not isinstance(path, str):
        raise ReplyError(f"listed {shown(path)} in the place of a file's name")
    parts = path.split("/")
    if (
        len(path) > LONGEST_NAME
        or not path.isprintable()
        or "\\" in path
        or any(part in ("", ".", "..") for part in parts)
        or any(len(part.encode("utf-8", "surrogatepass")) > _LONGEST_PART for part in parts)
        or re.match(r"[A-Za-z]:", path)
        or parts[0].startswith("~")
    ):
        raise ReplyError(f"listed a file by a name that cannot be one: {shown(path)}")
    return path


def check_listing(files: Iterable[str]) -> None:
    """Whether these files can be in one folder.

    Raises:
        ReplyError: the listing has too many names, a name twice, or one that is a file and a
            folder.
    """
    paths: set[str] = set()
    for path in files:
        if path in paths:
            raise ReplyError(f"listed {shown(path)} twice")
        paths.add(path)
        if len(paths) > MOST_FILES:
            raise ReplyError(f"listed more than {MOST_FILES:,} files")
    for path in paths:
        parent = path.rpartition("/")[0]
        while parent:
            if parent in paths:
                raise ReplyError(f"listed {shown(parent)} as a file and as a folder")
            parent = parent.rpartition("/")[0]


def check_cases(files: Iterable[str]) -> None:
    """Whether each of these files has a place of its own where upper and lower case are the same.

    Raises:
        ReplyError: two have one.
    """
    places: dict[str, str] = {}
    for path in files:
        other = places.setdefault(unicodedata.normalize("NFC", path).casefold(), path)
        if other != path:
            raise ReplyError(f"listed {shown(other)} and {shown(path)}, one name on many disks")


def is_revision(name: str) -> bool:
    """Whether git takes this for the name of a branch, a tag or a commit."""
    return (
        0 < len(name) <= _LONGEST_PART
        and name.isprintable()
        and not name.startswith(("/", ".", "-"))
        and not name.endswith(("/", ".", ".lock"))
        and not any(part in name for part in _IN_NO_REVISION)
    )


def is_etag(text: str) -> bool:
    """Whether an ETag holds a hash and no more."""
    return _ETAG.fullmatch(text) is not None


def check_etag(text: str) -> str:
    """The hash in an ETag.

    Raises:
        ReplyError: the ETag holds no hash, or more than a hash.
    """
    match = _ETAG.fullmatch(text)
    if match is None:
        raise ReplyError(f"sent an ETag that is no hash: {shown(text)}")
    return match[2]


def check_commit(value: object) -> str:
    """A commit.

    Raises:
        ReplyError: the value is no text of 40 hex digits.
    """
    if not isinstance(value, str) or COMMIT.fullmatch(value) is None:
        raise ReplyError(f"expected a commit of 40 hex digits, got {shown(value)}")
    return value


# JSON.


def parsed(body: bytes, *, is_secret: bool = False) -> Any:
    """The JSON of a body; what of it is wrong is not shown if it `is_secret`.

    Raises:
        ReplyError: the body is no JSON; is nested too deep; holds more lists and objects than any
            page has; or numbers that are none, or that are longer than any size.
    """
    if body.count(b"[") + body.count(b"{") > MAX_CONTAINERS:
        raise ReplyError(f"answered with more than {MAX_CONTAINERS:,} lists and objects")
    try:
        return json.loads(body.decode("utf-8"), parse_int=_whole, parse_constant=_no_number)
    except (json.JSONDecodeError, UnicodeDecodeError):
        start = body[:_SHOWN].decode("utf-8", "replace")
        text = "answered with what is no JSON" if body else "answered nothing"
        shows = body and not is_secret
        raise ReplyError(f"{text}: {shown(start)}" if shows else text, passing=True) from None
    except RecursionError:
        raise ReplyError("answered with JSON that is nested too deep") from None


def _whole(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ReplyError(f"sent a number of {len(digits):,} digits")
    return int(digits)


def _no_number(name: str) -> float:
    raise ReplyError(f"sent {name} in the place of a number")


def _of(value: object, kind: type, what: str) -> Any:
    """The value, if it is of that very type: True is no number."""
    if type(value) is not kind:
        raise ReplyError(f"sent {shown(value)} in the place of {what}")
    return value


def _object(value: object, what: str) -> Json:
    found: Json = _of(value, dict, what)
    return found


def _list(value: object, what: str) -> list[Any]:
    found: list[Any] = _of(value, list, what)
    return found


def _size(value: object, what: str = "a size") -> int:
    number: int = _of(value, int, what)
    if not 0 <= number <= _LARGEST:
        raise ReplyError(f"sent {number:,} in the place of {what}")
    return number


def _text(value: object, what: str, limit: int = 1_000) -> str:
    return printable(_of(value, str, what), limit)


def _hash(value: object, form: re.Pattern[str]) -> str:
    return value if isinstance(value, str) and form.fullmatch(value) else ""


def model_info(value: Any) -> Json:
    """Of a look-up: the commit, and whether the repo is private.

    Raises:
        ReplyError: the reply is not of its form.
    """
    info = _object(value, "a model's facts")
    private = info.get("private")
    return {
        "id": _text(info.get("id", ""), "a model's name"),
        "sha": check_commit(info.get("sha")),
        "private": False if private is None else _of(private, bool, "a model's visibility"),
    }


def tree(value: Any) -> list[Json]:
    """A page of a listing.

    Raises:
        ReplyError: the reply is not of its form, or a name in it cannot be one.
    """
    return [_entry(_object(entry, "a file's entry")) for entry in _list(value, "a listing")]


def _entry(entry: Json) -> Json:
    path = check_name(entry.get("path"))
    if entry.get("type") == "directory":
        return {"type": "directory", "path": path, "oid": ""}
    if entry.get("type") != "file":
        raise ReplyError(f"listed {shown(path)} as {shown(entry.get('type'))}")
    found: Json = {
        "type": "file",
        "path": path,
        "size": _size(entry.get("size")),
        "oid": _hash(entry.get("oid"), COMMIT),
    }
    if entry.get("lfs") is not None:
        lfs = _object(entry["lfs"], "a file's LFS entry")
        sha256 = _hash(lfs.get("oid"), SHA256)
        found["lfs"] = {"oid": sha256, "size": _size(lfs.get("size")), "pointerSize": 0}
    return found


def discussions(value: Any) -> Json:
    """A page of pull requests.

    Raises:
        ReplyError: the reply is not of its form.
    """
    page = _object(value, "a page of pull requests")
    found = [
        _discussion(_object(each, "a pull request"))
        for each in _list(page.get("discussions"), "pull requests")
    ]
    start = _size(page.get("start"), "a place in a list")
    # An empty page is the last one, whatever is said to come: the client would ask for ever.
    count = _size(page.get("count"), "a count") if found else start
    return {"discussions": found, "start": start, "count": count}


def _discussion(value: Json) -> Json:
    number = _size(value.get("num"), "a pull request's number")
    author = value.get("author")
    name = author.get("name") if isinstance(author, dict) else None
    return {
        "num": number,
        "title": _text(value.get("title"), "a title"),
        "author": {"name": _text(name, "a user's name") if name is not None else "deleted"},
        "status": _text(value.get("status"), "a pull request's status", _SHOWN),
        "isPullRequest": value.get("isPullRequest") is True,
        # The client parses these, and nobody reads them.
        "createdAt": "2000-01-01T00:00:00.000Z",
        "repo": {"name": "", "type": "model"},
    }


def preupload(value: Any) -> Json:
    """How each file is to be sent.

    Raises:
        ReplyError: the reply is not of its form.
    """
    files = [
        _object(each, "a file's way")
        for each in _list(_object(value, "the files' ways").get("files"), "the files' ways")
    ]
    return {"files": [_way(file) for file in files]}


def _way(file: Json) -> Json:
    mode = file.get("uploadMode")
    if mode not in ("lfs", "regular"):
        raise ReplyError(f"sent {shown(mode)} in the place of a way to send a file")
    return {
        "path": _of(file.get("path"), str, "a file's name"),
        "uploadMode": mode,
        "shouldIgnore": file.get("shouldIgnore") is True,
        "oid": _hash(file.get("oid"), HASH) or None,
    }


def lfs_batch(value: Any, endpoint: Origin) -> Json:
    """Where the bytes of files are to be sent.

    Raises:
        ReplyError: the reply is not of its form; it names an address that is none; or the one that
            would get the token is not of this Hub.
    """
    batch = _object(value, "the places to send files to")
    objects = _list(batch.get("objects"), "the places to send files to")
    return {"objects": [_lfs_object(_object(each, "a file's place"), endpoint) for each in objects]}


def _lfs_object(value: Json, endpoint: Origin) -> Json:
    found: Json = {"oid": _hash(value.get("oid"), SHA256), "size": _size(value.get("size"))}
    if value.get("error") is not None:
        error = _object(value["error"], "an error")
        code = _size(error.get("code"), "an error's number")
        return found | {"error": {"code": code, "message": _text(error.get("message"), "an error")}}
    if value.get("actions") is None:
        return found
    actions = _object(value["actions"], "a file's place")
    upload = _object(actions.get("upload"), "a file's place")
    found["actions"] = {"upload": {"href": _target(upload.get("href"), endpoint)}}
    if upload.get("header") is not None:
        header = _object(upload["header"], "the parts of an upload")
        if "chunk_size" in header:
            found["actions"]["upload"]["header"] = _parts(header, endpoint)
    if actions.get("verify") is not None:
        href = _object(actions["verify"], "a place to ask").get("href")
        own_address(_of(href, str, "an address"), endpoint)
        found["actions"]["verify"] = {"href": href}
    return found


def _parts(header: Json, endpoint: Origin) -> Json:
    size = header["chunk_size"]
    if not isinstance(size, str | int) or not re.fullmatch(r"[1-9][0-9]{0,14}", str(size)):
        raise ReplyError(f"sent {shown(size)} in the place of a part's size")
    parts = {
        name: _target(url, endpoint)
        for name, url in header.items()
        if re.fullmatch(r"[0-9]{1,5}", name)
    }
    if len(parts) > _MOST_PARTS:
        raise ReplyError(f"asked for {len(parts):,} parts")
    return {"chunk_size": str(size), **parts}


def _target(href: object, endpoint: Origin) -> str:
    address: str = _of(href, str, "an address")
    check_target(_by_endpoint(address, endpoint), endpoint)
    return address


_ANY_HUB = re.compile(r"https://(?:hub-ci\.)?huggingface\.co(?=/)")


def _by_endpoint(address: str, endpoint: Origin) -> str:
    """The address as the client asks it: the public Hub's name stands for the one that is set."""
    return _ANY_HUB.sub(str(endpoint), address, count=1)


def own_address(address: str, endpoint: Origin) -> None:
    """Whether an address is the Hub's own, so that it may have the token.

    Raises:
        ReplyError: the address is on another scheme, host or port than the endpoint.
    """
    target = origin(_by_endpoint(address, endpoint))
    if target != endpoint:
        raise ReplyError(
            f"named {target}, and not itself, in an address that is asked with the token"
        )


def commit(value: Any, repo_url: str) -> Json:
    """The commit that was made, and its pull request.

    Raises:
        ReplyError: the reply is not of its form.
    """
    made = _object(value, "a commit")
    oid = check_commit(made.get("commitOid"))
    found: Json = {"commitUrl": f"{repo_url}/commit/{oid}", "commitOid": oid}
    if made.get("pullRequestUrl") is not None:
        address = _of(made["pullRequestUrl"], str, "a pull request's address")
        match = _PULL_REQUEST_ADDRESS.fullmatch(address)
        if match is None:
            raise ReplyError(f"sent {shown(address)} in the place of a pull request's address")
        found["pullRequestUrl"] = f"{repo_url}/discussions/{match[1]}"
    return found


def created(value: Any) -> Json:
    """The repo that was created.

    Raises:
        ReplyError: the reply is not of its form.
    """
    url = _of(_object(value, "a repo").get("url"), str, "a repo's address")
    origin(url)
    return {"url": url}


def card(value: Any) -> Json:
    """What is wrong with a model card.

    Raises:
        ReplyError: the reply is not of its form.
    """
    found = _object(value, "a card's faults")
    return {kind: _messages(found.get(kind)) for kind in ("errors", "warnings")}


def _messages(value: object) -> list[Json]:
    texts = (
        [each.get("message") if isinstance(each, dict) else each for each in value[:100]]
        if isinstance(value, list)
        else []
    )
    return [{"message": printable(text, 500)} for text in texts if isinstance(text, str)]


def fault(body: bytes, content_type: str) -> Json:
    """What a refusal says, whatever its form is: texts only, and short ones."""
    try:
        value = parsed(body)
    except ReplyError:
        text = body.decode("utf-8", "replace")
        return {} if "html" in content_type.lower() or not text else {"error": printable(text)}
    if not isinstance(value, dict):
        return {}
    found: Json = {}
    error = value.get("error")
    texts = error if isinstance(error, list) else [error, value.get("error_description")]
    words = [printable(text) for text in texts[:10] if isinstance(text, str) and text]
    if words:
        found["error"] = ": ".join(words)
    found |= card(value)
    if isinstance(value.get("url"), str) and _ADDRESS.fullmatch(value["url"]):
        found["url"] = value["url"]  # a repo that is there already
    return found


# Tokens. What is wrong with one is said without it.

_TOKEN = re.compile(r"[!-~]{1,16384}")
_JWT = re.compile(r"[A-Za-z0-9_-]{2,}(\.[A-Za-z0-9_-]{2,}){2}")
_LONGEST_LIFE = 24 * 3600  # seconds; a Hub's are an hour


def id_token(value: Any) -> Json:
    """The id token that a CI's issuer made.

    Raises:
        ReplyError: the reply is not of its form.
    """
    token = _object(value, "an id token").get("value")
    if not (isinstance(token, str) and len(token) <= 16_384 and _JWT.fullmatch(token)):
        raise ReplyError("answered without an id token")
    return {"value": token}


def exchanged(value: Any) -> Json:
    """The token that an identity was exchanged for.

    Raises:
        ReplyError: the reply is not of its form.
    """
    found = _object(value, "a token")
    token, life = found.get("access_token"), found.get("expires_in", 3600)
    if not (isinstance(token, str) and _TOKEN.fullmatch(token)):
        raise ReplyError("exchanged an identity for what is no token")
    kind = found.get("token_type", "bearer")
    if not (isinstance(kind, str) and kind.lower() == "bearer"):
        raise ReplyError("exchanged an identity for a token of another kind than bearer")
    if isinstance(life, bool) or not isinstance(life, int) or not 0 < life <= _LONGEST_LIFE:
        raise ReplyError("exchanged an identity for a token without an end")
    return {"access_token": token, "token_type": "bearer", "expires_in": life}


def number(text: str | None, most: int) -> int | None:
    """A header's number of ASCII digits, no larger than `most`; None if it is none."""
    match = re.fullmatch(r" *([0-9]{1,15}) *", text or "")
    return min(int(match[1]), most) if match else None


READERS: Final[tuple[tuple[str, re.Pattern[str], Callable[[Any], Any]], ...]] = tuple(
    (method, re.compile(pattern), reader)
    for method, pattern, reader in (
        ("POST", r"/oauth/token", exchanged),
        ("GET", r"/api/models/[^?]+/tree/[^/?]+/?", tree),
        ("GET", r"/api/models/[^?]+/discussions", discussions),
        ("POST", r"/api/models/[^?]+/preupload/[^/?]+", preupload),
        ("POST", r"/api/validate-yaml", card),
        ("POST", r"/api/repos/create", created),
        ("GET", r"/api/models/[^/?]+(/[^/?]+)?(/revision/[^/?]+)?", model_info),
    )
)
"""Which reply is read how, by method and path; those of commits and LFS need the Hub's address."""


def read(method: str, path: str, body: bytes, endpoint: Origin, root: str) -> bytes:
    """A reply with nothing in it but what is of its form.

    Args:
        method: of the request.
        path: of the request, below the Hub's own address.
        body: what came.
        endpoint: where the Hub is.
        root: the Hub's address, with the path that it may have.

    Raises:
        ReplyError: the reply is not of its form.
    """
    if method == "POST" and (match := re.fullmatch(r"/api/models/(.+)/commit/[^/?]+", path)):
        return written(commit(parsed(body), f"{root}/{match[1]}"))
    if method == "POST" and path.endswith(".git/info/lfs/objects/batch"):
        return written(lfs_batch(parsed(body), endpoint))
    for verb, pattern, reader in READERS:
        if verb == method and pattern.fullmatch(path):
            return written(reader(parsed(body, is_secret=reader is exchanged)))
    return b""  # nobody reads it: an upload's, a verification's, that of a Xet token


def written(value: Mapping[str, Any] | list[Json]) -> bytes:
    """JSON as a Hub sends it."""
    return json.dumps(value).encode()
