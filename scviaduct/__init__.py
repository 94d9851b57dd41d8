"""scviaduct: what happens to a cell on its way from an atlas to a pretrained reference.

This package holds the science and imports neither Ray nor any other package of the project.
"""

import os
import sys

__version__ = "0.1.0"

if sys.platform.startswith("linux"):
    # Arrow asks once, when it is imported: this has no effect where that was before. Its own allocator gives memory
    # back that the next shard takes again (see scviaduct.allocator): mapping 98,304 cells takes 3,000 page faults with
    # it, and 100 without. What is set stays.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
