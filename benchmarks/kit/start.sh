#!/bin/sh
# Unpacks this kit into a folder and runs benchmarks/gpu.py there; nothing is installed, nothing outside it is written.
#   sh start.sh [--work DIR] [options of gpu.py, such as --quick --device cpu]
# PYTHON names the interpreter that has torch (python3).
set -eu
exec "${PYTHON:-python3}" "$(dirname "$0")/start.py" "$@"
