"""scviaduct: what happens to a cell on its way from an atlas to a pretrained reference.

This package holds the science and imports neither Ray nor any other package of the project.
"""

__version__ = "0.1.0"
