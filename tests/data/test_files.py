"""Whether an output can be written is known before the work, and the check leaves nothing."""

import os

import pytest

from c2f_jax.data.files import check_writable
from c2f_jax.errors import UserError


@pytest.mark.parametrize("folder", [False, True])
def test_what_can_be_written_is_left_as_it_was(tmp_path, folder):
    place = tmp_path / "old"
    if folder:
        place.mkdir()
    else:
        place.write_text("what is there")
    for path in (place, tmp_path / "a" / "b" / "c"):
        check_writable(path, "--output", folder=folder)
    assert os.listdir(tmp_path) == ["old"]
    assert folder or place.read_text() == "what is there"


def test_what_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "gone").symlink_to(tmp_path / "nothing" / "x")
    for path in (tmp_path, tmp_path / "file" / "x", "/proc/x", "/proc/a/b", "/dev/full/x"):
        with pytest.raises(UserError, match=f"--output={path} cannot be written"):
            check_writable(path, "--output")
    for path in (tmp_path / "file", tmp_path / "gone", "/proc/x"):
        with pytest.raises(UserError, match="cannot be written"):
            check_writable(path, "--output", folder=True)
    monkeypatch.chdir(tmp_path)
    check_writable("x.html", "--output")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        check_writable(tmp_path / "x", "--output")
