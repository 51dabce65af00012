"""What pyproject.toml cannot say: the recipes in `configs/` are installed as the package `mome.configs`."""

from setuptools import find_namespace_packages, find_packages, setup

recipes = ["configs", *(f"configs.{name}" for name in find_namespace_packages("configs"))]

setup(
    packages=[*find_packages(include=["pipeline*", "jobs*"]), *(f"mome.{name}" for name in recipes)],
    package_dir={f"mome.{name}": name.replace(".", "/") for name in recipes},
)
