"""epochd: the disk agent of a micro-checkpointed VM's standby.

The package is the Python half: protocol, control, configuration, life cycle. Requests, epochs,
journal and disk are the C core behind `core`. Python never touches guest memory; C never
parses a message.
"""

from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version

try:
    __version__: str = _version("epochd")
except _PackageNotFoundError:  # installed by plain meson, which keeps no metadata
    __version__ = "0+unknown"
