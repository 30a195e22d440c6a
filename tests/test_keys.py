"""Identity: equal keys have equal digests, a difference is named, and a label is not part of the identity."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from impq_core.errors import ImpqError
from impq_core.interfaces import NO_FILE, InputFile, NoOptions, Part
from impq_core.keys import LossesKey, TextKey, VariantsKey, code_digest, part_facts, versions

VARIANTS = VariantsKey("model", "float32", "cpu", "impq_gptq.backend", {"group_size": 64, "label": "a"}, {"torch": "2"},
                       "code", TextKey("tokens", "64 windows of c4"), "prefix", "my model")
LOSSES = LossesKey(VARIANTS, "space", "nll", "code", None, TextKey("game"))


def test_a_key_survives_its_own_file() -> None:
    assert LOSSES.diff(LOSSES.to_dict()) == []
    LOSSES.require(LOSSES.to_dict(), "here")


@pytest.mark.parametrize(("changed", "name", "before", "now"), [
    (replace(LOSSES, value="kl"), "value", '"nll"', '"kl"'),
    (replace(LOSSES, variants=replace(VARIANTS, options={"group_size": 32, "label": "a"})),
     "variants.options.group size", "64", "32"),
    (replace(LOSSES, variants=replace(VARIANTS, options={"group_size": 64, "label": "b"})),
     "variants.options.label", '"a"', '"b"'),
    (replace(LOSSES, variants=replace(VARIANTS, calibration=TextKey("others", "64 windows of c4"))),
     "variants.calibration.tokens", '"tokens"', '"others"'),
    (replace(LOSSES, game=None), "game", '{"tokens": "game"}', "null")])
def test_what_changed_is_named(changed: LossesKey, name: str, before: str, now: str) -> None:
    [change] = changed.diff(LOSSES.to_dict())
    assert (change.name, change.before, change.now) == (name, before, now)
    assert changed.digest != LOSSES.digest
    with pytest.raises(ImpqError, match=r"there cannot be continued: ") as error:
        changed.require(LOSSES.to_dict(), "there")
    assert name in str(error.value) and "\n" not in str(error.value)


def test_labels_decide_nothing() -> None:
    renamed = replace(LOSSES, variants=replace(VARIANTS, label="moved", calibration=TextKey("tokens", "renamed.txt")))
    assert renamed.digest == LOSSES.digest and renamed.diff(LOSSES.to_dict()) == []
    assert renamed.to_dict() != LOSSES.to_dict()


def test_a_file_that_an_option_names_is_part_of_the_identity(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Options:
        prior: InputFile = NO_FILE
        count: int = 3

    file = tmp_path / "prior.npz"
    file.write_bytes(b"one")
    part = Part(Options(InputFile(file)))
    before = part_facts("mine", part)
    assert before["options"] == {"count": 3} and before["files"]["prior"]
    file.write_bytes(b"two")
    assert part_facts("mine", part) != before
    file.unlink()
    with pytest.raises(ImpqError, match=r"option prior of 'mine': .*prior\.npz cannot be read"):
        part_facts("mine", part)
    assert part_facts("mine", Part(NoOptions())) == {"name": "mine", "options": {}, "files": {}}


def test_the_code_of_a_part_counts_and_that_of_other_modules_does_not(tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "impq_coded.py"
    file.write_text("from impq_core.interfaces import Part\n\nclass Mine(Part): ...\n")
    import impq_coded  # type: ignore[import-not-found]

    part = impq_coded.Mine()
    before, alone = code_digest(part), code_digest()
    file.write_text(file.read_text() + "# changed\n")
    assert code_digest(part) != before and code_digest() == alone
    assert code_digest(core=("space.py",)) != code_digest(core=("types.py",))


def test_versions_name_impq_even_without_an_installation() -> None:
    assert versions(["no_such_library"])["no_such_library"] == "unknown" and versions()["torch"] != "unknown"
