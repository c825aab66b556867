"""API keys are known by their hashes, from a file and from a list, and never told."""

import hashlib
from pathlib import Path

import pytest

from model.errors import ConfigError, Unauthorized
from service.door.keys import make_key, read_keyring


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def test_keys_come_from_a_file_and_a_list(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n\nalice:{digest('one')}\n  bob:{digest('two')}:2.5:7\n")
    keyring = read_keyring(file, f"carol:{digest('three')}:0,")
    assert bool(keyring)
    alice, bob, carol = (keyring.require(key) for key in ("one", "two", "three"))
    assert (alice.name, alice.rate_per_s, alice.burst) == ("alice", None, None)
    assert (bob.name, bob.rate_per_s, bob.burst) == ("bob", 2.5, 7)
    assert (carol.name, carol.rate_per_s, carol.burst) == ("carol", 0.0, None)


@pytest.mark.parametrize("given", ["", "on", "one ", digest("one"), "é\udcff"])
def test_anything_else_is_refused(given: str) -> None:
    with pytest.raises(Unauthorized, match="send 'Authorization: Bearer KEY'"):
        read_keyring(None, f"alice:{digest('one')}").require(given)


def test_no_keys_are_an_empty_ring() -> None:
    assert not read_keyring(None, "")


@pytest.mark.parametrize(
    "line", ["alice", "alice:secret", f"a b:{digest('x')}", f"a:{digest('x')}:fast", f"a:{digest('x')}:1:0", ":" * 5]
)
def test_a_broken_line_is_named_by_its_number_and_not_repeated(tmp_path: Path, line: str) -> None:
    file = tmp_path / "keys"
    file.write_text(f"bob:{digest('two')}\n{line}\n")
    with pytest.raises(ConfigError, match="line 2 is not NAME:SHA256") as caught:
        read_keyring(file, "")
    assert line not in str(caught.value)


def test_a_file_without_keys_or_without_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# none yet\n")
    with pytest.raises(ConfigError, match="holds no API key"):
        read_keyring(tmp_path / "keys", "")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keyring(tmp_path / "none", "")


def test_two_keys_need_two_names() -> None:
    with pytest.raises(ConfigError, match="two API keys have one name"):
        read_keyring(None, f"a:{digest('x')},a:{digest('y')}")


def test_a_new_key_opens_with_the_line_that_comes_with_it() -> None:
    key, line = make_key("alice")
    assert len(key) == 43
    assert key not in line
    assert read_keyring(None, line).require(key).name == "alice"
    assert make_key("alice")[0] != key
    with pytest.raises(ConfigError):
        make_key("a:b")
