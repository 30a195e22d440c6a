"""Backends, beyond their contract (test_conformance.py): groups that do not divide a linear's inputs."""

from __future__ import annotations

import pytest
import torch
from impq_gptq.backend import Gptq
from impq_hqq.backend import Hqq
from impq_quanto.backend import Quanto

from impq_core.errors import ImpqError
from impq_core.space import LinearSpec


def test_groups_that_do_not_divide_are_refused_or_lowered() -> None:
    for kind in (Gptq, Hqq):
        backend = kind()
        with pytest.raises(ImpqError, match=r"of a\.b"):
            backend.check(LinearSpec("a.b", 64, 96), backend.choices()[-1])
    quanto, four = Quanto(), Quanto().choices()[1]
    for columns, groups in ((576, 6), (1536, 12), (160, 5), (200, 1), (128, 1)):
        assert quanto.nbytes(LinearSpec("a.b", 64, columns), four) == 64 * columns // 2 + 64 * groups * 4
        variant = quanto.quantize(torch.randn(64, columns), four, None)
        assert variant.tensors["scale"].numel() == 64 * groups
