"""Settings and fixtures that every test shares."""

from __future__ import annotations

import os

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", CI="1", TOKENIZERS_PARALLELISM="false")
