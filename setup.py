"""Only what pyproject.toml cannot say: the optional C++ extension."""

from setuptools import setup

setup()
