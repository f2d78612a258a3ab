#!/usr/bin/env bash
# Set up (first time only) and run the tests; arguments go to pytest. Example: scripts/test.sh tests/data_test.py -x
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements-dev.txt
exec "$PY" -m pytest "$@"
