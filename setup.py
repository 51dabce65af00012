"""What pyproject.toml cannot say: where the package `mome` is.

Installed name -> folder of the checkout:

    mome          -> jobs/api    the Python API
    mome.configs  -> configs     the recipes
    pipeline      -> pipeline    data, models, objectives, training, evaluation
    jobs          -> jobs        Ray jobs and the command line
"""

from setuptools import find_namespace_packages, find_packages, setup

recipes = ["configs", *(f"configs.{name}" for name in find_namespace_packages("configs"))]

packages = find_packages(include=["pipeline*", "jobs*"], exclude=["jobs.api"])

setup(
    packages=["mome", *packages, *(f"mome.{name}" for name in recipes)],
    package_dir={"mome": "jobs/api", **{f"mome.{name}": name.replace(".", "/") for name in recipes}},
)
