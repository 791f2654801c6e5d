"""The one build step that setup.cfg cannot say: recipes/ and slurm/ come along inside of the package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FOLDERS = {"recipes": "*.yaml", "slurm": "*.*"}  # As sfa_dist/recipe/shipped.py looks for them.
PRIVATE = "cluster.env"  # What the site of whoever builds needs.


class WithRecipes(build_py):
    """Copies the folders into the package; an editable install reads them where they are."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for folder, pattern in FOLDERS.items():
            target = Path(self.build_lib) / "sfa_dist" / folder
            shutil.rmtree(target, ignore_errors=True)
            for file in sorted(Path(folder).rglob(pattern)):
                if file.name != PRIVATE:
                    copy = target / file.relative_to(folder)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, copy)


setup(cmdclass={"build_py": WithRecipes})
