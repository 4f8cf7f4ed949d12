"""Emits the C glue of an extension from its header (cffi, API mode).

Contract: `build_ffi.py MODULE HEADER OUTPUT_C`, with `epochd._core` and core.h for the agent.
The header is the only source of truth; the part
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
        raise ValueError(f"the header needs exactly one {BEGIN!r} and one {END!r}")
    return header.split(BEGIN)[1].split(END)[0]


def main() -> None:
    """Read the header and write the C file that the arguments name."""
    module, header, output = sys.argv[1:]
    ffi = cffi.FFI()
    ffi.cdef(declarations(Path(header).read_text(encoding="utf-8")))
    ffi.set_source(module, f'#include "{Path(header).name}"')
    ffi.emit_c_code(output)


if __name__ == "__main__":
    main()
