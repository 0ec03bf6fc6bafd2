"""One thread per process: two cores that also run other processes make OpenMP barriers up to ten times slower than no second thread."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
