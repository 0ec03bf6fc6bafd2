"""One thread per process: two cores that also run other processes make OpenMP barriers up to ten times slower than no second thread. And no settings
or keys of the person who runs the tests."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["XDG_CONFIG_HOME"] = "/nonexistent"
for name in [n for n in os.environ if n.startswith(("SPECEDGE_SERVER_", "SPECEDGE_EDGE_"))]:
    del os.environ[name]
