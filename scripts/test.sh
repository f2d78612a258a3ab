#!/usr/bin/env bash
# Set up (first time only) and run the tests; arguments go to pytest. Example: scripts/test.sh tests/data_test.py -x
EXTRA=requirements-dev.txt
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
# three at a time even on two cores: half of the time a test waits for a process of its own
exec "$PY" -m pytest -n 3 --dist worksteal "$@"
