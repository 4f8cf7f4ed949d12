"""Emits the C glue of the extension `epochd._core` from core.h (cffi, API mode).

Contract: `build_ffi.py CORE_H OUTPUT_C`. core.h is the only source of truth; the part
between its two cdef marks is handed to cffi as it is, so that part may hold only what
cffi's parser knows: plain declarations, integer #defines, comments. API mode lets the C
compiler check every declaration against the real header.
"""

import sys
from pathlib import Path

import cffi

BEGIN = "/* cdef-begin */"
END = "/* cdef-end */"


def declarations(header: str) -> str:
    """Return the text between the cdef marks; ValueError when a mark is missing or doubled."""
    if header.count(BEGIN) != 1 or header.count(END) != 1:
        raise ValueError(f"core.h needs exactly one {BEGIN!r} and one {END!r}")
    return header.split(BEGIN)[1].split(END)[0]


def main() -> None:
    """Read the header named by the first argument, write the C file named by the second."""
    header, output = sys.argv[1:]
    ffi = cffi.FFI()
    ffi.cdef(declarations(Path(header).read_text(encoding="utf-8")))
    ffi.set_source("epochd._core", '#include "core.h"')
    ffi.emit_c_code(output)


if __name__ == "__main__":
    main()
