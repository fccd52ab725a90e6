#!/usr/bin/env bash
# Write constraints.txt from the environment in .venv: the versions that the tests last passed with.
set -euo pipefail
cd "$(dirname "$0")/.."
{
  echo "# The versions that the course was last tested with: pip install -c constraints.txt -e '.[all,dev]'"
  echo "# Written by scripts/freeze.sh; upgrade on purpose, then run make test."
  # CUDA packages follow torch's own pins
  .venv/bin/pip freeze --exclude-editable | grep -viE '^(nvidia-|cuda-|triton)'
} > constraints.txt
