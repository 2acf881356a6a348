"""CI jobs that say who they are: an issuer of id tokens, and a Hub's exchange of them for its own.

    with HubServer() as hub, Issuer() as issuer:
        issuer.trusted_by(hub, "me/model", repository="me/code")
        ...  # HF_ENDPOINT=hub.url, HF_OIDC_RESOURCE=me/model, and issuer.variables
        assert issuer.handed_out  # none of which may be seen anywhere

Tokens are signed and checked for real. The Hub's rules are those of its documentation: signature,
issuer, audience, time and every claim of a publisher; and, which a stranger's Hub may not do, each
id token is taken once.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import jwt
from cryptography.hazmat.primitives.asymmetric import ec

from tests.support.hub_server import Answer, Call, HubServer, route

CLAIMS = {
    "sub": "repo:me/code:ref:refs/heads/main",
    "repository": "me/code",
    "ref": "refs/heads/main",
    "workflow": "publish.yml",
}
GRANT = "urn:ietf:params:oauth:grant-type:token-exchange"
ID_TOKEN = "urn:ietf:params:oauth:token-type:id_token"


@dataclass
class Trust:
    """What a Hub knows of issuers, and of the tokens that it gave.

    Attributes:
        keys: of each issuer, by its address.
        publishers: issuer and claims of those that may push, by repo.
        taken: ids of the id tokens that were exchanged.
        life: seconds for which one is given.
        answer: what is answered instead of a token, if that is planned.
    """

    keys: dict[str, ec.EllipticCurvePublicKey] = field(default_factory=dict)
    publishers: dict[str, list[tuple[str, Mapping[str, str]]]] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    life: int = 3600
    answer: Answer | None = None


_trusts: dict[int, Trust] = {}


def trust(hub: HubServer) -> Trust:
    """What a Hub knows."""
    return _trusts.setdefault(id(hub), Trust())


def end_tokens(hub: HubServer) -> None:
    """Lets every token end that was given in exchange."""
    for token in hub.store.ends:
        hub.store.ends[token] = 0.0


@route("POST", "/oauth/token")
def exchange(call: Call) -> Answer:
    """A token for an id token; a refusal does not say what was wrong."""
    known, order = trust(call.hub), json.loads(call.body)
    if known.answer is not None:
        return known.answer
    assert set(order) == {"grant_type", "subject_token_type", "subject_token", "resource"}
    assert (order["grant_type"], order["subject_token_type"]) == (GRANT, ID_TOKEN)
    resource = order["resource"]
    if not _is_accepted(call.hub, known, order["subject_token"], resource):
        words = f"No publisher of {resource} matches {order['subject_token']}"  # some Hubs echo it
        return Answer(400, {"error": "invalid_grant", "error_description": words})
    token = f"hf_jwt_{secrets.token_hex(8)}.{secrets.token_urlsafe(24)}.{secrets.token_urlsafe(8)}"
    user = f"[OIDC] {resource}"
    repo = call.hub.store.repos[resource]
    call.hub.store.users[token] = user
    call.hub.store.ends[token] = time.time() + known.life
    repo.readers.add(user)
    repo.writers.add(user)
    body = {"access_token": token, "token_type": "bearer", "expires_in": known.life}
    return Answer(body=body | {"issued_token_type": ID_TOKEN})


def _is_accepted(hub: HubServer, known: Trust, token: str, resource: str) -> bool:
    for issuer, claims in known.publishers.get(resource, []):
        try:
            found = jwt.decode(
                token,
                known.keys[issuer],
                algorithms=["ES256"],
                audience=hub.url,
                issuer=issuer,
                options={"require": ["exp", "iat", "aud", "iss", "sub", "jti"]},
            )
        except jwt.InvalidTokenError:
            continue
        if found["jti"] not in known.taken and claims.items() <= found.items():
            known.taken.add(found["jti"])
            return True
    return False


class Issuer:
    """A CI's issuer of id tokens on 127.0.0.1; a context manager.

    Attributes:
        claims: of the job.
        changes: what is wrong in the next tokens: claims, by name.
        answer: status, headers and body in the place of a token.
        bearers: what each request was authorized with.
        handed_out: every secret of the job.
    """

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.claims: dict[str, Any] = dict(CLAIMS)
        self.changes: dict[str, Any] = {}
        self.answer: tuple[int, Mapping[str, str], bytes] | None = None
        self.endless = False
        self.bearers: list[str] = []
        self.request_token = f"ci_{secrets.token_hex(24)}"
        self.handed_out = [self.request_token]
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Issuer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def variables(self) -> dict[str, str]:
        """What a job's environment has where it may ask for id tokens."""
        return {
            "GITHUB_ACTIONS": "true",
            "GITHUB_REPOSITORY": "me/code",
            "ACTIONS_ID_TOKEN_REQUEST_URL": f"{self.url}/job/7?api-version=2.0",
            "ACTIONS_ID_TOKEN_REQUEST_TOKEN": self.request_token,
        }

    def trusted_by(self, hub: HubServer, repo_id: str, **claims: str) -> None:
        """Makes the jobs with these claims publishers of a repo."""
        known = trust(hub)
        known.keys[self.url] = self.key.public_key()
        known.publishers.setdefault(repo_id, []).append((self.url, claims))

    def token(
        self, audience: str, *, sign: Callable[[dict[str, Any]], str] | None = None, **changes: Any
    ) -> str:
        """An id token of the job; a claim that is changed to None is left out."""
        now = int(time.time())
        claims: dict[str, Any] = {
            **self.claims,
            "iss": self.url,
            "aud": audience,
            "iat": now,
            "nbf": now,
            "exp": now + 300,
            "jti": secrets.token_hex(16),
            **self.changes,
            **changes,
        }
        claims = {name: value for name, value in claims.items() if value is not None}
        made = sign(claims) if sign else jwt.encode(claims, self.key, algorithm="ES256")
        self.handed_out.append(made)
        return made


def _handler(issuer: Issuer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # see `hub_server`
        timeout = 300

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            if url.path == "/.well-known/openid-configuration":
                places = {f"{name}_endpoint": issuer.url for name in ("authorization", "token")}
                self._send(200, {}, json.dumps(places).encode())
                return
            issuer.bearers.append(self.headers.get("authorization", ""))
            if issuer.endless:
                self._without_end()
                return
            if issuer.answer is not None:
                self._send(*issuer.answer)
            elif issuer.bearers[-1].casefold() != f"bearer {issuer.request_token}":
                self._send(401, {}, b"{}")
            else:
                (audience,) = parse_qs(url.query)["audience"]
                body = json.dumps({"count": 1, "value": issuer.token(audience)})
                self._send(200, {}, body.encode())

        def _send(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _without_end(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.close_connection = True
            try:
                while True:
                    self.wfile.write(b" " * 65_536)
            except OSError:
                pass

    return Handler
