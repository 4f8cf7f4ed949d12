"""The command `epochd`: arguments in, exit status out (errors.py has the table)."""

import asyncio
import json
import logging
import sys

from . import config, daemon
from .errors import EXIT_OK, EXIT_RUNTIME, EpochdError

CAPABILITIES = {"type": "block", "features": ["read-only", "blk-file"]}


def _log_to_stderr(level: str) -> None:
    logging.basicConfig(
        stream=sys.stderr,
        level=level.upper(),
        format="%(asctime)s epochd %(levelname)s: %(message)s",
    )


def main() -> int:
    """Entry point of the console script."""
    try:
        settings = config.parse(sys.argv[1:])
        if settings is None:
            print(json.dumps(CAPABILITIES, indent=2))
            return EXIT_OK
        _log_to_stderr(settings.log_level)
        asyncio.run(daemon.run(settings))
    except EpochdError as error:
        print(f"epochd: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:  # before the loop watches signals
        return EXIT_RUNTIME
    except Exception:
        logging.getLogger("epochd").exception("internal error")
        return EXIT_RUNTIME
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
