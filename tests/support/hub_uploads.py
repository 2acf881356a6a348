"""What the test Hub answers to uploads: repos, LFS whole or in parts, commits, pull requests.

It refuses what the real one refuses: a writer without rights, an object whose bytes do not hash to
its name, a commit that names an object that never came, a parent that is not the head any more.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from tests.support.hub_server import REPO, REVISION, Answer, Call, Refused, XetStore, route
from tests.support.hub_store import PullRequest, Repo, is_lfs

_CREATED_AT = "2025-01-01T00:00:00.000Z"
_COMMITTING = threading.Lock()


@route("GET", "/api/whoami-v2")
def whoami(call: Call) -> Answer:
    """The name of the one whose token came along; one for a single repo is nobody's."""
    user = call.writer()
    if user.startswith("[OIDC]"):
        raise Refused(403, None, "This token is for one repo")
    return Answer(body={"type": "user", "name": user, "orgs": [], "auth": {}})


@route("POST", "/api/repos/create")
def create(call: Call) -> Answer:
    """A new repo, with the one file that the Hub puts into each."""
    user, order = call.writer(), json.loads(call.body)
    namespace = order.get("organization") or user
    repo_id = f"{namespace}/{order['name']}"
    url = {"url": f"{call.hub.url}/{repo_id}"}
    if namespace != user and namespace not in call.hub.store.organizations.get(user, ()):
        raise Refused(403, None, f"You don't have the rights to create a model under {namespace}")
    with _COMMITTING:
        if repo_id in call.hub.store.repos:
            message = "You already created this model repo"
            return Answer(409, {"error": message, **url}, {"X-Error-Message": message})
        repo = call.hub.store.add(
            repo_id, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
        )
        repo.private = order.get("visibility") == "private" or bool(order.get("private"))
        repo.readers, repo.writers = {user}, {user}
    return Answer(body=url)


@route("POST", "/api/validate-yaml")
def validate_yaml(call: Call) -> Answer:
    """Whether a model card's metadata will do."""
    content = json.loads(call.body)["content"]
    if content.startswith("---\n") and "\n---" in content[4:]:
        return Answer(body={"errors": [], "warnings": []})
    return Answer(body={"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]})


def _repo_to_write(call: Call) -> tuple[Repo, str]:
    """The repo, and who writes to it; readers may open a pull request, and add to it."""
    user, repo = call.writer(), call.repo()
    own = {f"refs/pr/{request.num}" for request in repo.pull_requests if request.author == user}
    proposes = "create_pr" in call.query or call.groups["revision"] in own
    if user not in repo.writers and not proposes:
        raise Refused(403, None, "You don't have write access to this repo")
    return repo, user


@route("POST", f"/api/models/{REPO}/preupload/{REVISION}")
def preupload(call: Call) -> Answer:
    """Which files go by LFS, and what the Hub has under their names now."""
    repo, _ = _repo_to_write(call)
    files = call.commit(repo).files
    order = json.loads(call.body)
    rules = files[".gitignore"].data.decode() if ".gitignore" in files else ""
    ignored = order.get("gitIgnore", rules)
    answers = []
    for file in order["files"]:
        path, size = file["path"], file["size"]
        answer = {
            "path": path,
            "uploadMode": "lfs" if is_lfs(path, size, files.get(".gitattributes")) else "regular",
            "shouldIgnore": path in ignored.splitlines(),
        }
        if path in files:
            answer["oid"] = files[path].etag
        answers.append(answer)
    return Answer(body={"files": answers})


@route("POST", f"/{REPO}\\.git/info/lfs/objects/batch")
def batch(call: Call) -> Answer:
    """Where to put each object that is not here yet."""
    user, repo = call.writer(), call.repo()
    order = json.loads(call.body)
    at_main = order.get("ref", {}).get("name") == "main"
    if user not in repo.writers and at_main:
        raise Refused(403, None, "You don't have write access to this repo")
    objects = []
    for wanted in order["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        entry: dict[str, Any] = {"oid": oid, "size": size}
        if oid not in repo.objects:
            entry["actions"] = _actions(call, repo, oid, size)
        objects.append(entry)
    return Answer(body={"transfer": "basic", "objects": objects})


def _actions(call: Call, repo: Repo, oid: str, size: int) -> dict[str, Any]:
    signed = f"Signature={oid[:16]}"
    verify = {"href": f"{call.hub.url}/api/lfs/{repo.repo_id}/verify"}
    at_cdn = f"{call.hub.cdn_url}/upload/{repo.repo_id}/{oid}"
    part_size = call.hub.part_size
    if part_size is None or size <= part_size:
        return {"upload": {"href": f"{at_cdn}?{signed}"}, "verify": verify}
    count = -(-size // part_size)
    header = {f"{i:05d}": f"{at_cdn}/{i}?{signed}" for i in range(1, count + 1)}
    href = f"{call.hub.url}/api/lfs/{repo.repo_id}/complete"
    upload = {"href": href, "header": {"chunk_size": str(part_size), **header}}
    return {"upload": upload, "verify": verify}


def _at_cdn(call: Call) -> Repo:
    if "authorization" in call.headers:
        raise Refused(400, None, "Only one auth mechanism allowed")
    return call.hub.store.repos[call.groups["repo"]]


def _keep(repo: Repo, oid: str, data: bytes) -> None:
    if hashlib.sha256(data).hexdigest() != oid:
        raise Refused(422, None, "The bytes do not have the sha256 that was announced")
    repo.objects[oid] = data


@route("PUT", f"/upload/{REPO}/(?P<oid>[0-9a-f]{{64}})", cdn=True)
def put_object(call: Call) -> Answer:
    """A whole object."""
    _keep(_at_cdn(call), call.groups["oid"], call.body)
    return Answer()


@route("PUT", f"/upload/{REPO}/(?P<oid>[0-9a-f]{{64}})/(?P<number>\\d+)", cdn=True)
def put_part(call: Call) -> Answer:
    """A part of one."""
    _at_cdn(call).parts[call.groups["oid"], int(call.groups["number"])] = call.body
    return Answer(headers={"ETag": f'"{_md5(call.body)}"'})


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


@route("POST", f"/api/lfs/{REPO}/complete")
def complete(call: Call) -> Answer:
    """All parts came: they become the object."""
    repo, order = call.hub.store.repos[call.groups["repo"]], json.loads(call.body)
    oid = order["oid"]
    pieces = []
    for part in order["parts"]:
        piece = repo.parts[oid, part["partNumber"]]
        if part["etag"].strip('"') != _md5(piece):
            raise Refused(400, None, f"part {part['partNumber']} has another ETag")
        pieces.append(piece)
    _keep(repo, oid, b"".join(pieces))
    return Answer(body={"success": True})


@route("POST", f"/api/lfs/{REPO}/verify")
def verify(call: Call) -> Answer:
    """Whether an object came whole."""
    repo, order = call.repo(), json.loads(call.body)
    if len(repo.objects.get(order["oid"], b"")) != order["size"]:
        raise Refused(422, None, "No such object, or another size")
    return Answer(body={"success": True})


@route("POST", f"/api/models/{REPO}/commit/{REVISION}")
def commit(call: Call) -> Answer:
    """A commit on a branch, or with ?create_pr on a new pull request's."""
    repo, user = _repo_to_write(call)
    branch = call.groups["revision"]
    lines = [json.loads(line) for line in call.body.splitlines()]
    header = lines[0]["value"]
    with _COMMITTING:
        if branch not in repo.refs:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {branch}")
        if header.get("parentCommit") not in (None, repo.refs[branch]):
            message = "A commit has happened since. Please refresh and try again."
            raise Refused(412, None, message)
        changes = call.hub.after_commit(dict(_changes(repo, lines[1:], call.hub.xet)))
        answer: dict[str, Any] = {}
        if "create_pr" in call.query:
            request = repo.open_pull_request(header["summary"], user)
            branch = f"refs/pr/{request.num}"
            answer["pullRequestUrl"] = f"{call.hub.url}/{repo.repo_id}/discussions/{request.num}"
        sha = repo.commit(changes, branch)
    answer |= {"commitUrl": f"{call.hub.url}/{repo.repo_id}/commit/{sha}", "commitOid": sha}
    return Answer(body={"success": True, **answer})


def _changes(
    repo: Repo, lines: list[Mapping[str, Any]], xet: XetStore | None
) -> Iterator[tuple[str, bytes | None]]:
    for line in lines:
        key, value = line["key"], line["value"]
        if key == "file":
            yield value["path"], base64.b64decode(value["content"])
        elif key == "lfsFile":
            known = {**(xet.content if xet else {}), **repo.objects}
            if value["oid"] not in known:
                raise Refused(400, None, f"LFS object {value['oid']} was not uploaded")
            yield value["path"], known[value["oid"]]
        elif key == "deletedFile":
            yield value["path"], None
        else:
            raise Refused(400, None, f"unknown operation {key}")


@route("GET", f"/api/models/{REPO}/xet-(?P<right>read|write)-token/{REVISION}")
def xet_token(call: Call) -> Answer:
    """Where the Xet store is; the client reads it from the headers, hf_xet from the body."""
    call.repo() if call.groups["right"] == "read" else _repo_to_write(call)
    if call.hub.xet is None:
        raise Refused(404, None, "no Xet here")
    expires = 4_102_444_800  # in the year 2100
    headers = {
        "X-Xet-Cas-Url": call.hub.xet.url,
        "X-Xet-Access-Token": "of-the-store",
        "X-Xet-Token-Expiration": str(expires),
    }
    body = {
        "accessToken": "of-the-store",
        "exp": expires,
        "casUrl": call.hub.xet.url_in_body or call.hub.xet.url,
    }
    return Answer(body=body, headers=headers)


@route("GET", f"/api/models/{REPO}/discussions")
def discussions(call: Call) -> Answer:
    """Pull requests, the newest first, two to a page."""
    repo = call.repo()
    wanted = call.query.get("status", ["all"])[0]
    author = call.query.get("author", [None])[0]
    found = [
        _discussion(call, repo, request)
        for request in reversed(repo.pull_requests)
        if wanted in ("all", request.status) and author in (None, request.author)
    ]
    start = 2 * int(call.query.get("p", ["0"])[0])
    page = {"discussions": found[start : start + 2], "count": len(found), "start": start}
    return Answer(body=page)


@route("POST", f"/api/models/{REPO}/discussions")
def open_discussion(call: Call) -> Answer:
    """A pull request without a commit."""
    user, repo, order = call.writer(), call.repo(), json.loads(call.body)
    with _COMMITTING:
        request = repo.open_pull_request(order["title"], user)
    request.status = "draft"
    return Answer(body={"num": request.num})


@route("GET", f"/api/models/{REPO}/discussions/(?P<num>\\d+)")
def discussion(call: Call) -> Answer:
    """One pull request."""
    repo = call.repo()
    request = repo.pull_requests[int(call.groups["num"]) - 1]
    details = {"events": [], "changes": {"base": "refs/heads/main"}, "filesWithConflicts": []}
    return Answer(body=_discussion(call, repo, request) | details)


def _discussion(call: Call, repo: Repo, request: PullRequest) -> dict[str, Any]:
    return {
        "title": request.title,
        "num": request.num,
        "status": request.status,
        "createdAt": _CREATED_AT,
        "isPullRequest": True,
        "author": {"name": request.author},
        "repo": {"name": repo.repo_id, "type": "model"},
    }
