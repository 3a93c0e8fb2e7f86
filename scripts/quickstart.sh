#!/usr/bin/env bash
# Makes a small synthetic data set, trains DSNet on it and evaluates the result. Safe to run again: an interrupted
# training resumes, a finished one is not repeated; the data is checked and the network evaluated again.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
workdir=runs/shapes_quickstart

.venv/bin/dsnet prepare shapes
.venv/bin/dsnet train --config=configs/shapes_quickstart.py --workdir="$workdir"
.venv/bin/dsnet evaluate --workdir="$workdir"

echo "scores:   $workdir/evaluation/val/table.md"
echo "pictures: $workdir/evaluation/val/overlays/"
