"""What a run takes of a cluster: actors, readers, and shares of CPUs and GPUs."""

from __future__ import annotations

import pytest

from cluster.connect import Resources
from pipelines.running import place
from scviaduct.errors import InputError

GIB = 1 << 30


def on(cpus, gpus=0.0, store=GIB):
    return Resources(cpus, gpus, store, local=True)


@pytest.mark.parametrize(
    ("resources", "asked", "actors", "readers", "cpu", "gpu"),
    [
        (on(2), (None, None, None), 1, 1, 1.0, 0.0),
        (on(1), (None, None, None), 1, 1, 0.5, 0.0),
        (on(16), (None, None, None), 8, 8, 1.0, 0.0),
        (on(2), (2, 1, None), 2, 1, 0.5, 0.0),
        (on(2), (2, 3, None), 2, 3, 1 / 3, 0.0),
        (on(16, 2.0), (None, None, None), 2, 14, 1.0, 1.0),
        (on(16, 2.0), (None, None, 0.5), 4, 12, 1.0, 0.5),
        (on(16, 2.0), (3, None, 0.25), 3, 13, 1.0, 0.25),
    ],
)
def test_everything_fits_and_no_reader_waits_for_ever(resources, asked, actors, readers, cpu, gpu):
    limits, placement = place(resources, *asked)
    assert (limits.actors, limits.readers) == (actors, readers)
    assert (placement.actor_cpus, placement.reader_cpus, placement.actor_gpus) == (cpu, cpu, gpu)
    assert (limits.actors + limits.readers) * placement.reader_cpus <= resources.cpus
    assert limits.actors * placement.actor_gpus <= resources.gpus
    assert limits.bytes_in_flight == resources.object_store // 2


def test_a_small_object_store_still_lets_a_block_through():
    assert place(on(2, store=1 << 20), None, None, None)[0].bytes_in_flight == 64 << 20


def test_gpus_are_refused_where_there_are_none():
    with pytest.raises(InputError, match=r"--gpus-per-actor 0\.5: the cluster has no GPU.*Leave it out"):
        place(on(4), None, None, 0.5)


@pytest.mark.slow
@pytest.mark.cluster
def test_actors_share_gpus_and_say_so_where_pytorch_sees_none(cli, five_prime, pbmc, tmp_path):
    """Two GPUs that exist on paper only: placement is real, and mapping falls back to CPUs aloud."""
    options = ["--gpus-per-actor", "1", "--actors", "2", "--readers", "1", "--shard-cells", "300", "--address", "local"]
    command = ["map", five_prime, "--reference", "pbmc", "--store", tmp_path / "s", *options]
    done = cli(*command, RAY_OVERRIDE_RESOURCES='{"GPU": 2}')
    assert done.returncode == 0, done.stderr
    assert "2 mapping actors (1 GPU each), 1 reader" in done.stderr
    assert "PyTorch sees none there: they map on CPUs" in done.stderr
    assert "holds its 543 cells in 2 units" in done.stdout
