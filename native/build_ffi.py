"""Emits the C glue of an extension from its headers (cffi, API mode).

Contract: `build_ffi.py MODULE HEADER... OUTPUT_C`, with `epochd._core`, core.h (all functions)
and format.h (the live view's layout) for the agent. The headers are the only source of truth;
the part between a header's two cdef marks is handed to cffi as it is, so that part may hold
only what cffi's parser knows: plain declarations, integer #defines, comments. API mode lets
the C compiler check every declaration against the real headers.
"""

import sys
from pathlib import Path

import cffi

BEGIN = "/* cdef-begin */"
END = "/* cdef-end */"


def declarations(header: str) -> str:
    """Return the text between the cdef marks; ValueError when a mark is missing or doubled."""
    if header.count(BEGIN) != 1 or header.count(END) != 1:
        raise ValueError(f"a header needs exactly one {BEGIN!r} and one {END!r}")
    return header.split(BEGIN)[1].split(END)[0]


def main() -> None:
    """Read the headers and write the C file that the arguments name."""
    module, *headers, output = sys.argv[1:]
    ffi = cffi.FFI()
    for header in headers:
        ffi.cdef(declarations(Path(header).read_text(encoding="utf-8")))
    ffi.set_source(module, "\n".join(f'#include "{Path(header).name}"' for header in headers))
    ffi.emit_c_code(output)


if __name__ == "__main__":
    main()
