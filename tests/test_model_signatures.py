"""Signatures of artifacts: valid only for their contract and by a trusted key."""

import stat
from pathlib import Path

import pytest
from fake_registry import make_registry, write_artifact

from model.contract import CONTRACT_FILE
from model.errors import ConfigError, RegistryConflict, SignatureError
from model.registry.signatures import (
    SIGNATURE_FILE,
    TrustedKeys,
    create_signing_key,
    read_trusted_keys,
    sign,
    verify_signature,
)

pytest.importorskip("cryptography", reason="useg[signing] is not installed")


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return write_artifact(tmp_path / "artifact", "1")


def trust(tmp_path: Path, *names: str) -> TrustedKeys:
    """Create keys, and read the file of trusted keys that lists them."""
    lines = [create_signing_key(tmp_path / name, name=name)["trusted_keys_line"] for name in names]
    (tmp_path / "trusted").write_text("# comment\n\n" + "\n".join(lines) + "\n")
    return read_trusted_keys(tmp_path / "trusted")


def test_a_signature_by_any_trusted_key_is_accepted(tmp_path: Path, artifact: Path) -> None:
    trusted = trust(tmp_path, "alice", "bob")
    sign(artifact, key=tmp_path / "bob", name="bob")
    assert verify_signature(artifact, trusted) == "bob"
    assert stat.S_IMODE((tmp_path / "bob").stat().st_mode) == 0o600


def test_a_signature_by_another_key_or_of_another_contract_is_rejected(tmp_path: Path, artifact: Path) -> None:
    trusted = trust(tmp_path, "alice")
    create_signing_key(tmp_path / "eve", name="alice")
    sign(artifact, key=tmp_path / "eve", name="alice")
    with pytest.raises(SignatureError, match="not trusted"):
        verify_signature(artifact, trusted)
    sign(artifact, key=tmp_path / "alice", name="alice")
    contract = artifact / CONTRACT_FILE
    contract.write_text(contract.read_text().replace("tomato", "potato"))
    with pytest.raises(SignatureError, match="belongs to another contract"):
        verify_signature(artifact, trusted)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"[]", b"{}", b"\xff", b'{"format_version": 2, "algorithm": "ed25519", "signature": ""}'),
        b'{"format_version": 1, "algorithm": "ed25519", "signature": "AAAA"}',
    ],
)
def test_a_file_that_is_not_a_signature_is_rejected(tmp_path: Path, artifact: Path, content: bytes) -> None:
    trusted = trust(tmp_path, "alice")
    with pytest.raises(SignatureError, match="is not signed"):
        verify_signature(artifact, trusted)
    (artifact / SIGNATURE_FILE).write_bytes(content)
    with pytest.raises(SignatureError):
        verify_signature(artifact, trusted)


def test_keys_are_never_overwritten_and_have_valid_names(tmp_path: Path) -> None:
    create_signing_key(tmp_path / "key", name="alice")
    with pytest.raises(ConfigError, match="never overwritten"):
        create_signing_key(tmp_path / "key", name="alice")
    with pytest.raises(ConfigError, match="the new key"):
        create_signing_key(tmp_path / "other", name="a b")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("text", ["", "# none\n", "alice", "alice:short", f"alice:{'A' * 43}=:x"])
def test_an_invalid_file_of_trusted_keys_is_rejected(tmp_path: Path, text: str) -> None:
    (tmp_path / "trusted").write_text(text)
    with pytest.raises(ConfigError):
        read_trusted_keys(tmp_path / "trusted")


@pytest.mark.parametrize("content", [b"", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_an_invalid_private_key_is_rejected(tmp_path: Path, artifact: Path, content: bytes) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(ConfigError, match="is not a private key"):
        sign(artifact, key=tmp_path / "key", name="")


def test_a_registry_copies_signatures_and_does_not_rename_signed_artifacts(tmp_path: Path, artifact: Path) -> None:
    trusted = trust(tmp_path, "alice")
    sign(artifact, key=tmp_path / "alice", name="alice")
    registry = make_registry(tmp_path, {})
    registry.add(artifact, author="test")
    assert verify_signature(registry.find_version("fake", "1"), trusted) == "alice"
    with pytest.raises(RegistryConflict, match="sign it again"):
        registry.add(artifact, version="2", author="test")
