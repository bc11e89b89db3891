"""What the documents say of the code is what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from streamproc.settings import Settings
from tests.support.settings_table import BEGIN, END, README, table

ROOT = Path(__file__).parents[2]


def test_the_settings_table_is_the_models() -> None:
    text = README.read_text()
    assert text.split(BEGIN)[1].split(END)[0].strip() == table(), "run: python -m tests.support.settings_table"


def test_the_first_backend_of_the_readme_is_the_example() -> None:
    text = README.read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    example = (ROOT / "examples" / "first_backend" / "inference.py").read_text()
    assert code.strip() in example
    settings = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0])
    assert settings == yaml.safe_load((ROOT / "examples" / "first_backend" / "streamproc.yaml").read_text())
    Settings.model_validate(settings)


def test_every_file_that_a_document_links_to_is_there() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name} links to {target}"
