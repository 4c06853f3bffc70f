"""The list of packages. pyproject.toml contains all other settings of the installation."""

from setuptools import find_namespace_packages, setup

# ds_configs/ and slurm/ contain only data files. They are installed below trainer/, where users can copy them from.
setup(
    packages=[
        *find_namespace_packages(include=["model*", "trainer*", "tools*"]),
        "trainer.ds_configs",
        "trainer.slurm",
    ],
    package_dir={"trainer.ds_configs": "ds_configs", "trainer.slurm": "slurm"},
)
