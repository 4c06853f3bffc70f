"""The list of packages; everything else about the package is in pyproject.toml."""

from setuptools import find_namespace_packages, setup

# ds_configs/ and slurm/ are folders of files, shipped below trainer/ so that an installation can copy them out.
setup(
    packages=[
        *find_namespace_packages(include=["model*", "trainer*", "tools*"]),
        "trainer.ds_configs",
        "trainer.slurm",
    ],
    package_dir={"trainer.ds_configs": "ds_configs", "trainer.slurm": "slurm"},
)
