"""A Sigstore instance on 127.0.0.1: certificates for identities, and a log of signatures.

    with Issuer() as issuer, Sigstore(issuer) as sigstore:
        trust = sigstore.write_trust(folder / "trust.json")  # what clients are told of it
        ...  # SIGSTORE_ID_TOKEN=issuer.token("sigstore") nf4 sign --keyless --trust-config trust

Fulcio (an X.509 authority whose certificates carry a certificate transparency log's signature) and
Rekor (version 1: an entry with a promise and a proof of inclusion) do what the client checks: every
signature, hash and time is real, and made with keys of this instance. There is no timestamp
authority, as Rekor's promise holds the time; and each entry is alone in its tree.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from tests.support.identities import Issuer

_START = datetime(2024, 1, 1, tzinfo=UTC)
_FULCIO_ISSUER = ObjectIdentifier("1.3.6.1.4.1.57264.1.1")
_FULCIO_ISSUER_DER = ObjectIdentifier("1.3.6.1.4.1.57264.1.8")
_SCTS = ObjectIdentifier("1.3.6.1.4.1.11129.2.4.2")
_P256 = "PKIX_ECDSA_P256_SHA_256"


class Sigstore:
    """One instance; a context manager.

    Attributes:
        age: seconds since when its certificates began; they are good for ten minutes.
        late: seconds that the log's clock is before the machine's.
        planned: what is answered instead, by path.
        bearers: what each request was authorized with, by path.
    """

    def __init__(self, issuer: Issuer) -> None:
        self.issuer = issuer
        self.age = self.late = 0
        self.planned: dict[str, tuple[int, bytes]] = {}
        self.bearers: list[tuple[str, str]] = []
        self.fulcio, self.ct, self.rekor = (ec.generate_private_key(ec.SECP256R1()) for _ in "123")
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fulcio of the tests")])
        public = self.fulcio.public_key()
        self.root = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(_START)
            .not_valid_after(_START + timedelta(days=36_500))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .sign(self.fulcio, hashes.SHA256())
        )
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Sigstore:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    # What clients are told.

    def write_trust(self, path: Path) -> Path:
        """Writes the file for `--trust-config`."""
        valid = {"start": "2024-01-01T00:00:00Z"}
        service = {"majorApiVersion": 1, "operator": "tests", "validFor": valid}
        chain = {"certificates": [{"rawBytes": _b64(_der(self.root))}]}
        config = {
            "mediaType": "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json",
            "trustedRoot": {
                "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
                "tlogs": [_log(self.url, self.rekor)],
                "ctlogs": [_log(f"{self.url}/ct", self.ct)],
                "certificateAuthorities": [
                    {
                        "subject": {"organization": "tests", "commonName": "fulcio of the tests"},
                        "uri": self.url,
                        "certChain": chain,
                        "validFor": valid,
                    }
                ],
            },
            "signingConfig": {
                "mediaType": "application/vnd.dev.sigstore.signingconfig.v0.2+json",
                "caUrls": [{"url": self.url, **service}],
                "oidcUrls": [{"url": self.issuer.url, **service}],
                "rekorTlogUrls": [{"url": self.url, **service}],
                "rekorTlogConfig": {"selector": "ANY"},
            },
        }
        path.write_text(json.dumps(config))
        return path

    # Fulcio.

    def certify(self, bearer: str, order: Mapping[str, Any]) -> dict[str, Any]:
        """A certificate of the identity that a token speaks of, for the key of a request."""
        claims = jwt.decode(
            bearer.removeprefix("Bearer "),
            self.issuer.key.public_key(),
            algorithms=["ES256"],
            audience="sigstore",
            issuer=self.issuer.url,
        )
        request = x509.load_pem_x509_csr(base64.b64decode(order["certificateSigningRequest"]))
        assert request.is_signature_valid
        key = request.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        chain = [self.certificate(key, claims), self.root]
        texts = [each.public_bytes(serialization.Encoding.PEM).decode() for each in chain]
        return {"signedCertificateEmbeddedSct": {"chain": {"certificates": texts}}}

    def certificate(
        self, key: ec.EllipticCurvePublicKey, claims: Mapping[str, Any]
    ) -> x509.Certificate:
        """A certificate with its log's signature."""
        began = datetime.now(UTC).replace(microsecond=0) - timedelta(seconds=self.age)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self.root.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(began)
            .not_valid_after(began + timedelta(minutes=10))
            .add_extension(_usage(), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.fulcio.public_key()),
                critical=False,
            )
            .add_extension(x509.SubjectAlternativeName([_identity(claims)]), critical=True)
        )
        issuer = str(claims["iss"]).encode()
        for oid, value in (
            (_FULCIO_ISSUER, issuer),
            (_FULCIO_ISSUER_DER, b"\x0c" + _der_length(issuer)),
        ):
            builder = builder.add_extension(x509.UnrecognizedExtension(oid, value), critical=False)
        before = builder.sign(self.fulcio, hashes.SHA256())
        scts = self._signed_by_ct(before, int(began.timestamp()) * 1000)
        extension = x509.UnrecognizedExtension(_SCTS, b"\x04" + _der_length(scts))
        return builder.add_extension(extension, critical=False).sign(self.fulcio, hashes.SHA256())

    def _signed_by_ct(self, before: x509.Certificate, milliseconds: int) -> bytes:
        body = before.tbs_certificate_bytes
        entry = _key_id(self.fulcio) + len(body).to_bytes(3, "big") + body
        signed = struct.pack("!BBQH", 0, 0, milliseconds, 1) + entry + b"\0\0"
        signature = self.ct.sign(signed, ec.ECDSA(hashes.SHA256()))
        sct = b"\0" + _key_id(self.ct) + struct.pack("!QH", milliseconds, 0) + b"\x04\x03"
        sct += struct.pack("!H", len(signature)) + signature
        return struct.pack("!HH", len(sct) + 2, len(sct)) + sct

    # Rekor.

    def log(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """An entry of the log, with its promise and its proof."""
        proposed = order["spec"]["proposedContent"]
        envelope = json.loads(proposed["envelope"])
        body = {
            "apiVersion": "0.0.1",
            "kind": order["kind"],
            "spec": {
                "envelopeHash": _hash(proposed["envelope"].encode()),
                "payloadHash": _hash(base64.b64decode(envelope["payload"])),
                "signatures": [
                    {"signature": signature["sig"], "verifier": verifier}
                    for signature, verifier in zip(
                        envelope["signatures"], proposed["verifiers"], strict=True
                    )
                ],
            },
        }
        text = _canonical(body)
        root = hashlib.sha256(b"\0" + text).digest()
        entry: dict[str, Any] = {
            "body": _b64(text),
            "integratedTime": int(time.time()) + self.late,
            "logID": _key_id(self.rekor).hex(),
            "logIndex": 0,
        }
        promise = self._sign(_canonical(entry))
        note = f"log of the tests\n1\n{_b64(root)}\n"
        mark = _b64(_key_id(self.rekor)[:4] + self._sign(note.encode()))
        entry["verification"] = {
            "signedEntryTimestamp": _b64(promise),
            "inclusionProof": {
                "logIndex": 0,
                "rootHash": root.hex(),
                "treeSize": 1,
                "hashes": [],
                "checkpoint": f"{note}\n— tests {mark}\n",
            },
        }
        return {root.hex(): entry}

    def _sign(self, data: bytes) -> bytes:
        return self.rekor.sign(data, ec.ECDSA(hashes.SHA256()))


def _handler(sigstore: Sigstore) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_POST(self) -> None:
            order = json.loads(self.rfile.read(int(self.headers["content-length"])))
            bearer = self.headers.get("authorization", "")
            sigstore.bearers.append((self.path, bearer))
            status, body = sigstore.planned.get(self.path, (0, b""))
            if not status:
                status, body = self._act(order, bearer)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _act(self, order: dict[str, Any], bearer: str) -> tuple[int, bytes]:
            try:
                if self.path == "/api/v2/signingCert":
                    return 200, json.dumps(sigstore.certify(bearer, order)).encode()
                assert self.path == "/api/v1/log/entries"
                return 201, json.dumps(sigstore.log(order)).encode()
            except jwt.InvalidTokenError as error:
                words = {"code": 16, "message": f"There was an error: {error} in {bearer}"}
                return 401, json.dumps(words).encode()

    return Handler


def _usage(*, signs_certificates: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _identity(claims: Mapping[str, Any]) -> x509.GeneralName:
    """As Fulcio has it: the workflow of a job at GitHub, else the subject."""
    if "job_workflow_ref" in claims:
        return x509.UniformResourceIdentifier(f"https://github.com/{claims['job_workflow_ref']}")
    subject = str(claims["sub"])
    return x509.RFC822Name(subject) if "@" in subject else x509.UniformResourceIdentifier(subject)


def _log(url: str, key: ec.EllipticCurvePrivateKey) -> dict[str, Any]:
    public = {
        "rawBytes": _b64(_public(key)),
        "keyDetails": _P256,
        "validFor": {"start": "2024-01-01T00:00:00Z"},
    }
    log_id = {"keyId": _b64(_key_id(key))}
    return {"baseUrl": url, "hashAlgorithm": "SHA2_256", "publicKey": public, "logId": log_id}


def _public(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _key_id(key: ec.EllipticCurvePrivateKey) -> bytes:
    return hashlib.sha256(_public(key)).digest()


def _der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def _der_length(data: bytes) -> bytes:
    """The data after its length, as DER has it; of less than 256 bytes."""
    assert len(data) < 256
    return (bytes([len(data)]) if len(data) < 128 else bytes([0x81, len(data)])) + data


def _hash(data: bytes) -> dict[str, str]:
    return {"algorithm": "sha256", "value": hashlib.sha256(data).hexdigest()}


def _canonical(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()
