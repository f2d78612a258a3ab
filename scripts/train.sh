#!/usr/bin/env bash
# Set up (first time only) and run main.py with the arguments given; without any, minutes on a laptop:
# the embedded handwritten digits. Example: scripts/train.sh --config=configs/resnet.py --workdir=runs/resnet
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
if [ $# -eq 0 ]; then
  set -- --config=configs/quickstart.py --workdir=runs/quickstart
fi
exec "$PY" main.py "$@"
