"""Maps the three folders users read first into the package; everything else is declared in pyproject.toml."""

from setuptools import find_packages, setup

# planners/, trainers/ and dataset_conversion/ stand at the top of the repository, and are imported as diffseg_nnunet.*:
# nothing generic ever lands in site-packages.
TOP_LEVEL_FOLDERS = ("planners", "trainers", "dataset_conversion")

setup(
    packages=[
        *find_packages(include=["diffseg_nnunet", "diffseg_nnunet.*"]),
        *(f"diffseg_nnunet.{folder}" for folder in TOP_LEVEL_FOLDERS),
        *(f"diffseg_nnunet.{folder}.{name}" for folder in TOP_LEVEL_FOLDERS for name in find_packages(folder)),
    ],
    package_dir={f"diffseg_nnunet.{folder}": folder for folder in TOP_LEVEL_FOLDERS},
)
