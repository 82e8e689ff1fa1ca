from __future__ import annotations

import sys

from commands import ROOT

sys.path.insert(0, str(ROOT))  # data_prep is run from the repository root, not installed
