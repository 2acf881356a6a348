"""A Hub that means harm: what it says, where it leads, and how much it sends.

Each case must end with an error of ours before long, or right; write nothing outside the cache;
bring the token to nobody else; leave no half file; and print nothing but plain text.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, count, repeat
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support.stranger import (
    COMMIT,
    FILES,
    REPO,
    TOKEN,
    WEIGHTS,
    Asked,
    Outcome,
    Reply,
    Stranger,
    Twist,
    Victim,
    dripping,
)

LOOK_UP = f"/api/models/{REPO}/revision/*"
TREE = f"/api/models/{REPO}/tree/*"
RESOLVE = f"/{REPO}/resolve/*"
SHA256 = hashlib.sha256(FILES[WEIGHTS]).hexdigest()
Change = Callable[[Reply], Reply]
SECONDS: Final = 120  # until it counts as hanging: the client may wait 23 by itself


@pytest.fixture(scope="module")
def stranger() -> Iterator[Stranger]:
    with Stranger() as server:
        yield server


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the user has: a process that asks beside files that are none of a Hub's business."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "precious").mkdir()
    (folder / "precious" / "bashrc").write_text("export PRECIOUS=1\n")
    (folder / "precious" / "weights").write_bytes(FILES[WEIGHTS])
    return folder


@pytest.fixture(scope="module")
def process(stranger: Stranger, world: Path) -> Iterator[Victim]:
    with Victim(world / "victim", stranger.url) as victim:
        assert victim.do("download").error == ""
        yield victim


@pytest.fixture
def victim(stranger: Stranger, process: Victim) -> Iterator[Victim]:
    stranger.reset()
    process.forget()
    yield process
    process.forget()


def outside(world: Path, victim: Victim) -> dict[str, bytes]:
    """Every file that is not in the cache."""
    found: dict[str, bytes] = {}
    for folder, _, names in os.walk(world):
        if not Path(folder).is_relative_to(victim.cache):
            found |= {f"{folder}/{name}": (Path(folder) / name).read_bytes() for name in names}
    return found


def harmless(
    stranger: Stranger, victim: Victim, world: Path, what: str = "download", **options: Any
) -> Outcome:
    """Gives an order, and looks at all that must hold whatever comes of it."""
    before = outside(world, victim)
    outcome = victim.do(what, **options)
    assert outside(world, victim) == before
    assert stranger.leaked() == []
    assert not list(victim.cache.rglob("*.incomplete"))
    assert outcome.seconds < SECONDS
    assert outcome.memory < 1_000_000_000
    for text in (outcome.message, *outcome.notes):
        assert text.isprintable()
        assert TOKEN not in text
        assert len(text) < 5_000
    return outcome


def refused(outcome: Outcome, text: str = "") -> None:
    assert outcome.error in ("HubError", "NotFoundError"), outcome
    assert text in outcome.message


def right(outcome: Outcome) -> None:
    assert outcome.error == "", outcome.message
    assert outcome.value["sha256"] == {
        path: hashlib.sha256(data).hexdigest() for path, data in FILES.items()
    }


def header(name: str, value: str | None) -> Change:
    return lambda reply: reply.with_header(name, value)


# 1. A text that is used as a path.


def etags(world: Path) -> list[str]:
    new, old = world / "precious" / "new", world / "precious" / "bashrc"
    return [
        str(new),
        str(old),
        f'"{old}"',
        f'W/"{old}"',
        f"W/{old}",
        "../../../../precious/new",
        f'"../../{"a" * 64}"',
        "../refs/main",
        "..",
        ".",
        "",
        '""',
        "WWWW///",
        "a" * 39,
        "a" * 41,
        "a" * 63,
        "a" * 65,
        "A" * 64,
        "g" * 64,
        f"{'a' * 64}/../../../x",
        f'"{"a" * 64}" "{"b" * 64}"',
        f"{'a' * 64}\\..\\x",
        f"{'a' * 64}\x7f",
        "ａ" * 64,
        "a" * 9_000,
        "d41d8cd98f00b204e9800998ecf8427e-5",
        "~/.bashrc",
        "C:\\Windows\\x",
        "a" * 64,  # a hash, and not this file's
    ]


@pytest.mark.parametrize("number", range(29))
@pytest.mark.parametrize("path", ["config.json", WEIGHTS])
def test_an_etag_that_is_no_hash_of_the_file(
    stranger: Stranger, victim: Victim, world: Path, number: int, path: str
) -> None:
    etag = etags(world)[number]
    name = "ETag" if path == "config.json" else "X-Linked-Etag"
    stranger.twists.append(Twist("HEAD", f"*/{path}", header(name, etag)))
    refused(harmless(stranger, victim, world))
    refused(harmless(stranger, victim, world, only=[path]))


@pytest.mark.parametrize("number", [0, 1, 5])
def test_an_etag_in_a_forced_second_try(
    stranger: Stranger, victim: Victim, world: Path, number: int
) -> None:
    """The first answer gives wrong bytes, and the second, which replaces, the path."""
    heads = count()

    def change(reply: Reply) -> Reply:
        first = next(heads) == 0
        return reply if first else reply.with_header("X-Linked-Etag", etags(world)[number])

    stranger.twists += [
        Twist("HEAD", f"*/{WEIGHTS}", change),
        Twist(
            "GET", "/blobs/*", lambda r: replace(r, body=b"\0" * len(FILES[WEIGHTS])), port="cdn"
        ),
    ]
    refused(harmless(stranger, victim, world, only=[WEIGHTS]))


def test_good_etags_of_every_form(stranger: Stranger, victim: Victim, world: Path) -> None:
    forms: list[Callable[[str], str]] = [str, '"{}"'.format, 'W/"{}"'.format]
    for form in forms:
        victim.forget()
        stranger.twists = [Twist("HEAD", f"*/{WEIGHTS}", header("X-Linked-Etag", form(SHA256)))]
        right(harmless(stranger, victim, world))


COMMITS = [
    "",
    "main",
    "../../x",
    "/tmp/x",
    "C" * 40,
    "c" * 39,
    "c" * 41,
    "c" * 64,
    f"{COMMIT}/..",
    "é" * 40,
]
NAMES = [
    "../x.json", "/etc/x", "a/../../x", "./x", "a//b", "a/", "/", "", ".", "..", "a/..", "x\\y",
    "..\\x", "x\ny", "x\0y", "x\x1b[2Jy", "x\x7f", "x\u202ey", "x\u2028y", "\ud800", "a" * 300,
    "/".join(["a" * 200] * 8), "C:x", "~/x", "~root/x", "x\u200b", "\ufeffconfig.json",
]  # fmt: skip


@pytest.mark.parametrize("commit", [*COMMITS, None, 7, True, ["c" * 40], {"a": 1}, "d" * 40 + "\n"])
def test_a_look_up_of_no_commit(
    stranger: Stranger, victim: Victim, world: Path, commit: object
) -> None:
    stranger.twists.append(
        Twist("GET", LOOK_UP, lambda r: r.changed(lambda j: j | {"sha": commit}))
    )
    refused(harmless(stranger, victim, world))


@pytest.mark.parametrize("commit", [*COMMITS, "d" * 40])
@pytest.mark.parametrize("status", [200, 404])
def test_a_file_of_another_commit(
    stranger: Stranger, victim: Victim, world: Path, commit: str, status: int
) -> None:
    def change(reply: Reply) -> Reply:
        return replace(reply.with_header("X-Repo-Commit", commit), status=status)

    stranger.twists += [
        Twist("HEAD", "*/config.json", change),
        Twist("HEAD", "*/config.json", header("X-Error-Code", "EntryNotFound")),
    ]
    refused(harmless(stranger, victim, world))


@pytest.mark.parametrize("name", [*NAMES, None, 7, True, ["a"]])
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_name_that_cannot_be_one(
    stranger: Stranger, victim: Victim, world: Path, name: object, kind: str
) -> None:
    entry = {"type": kind, "path": name, "size": 1, "oid": "a" * 40}
    stranger.twists.append(Twist("GET", TREE, lambda r: r.changed(lambda j: [*j, entry])))
    refused(harmless(stranger, victim, world))


@pytest.mark.parametrize(
    "names",
    [
        ("config.json",),
        ("config.json/x",),
        ("a", "a/b"),
        ("a/b/c", "a"),
        ("Config.json",),
        ("CONFIG.JSON",),
        ("Straße", "STRASSE"),
        ("é", "e\u0301"),
    ],
)
def test_names_that_cannot_be_together(
    stranger: Stranger, victim: Victim, world: Path, names: tuple[str, ...]
) -> None:
    entries = [{"type": "file", "path": n, "size": 1, "oid": "a" * 40} for n in names]
    stranger.twists.append(Twist("GET", TREE, lambda r: r.changed(lambda j: [*j, *entries])))
    refused(harmless(stranger, victim, world), "listed")


LOCATIONS = [
    "file:///etc/passwd", "ftp://127.0.0.1/x", "//", "http://", "http://:80/x", "javascript:1",
    "http://a b/", "http://x:99999/", "http://x:port/", "http://me:pw@{evil}/blobs/x",
    "http://{home}@{evil}/x", "http://{evil}\\@{home}/x", "data:,x", "http://[::1", "x" * 20_000,
    "http://{evil}/\u202e", "local:///tmp/x", "unix:///run/x.sock",
]  # fmt: skip


def filled(text: str, stranger: Stranger) -> str:
    parts = {port: stranger.at(port).removeprefix("http://") for port in ("home", "evil", "cdn")}
    for port, where in parts.items():
        text = text.replace(f"{{{port}}}", where)
    return text


@pytest.mark.parametrize("number", range(len(LOCATIONS)))
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_redirect_that_leads_nowhere(
    stranger: Stranger, victim: Victim, world: Path, number: int, method: str
) -> None:
    where = filled(LOCATIONS[number], stranger)
    change: Change = lambda r: replace(r, status=302).with_header("Location", where)  # noqa: E731
    stranger.twists.append(Twist(method, RESOLVE, change))
    refused(harmless(stranger, victim, world))
    assert all(asked.port != "evil" for asked in stranger.asked)


# 2. The token is for the Hub alone.


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("path", [LOOK_UP, TREE])
def test_an_answer_from_elsewhere_is_not_taken(
    stranger: Stranger, victim: Victim, world: Path, status: int, path: str
) -> None:
    where = f"{stranger.at('evil')}/api/models/{REPO}/revision/main"
    change: Change = lambda r: Reply(status, (("Location", where),))  # noqa: E731
    stranger.twists.append(Twist("GET", path, change))
    refused(harmless(stranger, victim, world), "led to")
    assert all(asked.port == "home" for asked in stranger.asked)


NEXT = [
    "{evil}/x", "http://{evil}/x", "HTTP://{evil}/x", "http://{home}.evil/x", "//{evil}/x",
    "http://{home}@{evil}/x", "http://user@{home}/x", "https://{home}/x", "http://LOCALHOST/x",
    "http://127.0.0.1/x", "http://127.0.0.1.:1/x", "http://127.1:1/x", "http://2130706433/x",
    "file:///etc/passwd", "", " ", "/relative", "http://{cdn}/x", "https://huggingface.co.evil/x",
    "https://huggingface.co@{evil}/x",
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(NEXT)))
def test_a_next_page_elsewhere(
    stranger: Stranger, victim: Victim, world: Path, number: int
) -> None:
    link = f'<{filled(NEXT[number], stranger)}>; rel="next"'
    stranger.twists.append(Twist("GET", TREE, header("Link", link)))
    outcome = harmless(stranger, victim, world)
    refused(outcome)
    assert all(asked.port == "home" for asked in stranger.asked)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_file_elsewhere_is_asked_without_the_token(
    stranger: Stranger, victim: Victim, world: Path, status: int, method: str
) -> None:
    """By way of two others, and back to the Hub, where the token belongs again."""
    where = f"{stranger.at('evil')}/blobs/{SHA256}"
    further = f"{stranger.at('cdn')}/blobs/{SHA256}"
    stranger.twists += [
        Twist(
            method,
            f"*/{WEIGHTS}",
            lambda r: replace(r, status=status).with_header("Location", where),
        ),
        Twist("GET", "/blobs/*", lambda r: Reply(status, (("Location", further),)), port="evil"),
        Twist("*", "*", header("Set-Cookie", "a=b; Path=/"), port="home"),
        Twist("*", "*", header("Set-Cookie", "c=d; Path=/"), port="evil"),
    ]
    right(harmless(stranger, victim, world))
    assert any(asked.port == "evil" for asked in stranger.asked) or method == "GET"
    for asked in stranger.asked:
        assert "cookie" not in asked.headers
        assert ("authorization" in asked.headers) == (asked.port == "home")


PUSHED = {WEIGHTS: "some weights", "config.json": "{}"}


def serves(stranger: Stranger) -> None:
    """After the commit, the listing holds what was pushed."""
    pushed = {name: text.encode() for name, text in PUSHED.items()}

    def change(reply: Reply) -> Reply:
        stranger.files = pushed if stranger.head != COMMIT else dict(FILES)
        return reply.with_json([stranger.entry(path) for path in sorted(stranger.files)])

    stranger.twists.append(Twist("GET", TREE, change))


def test_a_push_that_goes_well(stranger: Stranger, victim: Victim, world: Path) -> None:
    serves(stranger)
    outcome = harmless(stranger, victim, world, "publish", files=PUSHED)
    assert outcome.error == "", outcome.message
    assert outcome.value == {"commit": "d" * 40, "branch": "main"}
    uploads = [asked for asked in stranger.asked if asked.method == "PUT"]
    assert [asked.body.decode() for asked in uploads] == ["some weights"]
    assert all("authorization" not in asked.headers for asked in uploads)


VERIFY = [*NEXT, "http://{evil}/verify"]


@pytest.mark.parametrize("number", range(len(VERIFY)))
def test_a_place_to_verify_elsewhere(
    stranger: Stranger, victim: Victim, world: Path, number: int
) -> None:
    href = filled(VERIFY[number], stranger)

    def change(batch: Any) -> Any:
        batch["objects"][0]["actions"]["verify"]["href"] = href
        return batch

    serves(stranger)
    stranger.twists.append(Twist("POST", "*/objects/batch", lambda r: r.changed(change)))
    refused(harmless(stranger, victim, world, "publish", files=PUSHED))
    assert all(asked.port != "evil" for asked in stranger.asked)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("path", ["/verify", "*/objects/batch", "*/preupload/*", "*/commit/*"])
def test_a_push_that_is_sent_elsewhere(
    stranger: Stranger, victim: Victim, world: Path, path: str, status: int
) -> None:
    def change(_: Reply) -> Reply:
        stranger.head = COMMIT  # nothing was committed
        return Reply(status, (("Location", f"{stranger.at('evil')}/x"),))

    serves(stranger)
    stranger.twists.append(Twist("POST", path, change))
    refused(harmless(stranger, victim, world, "publish", files=PUSHED))
    assert all(asked.port != "evil" for asked in stranger.asked)


XET = [
    ("X-Xet-Refresh-Route", "http://{evil}/token"),
    ("Link", '<http://{evil}/token>; rel="xet-auth"'),
    ("X-Xet-Refresh-Route", "http://{home}@{evil}/token"),
    ("X-Xet-Refresh-Route", "file:///etc/passwd"),
    ("X-Xet-Refresh-Route", "https://huggingface.co.evil/x"),
    ("X-Xet-Hash", "../../x"),
    ("X-Xet-Hash", "a" * 63),
    ("X-Xet-Hash", "a" * 65),
]


@pytest.mark.parametrize("name_and_value", XET)
def test_xet_facts_that_lead_elsewhere(
    stranger: Stranger, victim: Victim, world: Path, name_and_value: tuple[str, str]
) -> None:
    name, value = name_and_value
    route = f"{stranger.url}/api/models/{REPO}/xet-read-token/{COMMIT}"
    stranger.twists += [
        Twist("HEAD", f"*/{WEIGHTS}", header("X-Xet-Hash", "a" * 64)),
        Twist("HEAD", f"*/{WEIGHTS}", header("X-Xet-Refresh-Route", route)),
        Twist("HEAD", f"*/{WEIGHTS}", header(name, filled(value, stranger))),
    ]
    refused(harmless(stranger, victim, world))
    assert all(asked.port != "evil" for asked in stranger.asked)


# 5. What has no hash.


NO_HASH: list[object] = [
    None,
    "",
    "a" * 39,
    "a" * 41,
    "z" * 40,
    7,
    [],
    {},
    True,
    "../../../x",
    "A" * 40,
]


def without(stranger: Stranger, path: str, value: object) -> Twist:
    def change(entries: Any) -> Any:
        for entry in entries:
            if entry["path"] == path:
                entry.get("lfs", entry)["oid"] = value
        return entries

    return Twist("GET", TREE, lambda r: r.changed(change))


@pytest.mark.parametrize("value", NO_HASH)
@pytest.mark.parametrize("path", ["config.json", WEIGHTS])
def test_a_file_without_a_hash(
    stranger: Stranger, victim: Victim, world: Path, path: str, value: object
) -> None:
    stranger.twists.append(without(stranger, path, value))
    outcome = harmless(stranger, victim, world)
    refused(outcome, f"the Hub lists no hash of {path}")
    assert "--allow-unhashed" in outcome.message
    assert not any("/resolve/" in asked.path for asked in stranger.asked)

    outcome = harmless(stranger, victim, world, allow_unhashed=True)
    right(outcome)
    assert outcome.value["unchecked"] == [path]
    assert any(path in note for note in outcome.notes)


def test_a_missing_hash_of_a_file_that_is_not_wanted(
    stranger: Stranger, victim: Victim, world: Path
) -> None:
    stranger.twists.append(without(stranger, "README.md", None))
    outcome = harmless(stranger, victim, world, only=["config.json", WEIGHTS])
    assert (outcome.error, outcome.value["unchecked"]) == ("", [])


@pytest.mark.parametrize("etag", ["../../x", "", "a" * 41])
def test_an_unhashed_file_still_needs_a_name(
    stranger: Stranger, victim: Victim, world: Path, etag: str
) -> None:
    stranger.twists += [
        without(stranger, "config.json", None),
        Twist("HEAD", "*/config.json", header("ETag", etag)),
    ]
    refused(harmless(stranger, victim, world, allow_unhashed=True))


# 6. Bytes, pages, time.


def zeros(amount: int) -> Iterator[bytes]:
    yield from repeat(b"\0" * 65536, amount // 65536)


def bomb() -> Iterator[bytes]:
    """Some MB of gzip that are gigabytes."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
    yield packer.compress(b"[")
    for _ in range(300):
        yield packer.compress(b" " * 10_000_000)
    yield packer.flush()


TINY = b"1\r\n \r\n" * 999  # chunks of one byte
LISTS = b"[" + b"[]," * 5_000_000 + b"[]]"

ENDLESS: dict[str, tuple[str, str, Change]] = {
    "look-up, body": ("GET", LOOK_UP, lambda r: replace(r, body=repeat(b" " * 65536))),
    "listing, body": ("GET", TREE, lambda r: replace(r, body=chain([b"["], repeat(b" " * 65536)))),
    "listing, entries": (
        "GET", TREE,
        lambda r: replace(r, body=chain([b"["], repeat(b'{"type":"file","path":"a"},' * 999))),
    ),
    "listing, empty lists": ("GET", TREE, lambda r: replace(r, body=LISTS)),
    "look-up, gzip": (
        "GET", LOOK_UP, lambda r: replace(r.with_header("Content-Encoding", "gzip"), body=bomb())
    ),
    "listing, gzip": (
        "GET", TREE, lambda r: replace(r.with_header("Content-Encoding", "gzip"), body=bomb())
    ),
    "small file, gzip": (
        "GET", "*/config.json",
        lambda r: replace(r.with_header("Content-Encoding", "gzip"), body=bomb()),
    ),
    "small file, small gzip": (
        "GET", "*/config.json",
        lambda r: replace(r.with_header("Content-Encoding", "gzip"), body=gzip.compress(b"{}")),
    ),
    "look-up, deflate": ("GET", LOOK_UP, header("Content-Encoding", "deflate")),
    "look-up, br": ("GET", LOOK_UP, header("Content-Encoding", "br")),
    "look-up, gzip twice": ("GET", LOOK_UP, header("Content-Encoding", "gzip, gzip")),
    "error, body": ("GET", LOOK_UP, lambda r: replace(r, status=403, body=repeat(b"x" * 65536))),
    "error, gzip": (
        "GET", LOOK_UP,
        lambda r: replace(r.with_header("Content-Encoding", "gzip"), status=404, body=bomb()),
    ),
    "small file, body": ("GET", "*/config.json", lambda r: replace(r, body=zeros(1 << 31))),
    "small file, one byte more": (
        "GET", "*/config.json", lambda r: replace(r, body=FILES["config.json"] + b" ")
    ),
    "small file, one more unannounced": (
        "GET", "*/config.json", lambda r: replace(r, body=[FILES["config.json"] + b" "])
    ),
    "small file, a length beyond": (
        "GET", "*/config.json", lambda r: r.with_header("Content-Length", str(1 << 40))
    ),
    "small file, head beyond": (
        "HEAD", "*/config.json", lambda r: r.with_header("X-Linked-Size", str(1 << 40))
    ),
    "redirects to itself": (
        "GET", "*/config.json", lambda r: Reply(302, (("Location", "?x"),))
    ),
    "heads to itself": ("HEAD", "*/config.json", lambda r: Reply(302, (("Location", "?x"),))),
    "look-ups to itself": ("GET", LOOK_UP, lambda r: Reply(307, (("Location", "?x"),))),
    "headers": (
        "GET", LOOK_UP,
        lambda r: Reply(raw=chain([b"HTTP/1.1 200 OK\r\n"], (b"X-%d: y\r\n" % n for n in count()))),
    ),
    "one header": (
        "GET", LOOK_UP, lambda r: Reply(raw=chain([b"HTTP/1.1 200 OK\r\nX: "], repeat(b"y" * 999)))
    ),
    "many headers": (
        "GET", LOOK_UP, lambda r: replace(r, headers=tuple((f"X-{n}", "y") for n in range(300)))
    ),
    "informational": ("GET", LOOK_UP, lambda r: Reply(raw=repeat(b"HTTP/1.1 103 Early\r\n\r\n"))),
    "chunks": (
        "GET", LOOK_UP,
        lambda r: Reply(
            raw=chain(
                [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"], repeat(TINY)
            )
        ),
    ),
    "a chunk's extension": (
        "GET", LOOK_UP,
        lambda r: Reply(
            raw=chain(
                [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;"], repeat(b"x" * 9999)
            )
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDLESS)
def test_an_answer_without_end(stranger: Stranger, victim: Victim, world: Path, name: str) -> None:
    method, path, change = ENDLESS[name]
    stranger.twists.append(Twist(method, path, change))
    refused(harmless(stranger, victim, world))


SLOW: dict[str, tuple[str, str, Change]] = {
    "look-up": ("GET", LOOK_UP, lambda r: replace(r, body=dripping(b" "))),
    "listing": ("GET", TREE, lambda r: replace(r, body=dripping(b"["))),
    "status": ("GET", LOOK_UP, lambda r: Reply(raw=dripping(b"HTTP/1.1 200 OK"))),
    "headers": (
        "GET", LOOK_UP, lambda r: Reply(raw=chain([b"HTTP/1.1 200 OK\r\n"], dripping(b"X: y\r\n")))
    ),
    "error": ("GET", LOOK_UP, lambda r: replace(r, status=503, body=dripping(b" "))),
    "file": (
        "GET", "*/config.json",
        lambda r: replace(r.with_header("Content-Length", "23"), body=dripping(b"{", 0.9)),
    ),
    "file, cut each time": (
        "GET", "*/config.json",
        lambda r: replace(r.with_header("Content-Length", "23"), body=[b"{"]),
    ),
    "file, its headers": (
        "HEAD", "*/config.json",
        lambda r: Reply(raw=chain([b"HTTP/1.1 200 OK\r\n"], dripping(b"X: y\r\n"))),
    ),
}  # fmt: skip


def test_answers_that_come_too_slowly(tmp_path: Path) -> None:
    """All at once, each to a process of its own: it takes 15 seconds until one is refused."""

    def ask(name: str) -> None:
        method, path, change = SLOW[name]
        world = tmp_path / name
        with Stranger() as stranger, Victim(world / "victim", stranger.url) as victim:
            stranger.twists.append(Twist(method, path, change))
            refused(harmless(stranger, victim, world))

    with ThreadPoolExecutor(len(SLOW)) as pool:
        asked = {name: pool.submit(ask, name) for name in SLOW}
    failures = {name: future.exception() for name, future in asked.items()}
    assert not any(failures.values()), failures


def page(stranger: Stranger, where: Callable[[int], str], entries: bool = False) -> Twist:
    numbers = count()

    def change(reply: Reply, asked: Asked) -> Reply:
        number = next(numbers)
        listed = (
            [{"type": "file", "path": f"f{number}", "size": 1, "oid": "a" * 40}] if entries else []
        )
        link = f'<{stranger.url}{asked.path}?{where(number)}>; rel="next"'
        return reply.with_json(listed).with_header("Link", link)

    return Twist("GET", TREE, change, takes_request=True)


@pytest.mark.parametrize(
    ("where", "entries"),
    [
        (lambda _: "recursive=true", False),
        (lambda n: f"cursor={n % 2}", False),
        (lambda n: f"cursor={n % 30}", False),
        (lambda n: f"cursor={n}", False),
        (lambda n: f"cursor={n}", True),
        (lambda n: f"cursor={'x' * n}", True),
    ],
    ids=["itself", "two in a ring", "thirty in a ring", "empty", "one file each", "growing"],
)
def test_pages_without_end(
    stranger: Stranger,
    victim: Victim,
    world: Path,
    where: Callable[[int], str],
    entries: bool,
) -> None:
    stranger.twists.append(page(stranger, where, entries))
    refused(harmless(stranger, victim, world))
    assert len(stranger.asked) < 200


@pytest.mark.parametrize(
    "page",
    [
        {"discussions": [], "count": 10**9, "start": 0},
        {"discussions": [{"num": 1}], "count": 10**9, "start": 0},
        {
            "discussions": [{"num": 1, "title": "x", "status": "open"}],
            "count": 10**9,
            "start": 0,
        },
    ],
)
def test_pull_requests_without_end(
    stranger: Stranger, victim: Victim, world: Path, page: object
) -> None:
    serves(stranger)
    stranger.twists.append(Twist("GET", "*/discussions", lambda r: r.with_json(page)))
    outcome = harmless(stranger, victim, world, "publish", files=PUSHED, pull_request=True)
    assert outcome.error in ("", "HubError")
    assert len(stranger.asked) < 120


def test_a_repo_that_is_always_being_created(
    stranger: Stranger, victim: Victim, world: Path
) -> None:
    """The client asks again at once, for ever, if a Hub says this."""
    busy = {"error": "Cannot create repo: another conflicting operation is in progress"}
    stranger.twists += [
        Twist("GET", LOOK_UP, lambda r: Reply(404, (("X-Error-Code", "RepoNotFound"),))),
        Twist("POST", "/api/repos/create", lambda r: Reply(409).with_json(busy)),
    ]
    refused(harmless(stranger, victim, world, "publish", files=PUSHED))
    assert len(stranger.asked) < 120


# 9 and 10. Words, and forms.


WORDS = [
    "\x1b[2J\x1b[H", "a\tb", "\x9b31m", "\u202eevil", "x" * 50_000, "\udc80\udcff",
    f"your token is {TOKEN}", "\x00", "é" * 3_000, "\u2028line", "%s %d {0} \\x1b", "\x7f" * 90,
]  # fmt: skip


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 418, 451])
def test_words_of_a_refusal(
    stranger: Stranger, victim: Victim, world: Path, words: str, status: int
) -> None:
    stranger.twists.append(
        Twist("GET", LOOK_UP, lambda r: Reply(status).with_json({"error": words}))
    )
    refused(harmless(stranger, victim, world, "look-up"))
    header_words = words.replace("\x00", "")[:60_000]
    stranger.twists = [
        Twist("GET", LOOK_UP, lambda r: Reply(status, (("X-Error-Message", header_words),)))
    ]
    refused(harmless(stranger, victim, world, "look-up"))


@pytest.mark.parametrize(
    "asked",
    [
        "²",
        "٣",
        "-1",
        "1e9",
        "nan",
        "",
        " ",
        "Wed, 21 Oct 2015 07:28:00 GMT",
        "9" * 4_000,
        "0x10",
        "1.5",
        "99999999",
    ],
)
@pytest.mark.parametrize("name", ["Retry-After", "RateLimit"])
def test_a_wait_that_is_asked_for(
    stranger: Stranger, victim: Victim, world: Path, name: str, asked: str
) -> None:
    value = asked if name == "Retry-After" else f'"api";r=0;t={asked}'
    change: Change = lambda r: Reply(429, ((name, value),))  # noqa: E731
    stranger.twists.append(Twist("GET", LOOK_UP, change))
    refused(harmless(stranger, victim, world, "look-up"), "429")


FORMS: list[bytes | object] = [
    b"", b"null", b"[]", b"{}", b"7", b'"text"', b"true", b"NaN", b"[NaN]", b"{", b"\xff\xfe",
    b"<html>",
    b"[" * 100_000, b'{"a":' * 50_000, b"[1" + b"0" * 5_000 + b"]",
    b'{"sha": ' + b"9" * 4_000 + b"}",
    b"[null]", b"[7]", b'["config.json"]', b"[[]]", b"[{}]", b'[{"type": "file"}]', b"\x00" * 99,
    b'[{"type": "link", "path": "a"}]', b'{"error": [[]], "errors": 7}', b'{"errors": [7, null]}',
    b"\xef\xbb\xbf{}", b'{"sha": "' + b"c" * 40 + b'", "private": "yes"}', b"1e999", b"-",
    b'"\\ud800"',
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(FORMS)))
@pytest.mark.parametrize(
    ("path", "status"),
    # The client itself tries a listing that ends with 500 for 23 seconds.
    [(LOOK_UP, 200), (LOOK_UP, 404), (LOOK_UP, 500), (TREE, 200), (TREE, 404)],
)
def test_an_answer_of_another_form(
    stranger: Stranger, victim: Victim, world: Path, path: str, number: int, status: int
) -> None:
    body = FORMS[number]
    stranger.twists.append(Twist("GET", path, lambda r: replace(r.with_json(body), status=status)))
    outcome = harmless(stranger, victim, world)
    if outcome.error == "":
        assert (path, body) == (TREE, b"[]")
        return
    refused(outcome)


SIZES = [-1, 2**70, True, "23", 1.5, None, [], float("nan"), float("inf"), 10**19, {"a": 1}]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("path", ["config.json", WEIGHTS])
def test_a_size_that_is_none(
    stranger: Stranger, victim: Victim, world: Path, path: str, size: object
) -> None:
    def change(entries: Any) -> Any:
        for entry in entries:
            if entry["path"] == path:
                entry.get("lfs", entry)["size"] = size
        return entries

    stranger.twists.append(Twist("GET", TREE, lambda r: r.changed(change)))
    refused(harmless(stranger, victim, world))


BATCHES: list[Any] = [
    [], {}, {"objects": None}, {"objects": {}}, {"objects": [None]}, {"objects": [{}]},
    {"objects": [{"oid": 7, "size": 7}]}, {"objects": [{"oid": "a" * 64, "size": 1}]},
    {"objects": [{"oid": "a" * 64, "size": 1, "actions": []}]},
    {"objects": [{"oid": "a" * 64, "size": 1, "actions": {}}]},
    {"objects": [{"oid": "a" * 64, "size": 1, "error": "no"}]},
    {"objects": [{"oid": "a" * 64, "size": 1, "error": {"code": "x", "message": "\x1b[2J"}}]},
    {"objects": [{"oid": "a" * 64, "size": 1, "error": {"code": 1, "message": "\x1b[2J"}}]},
    {"objects": [{"oid": "a" * 64, "size": 1, "actions": {"upload": {"href": "http://cdn.x/a"}}}]},
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(BATCHES)))
def test_places_to_send_files_to_of_another_form(
    stranger: Stranger, victim: Victim, world: Path, number: int
) -> None:
    serves(stranger)
    stranger.twists.append(Twist("POST", "*/objects/batch", lambda r: r.with_json(BATCHES[number])))
    outcome = harmless(stranger, victim, world, "publish", files=PUSHED)
    assert outcome.error in ("", "HubError")


@pytest.mark.parametrize(
    "header",
    [
        {"chunk_size": 0}, {"chunk_size": "0"}, {"chunk_size": -1}, {"chunk_size": "²"},
        {"chunk_size": "9" * 4_000}, {"chunk_size": 1.5}, {"chunk_size": None},
        {"chunk_size": True},
        {"chunk_size": "1"}, {"chunk_size": 1, "1": "http://[", "²": "x"},
        {"chunk_size": 99, "1": 7},
        {"chunk_size": 99, "1": "file:///etc/passwd"}, {"chunk_size": 99, "00001": "http://a@b/"},
    ],
)  # fmt: skip
def test_parts_that_are_none(
    stranger: Stranger, victim: Victim, world: Path, header: dict[str, Any]
) -> None:
    def change(batch: Any) -> Any:
        batch["objects"][0]["actions"]["upload"]["header"] = header
        return batch

    serves(stranger)
    stranger.twists.append(Twist("POST", "*/objects/batch", lambda r: r.changed(change)))
    refused(harmless(stranger, victim, world, "publish", files=PUSHED))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("*/commit/*", {"commitOid": "../../x"}),
        ("*/commit/*", {"commitOid": None}),
        ("*/commit/*", {"commitUrl": 7, "commitOid": "x"}),
        ("*/commit/*", {"pullRequestUrl": "http://x/discussions/../../x", "commitOid": "d" * 40}),
        ("*/commit/*", {"pullRequestUrl": "http://x/discussions/\u0661", "commitOid": "d" * 40}),
        ("*/commit/*", []),
        ("*/preupload/*", []),
        ("*/preupload/*", {"files": [{"path": "config.json", "uploadMode": "rm -rf"}]}),
        ("*/preupload/*", {"files": []}),
        ("*/preupload/*", {"files": [None]}),
        ("*/preupload/*", {"files": 7}),
        ("*/discussions", {"discussions": 7, "count": 0, "start": 0}),
        ("*/discussions", []),
    ],
)
def test_a_push_answered_in_another_form(
    stranger: Stranger, victim: Victim, world: Path, path: str, body: object
) -> None:
    serves(stranger)
    stranger.twists.append(Twist("*", path, lambda r: r.with_json(body)))
    stranger.twists.append(
        Twist("GET", TREE, lambda r: r.with_json([stranger.entry("config.json")]))
    )
    refused(harmless(stranger, victim, world, "publish", files=PUSHED, pull_request=True))


@pytest.mark.parametrize(
    "revision",
    [
        "../x",
        "../../../../precious/bashrc",
        "/etc/passwd",
        "a..b",
        "a\nb",
        "a b",
        "a\\b",
        "x.lock",
        "-x",
        "@{1}",
        "",
        "é\x1b",
    ],
)
def test_a_revision_that_is_none(
    stranger: Stranger, victim: Victim, world: Path, revision: str
) -> None:
    for what in ("download", "offline"):
        outcome = harmless(stranger, victim, world, what, revision=revision)
        assert outcome.error == ("UsageError" if revision else "")


# A cache that somebody else prepared.


def dangling(victim: Victim, world: Path) -> None:
    folder = victim.storage / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (folder / "config.json").symlink_to(world / "precious" / "new")


def folder_link(*parts: str) -> Callable[[Victim, Path], None]:
    def prepare(victim: Victim, world: Path) -> None:
        link = victim.cache.joinpath(*parts)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(world / "precious")

    return prepare


def file_link(*parts: str, to: str = "bashrc") -> Callable[[Victim, Path], None]:
    def prepare(victim: Victim, world: Path) -> None:
        link = victim.cache.joinpath(*parts)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(world / "precious" / to)

    return prepare


NAME = f"models--{REPO.replace('/', '--')}"
PREPARED: dict[str, Callable[[Victim, Path], None]] = {
    "dangling file": dangling,
    "the repo": folder_link(NAME),
    "blobs": folder_link(NAME, "blobs"),
    "snapshots": folder_link(NAME, "snapshots"),
    "the snapshot": folder_link(NAME, "snapshots", COMMIT),
    "refs": folder_link(NAME, "refs"),
    "trees": folder_link(NAME, "trees"),
    "locks": folder_link(".locks", NAME),
    "all locks": folder_link(".locks"),
    "shared blobs": folder_link("blobs"),
    "the tag": file_link("CACHEDIR.TAG", to="new"),
    "a file": file_link(NAME, "snapshots", COMMIT, "config.json"),
    "a file of the right bytes": file_link(NAME, "snapshots", COMMIT, WEIGHTS, to="weights"),
    "a blob": file_link(NAME, "blobs", SHA256),
    "a blob of the right bytes": file_link(NAME, "blobs", SHA256, to="weights"),
    "a dangling blob": file_link(NAME, "blobs", SHA256, to="new"),
    "a lock": file_link(".locks", NAME, f"{SHA256}.lock"),
}


@pytest.mark.parametrize("name", PREPARED)
@pytest.mark.parametrize("what", ["download", "offline"])
def test_a_cache_that_leads_out(
    stranger: Stranger, victim: Victim, world: Path, name: str, what: str
) -> None:
    PREPARED[name](victim, world)
    outcome = harmless(stranger, victim, world, what, revision=COMMIT)
    if (what, name) == ("offline", "dangling file"):
        assert outcome.value["listed"] == {}  # as if there were nothing
        return
    refused(outcome)
    if what == "download":
        assert "leads out of the Hub cache" in outcome.message


@pytest.mark.parametrize(
    "text", [b"", b"\xff" * 40, b"../../..", b"x" * 10_000_000, b"C" * 40, COMMIT.encode() + b"/.."]
)
def test_a_ref_that_is_none(stranger: Stranger, victim: Victim, world: Path, text: bytes) -> None:
    right(harmless(stranger, victim, world))
    (victim.storage / "refs" / "main").write_bytes(text)
    refused(harmless(stranger, victim, world, "offline"))
    stranger.twists.append(Twist("GET", LOOK_UP, lambda r: Reply(403)))
    refused(harmless(stranger, victim, world))


def test_a_ref_that_is_a_link_out(stranger: Stranger, victim: Victim, world: Path) -> None:
    right(harmless(stranger, victim, world))
    ref = victim.storage / "refs" / "main"
    ref.unlink()
    (world / "precious" / "ref").write_text(COMMIT)
    ref.symlink_to(world / "precious" / "ref")
    refused(harmless(stranger, victim, world, "offline"))
    right(harmless(stranger, victim, world))
    assert ref.read_text() == COMMIT
    assert not ref.is_symlink()


@pytest.mark.parametrize("name", ["x\ny", "x\x1b[2J", "x\\y", "\udce9"])
def test_a_cached_name_that_cannot_be_one(
    stranger: Stranger, victim: Victim, world: Path, name: str
) -> None:
    right(harmless(stranger, victim, world))
    (victim.storage / "snapshots" / COMMIT / name).write_text("x")
    refused(harmless(stranger, victim, world, "offline"))


@pytest.mark.parametrize("kind", ["blob", "snapshot"])
def test_a_pipe_in_the_place_of_a_file(
    stranger: Stranger, victim: Victim, world: Path, kind: str
) -> None:
    right(harmless(stranger, victim, world))
    path = victim.storage / "snapshots" / COMMIT / WEIGHTS
    if kind == "blob":
        path = path.resolve()
    path.unlink()
    os.mkfifo(path)
    for what in ("offline", "download"):
        outcome = harmless(stranger, victim, world, what, revision=COMMIT)
        assert outcome.error == "HubError" or WEIGHTS not in outcome.value["listed"]


def test_a_kept_listing_with_paths_for_hashes(
    stranger: Stranger, victim: Victim, world: Path
) -> None:
    """The client keeps listings of Xet repos, and takes the names of blobs from them."""
    trees = victim.storage / "trees"
    trees.mkdir(parents=True)
    entry = {
        "size": 9,
        "blob_id": "a" * 40,
        "lfs_sha256": str(world / "precious" / "new"),
        "lfs_size": 9,
        "xet_hash": "a" * 64,
    }
    kept = trees / f"{COMMIT}.json"
    kept.write_text(json.dumps({"format_version": 1, "files": {WEIGHTS: entry}}))
    right(harmless(stranger, victim, world))
    assert not kept.exists()


def test_wrong_bytes_behind_a_link_out_stay(
    stranger: Stranger, victim: Victim, world: Path
) -> None:
    """What is thrown away is what lies in the cache."""
    right(harmless(stranger, victim, world))
    link = victim.storage / "snapshots" / COMMIT / "config.json"
    blob = link.resolve()
    blob.write_bytes(b"wrong")
    stranger.twists.append(
        Twist("GET", "*/config.json", lambda r: replace(r, body=b"x" * len(FILES["config.json"])))
    )
    refused(harmless(stranger, victim, world), "came wrong twice")
    assert not blob.exists()
    assert not link.is_symlink()
