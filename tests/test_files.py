"""What is found out before work begins: whether its result can be written at all."""

import os
from pathlib import Path

import pytest

from smalti.cli.app import run
from smalti.errors import InputError
from smalti.files import new_file, new_folder, refuse_existing


def test_what_exists_is_refused_unless_forced(tmp_path):
    (tmp_path / "a").write_text("")
    refuse_existing([tmp_path / "b", tmp_path / "no" / "such" / "c"])
    refuse_existing([tmp_path / "a"], force=True)
    with pytest.raises(InputError, match="a exists already: give another name, or --force"):
        refuse_existing([tmp_path / "b", tmp_path / "a"])


@pytest.mark.parametrize("name", ["file/a", "file/b/c", "file/b/c/d.png"])
def test_a_file_in_a_folders_place_is_named(tmp_path, name: str):
    (tmp_path / "file").write_text("in the way")
    for force in (False, True):
        with pytest.raises(InputError, match=r"/file is a file, not a folder"):
            refuse_existing([tmp_path / name], force=force)
    with pytest.raises(InputError, match=r"/file is a file, not a folder"), new_file(tmp_path / name):
        pass
    with (
        pytest.raises(InputError, match=r"/file is a file, not a folder"),
        new_folder(tmp_path / name, holds=lambda _: True, what="folder"),
    ):
        pass
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.fixture
def locked(tmp_path, monkeypatch) -> Path:
    """A folder in which nobody may write; root, who may always, is told so."""
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: allowed(path, mode) and Path(path) != folder)
    return folder


def test_a_folder_that_cannot_be_written_is_named_before_work(locked: Path, capsys):
    with pytest.raises(InputError, match=r"cannot be written: the folder .*/locked is not yours to write in"):
        refuse_existing([locked / "new" / "a.png"])
    assert run(["evaluate", "nonesuch", "--data", "nonesuch", "-o", str(locked / "report")]) == 2
    assert "/locked is not yours to write in" in capsys.readouterr().err
    assert run(["generate", "two", "-o", str(locked / "a.png"), "--bundle", "nonesuch"]) == 2
    assert "/locked is not yours to write in" in capsys.readouterr().err
