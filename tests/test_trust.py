"""Files that travel may not permit code to run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from scenes import World

from impq_core.config import RunConfig, from_data, read_toml
from impq_core.errors import UsageError
from impq_core.trust import without_permissions


@pytest.mark.parametrize("value", [True, 1, "yes"])
def test_a_permission_in_a_file_is_refused_with_the_flag_that_gives_it(value: object, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"impq\.json: trust_remote_code .*give --trust-remote-code"):
        from_data({"model": "x", "trust_remote_code": value}, "impq.json")
    (tmp_path / "impq.toml").write_text("trust_remote_code = true\n")
    with pytest.raises(UsageError, match="trust_remote_code"):
        read_toml(tmp_path / "impq.toml")


def test_a_permission_that_was_not_given_is_dropped() -> None:
    assert without_permissions({"model": "x", "trust_remote_code": False}, "a file") == {"model": "x"}


def test_no_configuration_can_hold_a_permission() -> None:
    assert not [name for name in vars(RunConfig()) if "trust" in name]
