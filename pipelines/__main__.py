"""``python -m pipelines`` is ``scviaduct``."""

from pipelines.cli import main

if __name__ == "__main__":
    main()
