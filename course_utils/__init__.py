"""Companion package of the course Fine-Tuning in the Open.

Import the module that you need, for example ``from course_utils.models import
load_model``; importing the package itself loads nothing heavy.

It also sets the libraries' manners for a notebook: no progress-bar widgets (their
saved state breaks viewers), no telemetry, no remark about kernels that the course
does not use. A variable that is already set is left alone.
"""

import os
import sys
import warnings

__version__ = "0.1.0"

for _name in (
    "HF_DATASETS_DISABLE_PROGRESS_BARS",
    "HF_HUB_DISABLE_PROGRESS_BARS",
    "HF_HUB_DISABLE_TELEMETRY",
):
    os.environ.setdefault(_name, "1")
if "datasets" in sys.modules:  # imported before us: it has read its variable already
    sys.modules["datasets"].disable_progress_bars()
if "logging" in sys.modules:  # as in any notebook; not worth its import elsewhere
    sys.modules["logging"].getLogger("bitsandbytes").setLevel("ERROR")
# PEFT asks transformers by an old name, and so do we: older versions know no other.
warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing", FutureWarning)
