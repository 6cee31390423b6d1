"""fedsec measures what a federated update gives away, at what cost, and what a defense costs."""

import os

__version__ = "0.1.0"

# Nothing phones home. Flower and Ray read these when they are first imported, in this process
# and in every worker that imports fedsec.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
