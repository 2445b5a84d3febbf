import os
import platform
import subprocess
import sys

import pytest

COUNT_NEW_PAGES = """
import resource
from minicpmv_finetune.cpu_memory import keep_freed_memory
if {is_kept}:
    keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    bytearray(40 * 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _new_pages(is_kept: bool, **variables: str) -> int:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    program = [sys.executable, "-c", COUNT_NEW_PAGES.format(is_kept=is_kept)]
    return int(subprocess.check_output(program, env=kept | variables))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries have no such setting")
def test_freed_memory_is_used_again_unless_the_user_has_decided() -> None:
    by_default = _new_pages(is_kept=False)
    assert _new_pages(is_kept=True) < by_default / 4
    assert _new_pages(is_kept=True, MALLOC_TRIM_THRESHOLD_="131072") > by_default / 2
