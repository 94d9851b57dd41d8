"""What a process frees is there for the next shard."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, resource
import numpy as np
from scviaduct.allocator import keep_memory

kept = keep_memory()
np.ones(16 << 20)  # 128 MB, freed at once
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    np.ones(16 << 20)
print(json.dumps([kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before]))
"""

THREAD = """
import json, resource
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from scviaduct.allocator import keep_memory

def fill():
    held = [np.ones(1 << 17) for _ in range(150)]  # 150 MB, in three heaps of an arena

with ThreadPoolExecutor(1) as pool:
    pool.submit(np.ones, 10_000).result()  # the thread takes an arena of its own
    kept = keep_memory()
    pool.submit(fill).result()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        pool.submit(fill).result()
print(json.dumps([kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before]))
"""


ARROW = """
import json
import scviaduct
import pyarrow as pa

print(json.dumps(pa.default_memory_pool().backend_name))
"""


def run(program=PROGRAM, **variables):
    # numpy asks for huge pages, of which there may be some at one time and none at another.
    own = {name: value for name, value in os.environ.items() if name != "ARROW_DEFAULT_MEMORY_POOL"}
    told = own | {"NUMPY_MADVISE_HUGEPAGE": "0"} | variables
    found = subprocess.run([sys.executable, "-c", program], env=told, capture_output=True, text=True, check=True)
    return json.loads(found.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the settings are those of glibc")
def test_freed_memory_is_taken_again_without_faults():
    kept, faults = run()
    assert kept
    assert faults < 100  # of 4 KiB; all of it are 160,000


@pytest.mark.skipif(sys.platform != "linux", reason="the settings are those of glibc")
def test_a_thread_that_had_an_arena_before_keeps_its_memory_too():
    kept, faults = run(THREAD)
    assert kept
    assert faults < 100  # 6,400 where heaps that are empty go back


@pytest.mark.skipif(sys.platform != "linux", reason="the settings are those of glibc")
def test_arrow_takes_that_memory_unless_it_is_told_otherwise():
    assert run(ARROW) == "system"
    assert run(ARROW, ARROW_DEFAULT_MEMORY_POOL="mimalloc") == "mimalloc"


@pytest.mark.skipif(sys.platform != "linux", reason="the settings are those of glibc")
@pytest.mark.parametrize(
    "told",
    [
        {"MALLOC_MMAP_THRESHOLD_": "1000000"},
        {"MALLOC_TRIM_THRESHOLD_": "1000000"},
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1000000"},
    ],
)
def test_what_was_set_otherwise_stays(told):
    kept, faults = run(**told)
    assert kept
    assert faults > 10_000


@pytest.mark.skipif(sys.platform != "linux", reason="the settings are those of glibc")
def test_the_rest_is_set_beside_it():
    kept, faults = run(MALLOC_ARENA_MAX="4")
    assert kept
    assert faults < 100
