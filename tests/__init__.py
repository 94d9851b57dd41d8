"""Tests, in folders that mirror the packages.

The only ``__init__.py`` in here: a dependency of scib-metrics installs a top-level package called ``tests``, and Python
prefers any regular package to a folder without this file, so that a child process could not import a test's function.
Folders below stay without: ``tests/actors/__init__.py`` would hide ``actors``.
"""
