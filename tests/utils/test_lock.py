"""utils/lock.py: what it refuses, and where there are no locks. tests/modes/test_resume.py has runs that meet."""

import errno
import fcntl

import pytest

from utils.errors import UsageError
from utils.lock import LOCK, UNSUPPORTED, locked


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_refused_and_what_it_names_stays_as_it_is(there, tmp_path):
    folder, other = tmp_path / "folder", tmp_path / "other"
    folder.mkdir()
    if there:
        other.write_text("mine")
    (folder / LOCK).symlink_to(other)
    with pytest.raises(UsageError, match="is a link"), locked(folder):
        pass
    assert other.exists() == there and (folder / LOCK).is_symlink()
    assert not there or other.read_text() == "mine"


def test_a_second_name_of_another_file_is_refused(tmp_path):
    folder, other = tmp_path / "folder", tmp_path / "other"
    folder.mkdir()
    other.write_text("mine")
    (folder / LOCK).hardlink_to(other)
    with pytest.raises(UsageError, match="is a link"), locked(folder):
        pass
    assert other.read_text() == "mine" and (folder / LOCK).exists()


@pytest.mark.parametrize("number", UNSUPPORTED)
def test_a_file_system_without_locks_is_warned_of_and_written(number, tmp_path, monkeypatch, caplog):
    def refuse(descriptor, operation):
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path):
        assert "can't be locked here" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_not_taken_for_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="broken"), locked(tmp_path):
        pass
