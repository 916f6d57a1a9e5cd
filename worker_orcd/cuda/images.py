"""The kernel images of the package, as fatbins/manifest.json lists them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypedDict


class Image(TypedDict):
    """What an image holds: machine code of these architectures, for example ``"90a"``, and PTX of one, or None."""

    sass: list[str]
    ptx: str | None


def packaged() -> dict[str, Image]:
    """The images that are there, by name; none where the package was built without."""
    folder = Path(__file__).parents[1] / "fatbins"
    try:
        listed = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return {}
    return {name: image for name, image in listed.items() if (folder / f"{name}.fatbin").is_file()}


def has_machine_code(name: str, arch: str) -> bool:
    """Whether the image `name` has machine code of `arch`."""
    image = packaged().get(name)
    return image is not None and arch in image["sass"]
