"""Made-up Python installations that tests share."""

from __future__ import annotations

from pathlib import Path


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def install(packages: Path, name: str, files: dict[str, str | bytes], version: str = "1.0") -> None:
    """A package as an installer leaves it: its files, and a RECORD of them."""
    record = f"{name}-{version}.dist-info/RECORD"
    for path, content in files.items():
        write(packages / path, content)
    write(packages / record, "".join(f"{path},sha256=x,1\n" for path in [*files, record, "../bin/tool"]))
