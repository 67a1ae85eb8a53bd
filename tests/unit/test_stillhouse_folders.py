"""Where a local stack's database lives: where it began to, whatever becomes of the folders' permissions."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillhouse import folders
from stillhouse.folders import can_enter, find_barrier, place_for
from stillhouse.processes import LocalError, Owner

STRANGER = Owner("stranger", 54_321, 54_321)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that strangers may enter; pytest's own are closed to them."""
    monkeypatch.setattr(folders, "SYSTEM_DIR", tmp_path / "system")
    root = Path(tempfile.mkdtemp())
    root.chmod(0o711)
    (root / "postgres").mkdir(mode=0o711)
    assert can_enter(root / "postgres", STRANGER)
    yield root / "postgres"
    shutil.rmtree(root)


def test_data_begin_where_their_user_can_enter(folder: Path) -> None:
    assert place_for(folder, STRANGER) == folder
    assert place_for(folder, None) == folder
    folder.parent.chmod(0o700)
    assert find_barrier(folder, STRANGER) == folder.parent
    other = place_for(folder, STRANGER)
    assert other.parent == folders.SYSTEM_DIR


def test_data_that_went_elsewhere_stay_there_when_the_folder_opens(folder: Path) -> None:
    folder.parent.chmod(0o700)
    other = place_for(folder, STRANGER)
    assert place_for(folder, STRANGER) == other
    folder.parent.chmod(0o711)
    assert place_for(folder, STRANGER) == other


def test_data_that_are_there_are_never_left_for_an_empty_place(folder: Path) -> None:
    (folder / "data").mkdir()
    folder.parent.chmod(0o700)
    with pytest.raises(LocalError, match=f"chmod o\\+x {folder.parent}"):
        place_for(folder, STRANGER)
    assert not folders.SYSTEM_DIR.exists()
    folder.parent.chmod(0o711)
    assert place_for(folder, STRANGER) == folder
