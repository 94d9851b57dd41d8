"""The landing task: a shard of the source in, a piece of the landing out."""

from __future__ import annotations

import ray

from scviaduct.landing import land_piece

land_task = ray.remote(max_retries=0)(land_piece)
"""Retries are the driver's: a piece that was completed is found, and not written twice."""
