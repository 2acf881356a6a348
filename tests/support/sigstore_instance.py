"""A Sigstore instance on 127.0.0.1: certificates for identities, and a log of signatures.

    with Issuer() as issuer, Sigstore(issuer) as sigstore:
        trust = sigstore.write_trust(folder / "trust.json")  # what clients are told of it
        ...  # SIGSTORE_ID_TOKEN=issuer.token("sigstore") nf4 sign --keyless --trust-config trust

Fulcio is an X.509 authority whose certificates carry a certificate transparency log's signature.
Rekor 1 gives an entry with a promise, which holds the time, and a proof of inclusion; Rekor 2 the
proof alone, and the time comes from a timestamp authority (RFC 3161). They do what the client
checks: every signature, hash and time is real, and made with keys of this instance. Each entry is
alone in its tree.
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
from asn1crypto import cms, tsp
from asn1crypto import x509 as asn1_x509
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
        version: of Rekor.
        age: seconds since when its certificates began; they are good for ten minutes.
        late: seconds that the log's clock is before the machine's.
        planned: what is answered instead, by path.
        bearers: what each request was authorized with, by path.
    """

    def __init__(self, issuer: Issuer, *, version: int = 1) -> None:
        self.issuer, self.version = issuer, version
        self.age = self.late = 0
        self.planned: dict[str, tuple[int, bytes]] = {}
        self.bearers: list[tuple[str, str]] = []
        self.fulcio, self.ct, self.rekor, self.tsa = (
            ec.generate_private_key(ec.SECP256R1()) for _ in range(4)
        )
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
        self.tsa_certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tsa of the tests")]))
            .issuer_name(name)
            .public_key(self.tsa.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(_START)
            .not_valid_after(_START + timedelta(days=36_000))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.TIME_STAMPING]), critical=True
            )
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
        root = {"rawBytes": _b64(_der(self.root))}
        subject = {"organization": "tests", "commonName": "fulcio of the tests"}
        authority = {"subject": subject, "uri": self.url, "validFor": valid}
        stamps = {"certificates": [{"rawBytes": _b64(_der(self.tsa_certificate))}, root]}
        config = {
            "mediaType": "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json",
            "trustedRoot": {
                "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
                "tlogs": [_log(self.url, self.rekor)],
                "ctlogs": [_log(f"{self.url}/ct", self.ct)],
                "certificateAuthorities": [{**authority, "certChain": {"certificates": [root]}}],
                "timestampAuthorities": [{**authority, "certChain": stamps}],
            },
            "signingConfig": {
                "mediaType": "application/vnd.dev.sigstore.signingconfig.v0.2+json",
                "caUrls": [{"url": self.url, **service}],
                "oidcUrls": [{"url": self.issuer.url, **service}],
                "rekorTlogUrls": [{"url": self.url, **service, "majorApiVersion": self.version}],
                "rekorTlogConfig": {"selector": "ANY"},
                "tsaUrls": [{"url": f"{self.url}/tsa", **service}] * (self.version == 2),
                "tsaConfig": {"selector": "ANY"},
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
        root, checkpoint = self._tree(text)
        entry: dict[str, Any] = {
            "body": _b64(text),
            "integratedTime": int(time.time()) + self.late,
            "logID": _key_id(self.rekor).hex(),
            "logIndex": 0,
        }
        promise = self._sign(_canonical(entry))
        entry["verification"] = {
            "signedEntryTimestamp": _b64(promise),
            "inclusionProof": {
                "logIndex": 0,
                "rootHash": root.hex(),
                "treeSize": 1,
                "hashes": [],
                "checkpoint": checkpoint,
            },
        }
        return {root.hex(): entry}

    def log_2(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """The same of version 2, which says nothing of the time."""
        asked = order["hashedRekordRequestV002"]
        signed = {"algorithm": "SHA2_256", "digest": asked["digest"]}
        body = {
            "apiVersion": "0.0.2",
            "kind": "hashedrekord",
            "spec": {"hashedRekordV002": {"data": signed, "signature": asked["signature"]}},
        }
        text = _canonical(body)
        root, checkpoint = self._tree(text)
        return {
            "logIndex": "0",
            "logId": {"keyId": _b64(_key_id(self.rekor))},
            "kindVersion": {"kind": "hashedrekord", "version": "0.0.2"},
            "inclusionProof": {
                "logIndex": "0",
                "rootHash": _b64(root),
                "treeSize": "1",
                "hashes": [],
                "checkpoint": {"envelope": checkpoint},
            },
            "canonicalizedBody": _b64(text),
        }

    def _tree(self, leaf: bytes) -> tuple[bytes, str]:
        """The root of a tree of one leaf, and the log's signed word for it."""
        root = hashlib.sha256(b"\0" + leaf).digest()
        note = f"log of the tests\n1\n{_b64(root)}\n"
        mark = _b64(_key_id(self.rekor)[:4] + self._sign(note.encode()))
        return root, f"{note}\n— tests {mark}\n"

    # The timestamp authority.

    def stamp(self, asked: bytes) -> bytes:
        """A signed time for what a request names (RFC 3161)."""
        request = tsp.TimeStampReq.load(asked)
        certificate = asn1_x509.Certificate.load(_der(self.tsa_certificate))
        info = tsp.TSTInfo(
            {
                "version": "v1",
                "policy": "1.3.6.1.4.1.57264.2",
                "message_imprint": request["message_imprint"],
                "serial_number": x509.random_serial_number(),
                "gen_time": datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=self.late),
                "nonce": request["nonce"],
            }
        )
        content = info.dump()
        named = {"issuer": certificate.issuer, "serial_number": certificate.serial_number}
        own = {"cert_hash": hashlib.sha256(certificate.dump()).digest()}
        attributes = cms.CMSAttributes(
            [
                {"type": "content_type", "values": ["tst_info"]},
                {"type": "message_digest", "values": [hashlib.sha256(content).digest()]},
                {"type": "signing_certificate_v2", "values": [{"certs": [own]}]},
            ]
        )
        signer = {
            "version": "v1",
            "sid": cms.SignerIdentifier("issuer_and_serial_number", named),
            "digest_algorithm": {"algorithm": "sha256"},
            "signed_attrs": attributes,
            "signature_algorithm": {"algorithm": "sha256_ecdsa"},
            "signature": self.tsa.sign(attributes.dump(), ec.ECDSA(hashes.SHA256())),
        }
        signed = {
            "version": "v3",
            "digest_algorithms": [{"algorithm": "sha256"}],
            "encap_content_info": {"content_type": "tst_info", "content": info},
            "certificates": [certificate],
            "signer_infos": [signer],
        }
        token = {"content_type": "signed_data", "content": cms.SignedData(signed)}
        answer = tsp.TimeStampResp({"status": {"status": "granted"}, "time_stamp_token": token})
        return bytes(answer.dump())

    def _sign(self, data: bytes) -> bytes:
        return self.rekor.sign(data, ec.ECDSA(hashes.SHA256()))


def _handler(sigstore: Sigstore) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # see `hub_server`
        timeout = 300

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            bearer = self.headers.get("authorization", "")
            sigstore.bearers.append((self.path, bearer))
            status, answer = sigstore.planned.get(self.path, (0, b""))
            if not status:
                status, answer = self._act(body, bearer)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def _act(self, body: bytes, bearer: str) -> tuple[int, bytes]:
            if self.path == "/tsa":
                return 201, sigstore.stamp(body)
            order = json.loads(body)
            try:
                if self.path == "/api/v2/signingCert":
                    return 200, json.dumps(sigstore.certify(bearer, order)).encode()
                log = {"/api/v1/log/entries": sigstore.log, "/api/v2/log/entries": sigstore.log_2}
                return 201, json.dumps(log[self.path](order)).encode()
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
