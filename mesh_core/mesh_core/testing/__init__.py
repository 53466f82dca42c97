"""For the tests of plugins: what an adapter, a transport and a codec must prove, and workers that serve in a thread.

The checks are plain functions that raise AssertionError, so any test runner will do.
"""

from mesh_codec.testing import check_codec
from mesh_core.testing.adapters import check_every_cut, check_reads_only_its_own, check_recognises_without_data
from mesh_core.testing.transports import TRANSPORT_CHECKS, check_transport
from mesh_core.testing.workers import ThreadWorker, mesh_home, thread_workers, wait_until

__all__ = [
    "TRANSPORT_CHECKS",
    "ThreadWorker",
    "check_codec",
    "check_every_cut",
    "check_reads_only_its_own",
    "check_recognises_without_data",
    "check_transport",
    "mesh_home",
    "thread_workers",
    "wait_until",
]
