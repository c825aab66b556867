"""Signatures of artifacts, with ed25519 keys: `useg sign` and `useg create-signing-key`. Needs the extra `signing`."""

import base64
import binascii
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from model.contract import CONTRACT_FILE
from model.errors import ArtifactError, BackendUnavailable, ConfigError, SignatureError
from model.files import replace_file

SIGNATURE_FILE = "contract.sig"
FORMAT_VERSION = 1
_CONTEXT = b"useg contract 1\n"
"""Prefix of the signed content, so that a signature of other content is not valid for a contract."""
_LINE = re.compile(r"([A-Za-z0-9._-]{1,64}):([A-Za-z0-9+/]{43}=)", re.ASCII)


TrustedKeys = tuple[tuple[str, bytes], ...]
"""Names of keys and their public keys, whose signatures are accepted."""


def create_signing_key(key: Path, /, *, name: str = "useg") -> dict[str, Any]:
    """Create a key pair to sign artifacts; needs the extra `signing`.

    Parameters
    ----------
    key
        File to write the private key to; it must not exist.
    name
        Name of the key, in the line `NAME:KEY` of the public key for a file of trusted keys.
    """
    ed25519, serialization = _load_cryptography()
    private = ed25519.Ed25519PrivateKey.generate()
    public = private.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    line = f"{name}:{base64.b64encode(public).decode()}"
    _parse_line(line, "the new key")
    content = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    try:
        key.touch(0o600, exist_ok=False)
    except FileExistsError as error:
        raise ConfigError(f"{key} exists: keys are never overwritten") from error
    key.write_bytes(content)
    return {"key": str(key), "trusted_keys_line": line}


def sign(artifact: Path, /, *, key: Path, name: str = "") -> dict[str, Any]:
    """Sign an artifact, for services that require signatures.

    Parameters
    ----------
    artifact
        Folder of the artifact; the signature is written next to its contract, which has the hashes of all files.
    key
        Private key, as `useg create-signing-key` writes it.
    name
        Name of the key, for people.
    """
    ed25519, serialization = _load_cryptography()
    try:
        private = serialization.load_pem_private_key(key.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{key} is not a private key written by `useg create-signing-key`: {error}") from error
    if not isinstance(private, ed25519.Ed25519PrivateKey):
        raise ConfigError(f"{key} is not an ed25519 key")
    signature = base64.b64encode(private.sign(_CONTEXT + _read_contract_bytes(artifact))).decode()
    content = {"format_version": FORMAT_VERSION, "algorithm": "ed25519", "key": name, "signature": signature}
    replace_file(artifact / SIGNATURE_FILE, json.dumps(content, indent=2) + "\n")
    return {"artifact": str(artifact), "signed": True}


def read_trusted_keys(path: Path) -> TrustedKeys:
    """Read a file with a `NAME:KEY` per line, except empty lines and comments (#). Raises ConfigError."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the trusted keys in {path} cannot be read: {error}") from error
    keys = [
        _parse_line(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line and line[0] != "#"
    ]
    if not keys:
        raise ConfigError(f"{path} has no key: add lines NAME:KEY, as printed by `useg create-signing-key`")
    return tuple(keys)


def verify_signature(artifact: Path, trusted: TrustedKeys) -> str:
    """Return the name of the trusted key that signed the contract. Raises SignatureError if there is none."""
    ed25519, _ = _load_cryptography()
    from cryptography.exceptions import InvalidSignature

    path = artifact / SIGNATURE_FILE
    try:
        content: Any = json.loads(path.read_bytes())
        if (content["format_version"], content["algorithm"]) != (FORMAT_VERSION, "ed25519"):
            raise SignatureError(f"{path} has another format, this release reads ed25519 in version {FORMAT_VERSION}")
        signature = base64.b64decode(content["signature"], validate=True)
    except FileNotFoundError as error:
        raise SignatureError(f"{artifact} is not signed, but signatures are required") from error
    except (OSError, ValueError, KeyError, TypeError, binascii.Error) as error:
        raise SignatureError(f"{path} is not a valid signature: {error!r}") from error
    signed = _CONTEXT + _read_contract_bytes(artifact)
    for name, public in trusted:
        with suppress(InvalidSignature):
            ed25519.Ed25519PublicKey.from_public_bytes(public).verify(signature, signed)
            return name
    raise SignatureError(f"{path} belongs to another contract, or to a key that is not trusted")


def _read_contract_bytes(artifact: Path) -> bytes:
    try:
        return (artifact / CONTRACT_FILE).read_bytes()
    except OSError as error:
        raise ArtifactError(f"{artifact / CONTRACT_FILE} cannot be read: {error.strerror}") from error


def _parse_line(line: str, place: str) -> tuple[str, bytes]:
    match = _LINE.fullmatch(line)
    if not match:
        raise ConfigError(f"{place} is not NAME:KEY with an ed25519 key in base64")
    return match[1], base64.b64decode(match[2])


def _load_cryptography() -> tuple[Any, Any]:
    """Import the optional dependency."""
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ModuleNotFoundError as error:
        raise BackendUnavailable("signatures need cryptography: install useg[signing]") from error
    return ed25519, serialization
