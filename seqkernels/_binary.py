"""Whether the compiled module is a whole file, found before it is loaded, and is that of these Python files.

Loading part of a file can end the process. A module of other sources may have ops with other arguments.
"""

from __future__ import annotations

import pathlib
import struct

# The hash of the schemas in csrc/library.cpp (_C.schemas). Whoever changes a schema changes it: the error on import has
# the new one.
SCHEMAS = "1deaeaf41044142b"

_ELF, _ELF_HEADER = b"\x7fELF\x02\x01", 64  # of 64 bits, little-endian


def obstacle(folder: pathlib.Path) -> str | None:
    """Why the compiled module in this folder cannot be loaded, as far as its size and headers say; None otherwise."""
    for path in folder.glob("_C*.so"):
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(_ELF_HEADER)
        if len(header) < _ELF_HEADER:
            return f"{path.name} has {size} bytes"
        if header.startswith(_ELF):
            # The table of sections is at the end of the file.
            (sections,) = struct.unpack_from("<Q", header, 40)
            of_each, count = struct.unpack_from("<HH", header, 58)
            if sections + of_each * count > size:
                return f"{path.name} is truncated: it has {size} of {sections + of_each * count} bytes"
    return None
