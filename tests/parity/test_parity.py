"""Every folder of recorded results, with the comparison of `compare.py`."""

from pathlib import Path

import pytest

from tests.parity.compare import Comparison

GOLDEN = sorted(path.parent for path in (Path(__file__).parent / "golden").glob("*/expected.json"))


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_results_equal_those_recorded_from_the_official_code(folder: Path) -> None:
    findings = Comparison(folder).run().findings
    assert [str(finding) for finding in findings if not finding.ok] == []
    assert len(findings) > 500
