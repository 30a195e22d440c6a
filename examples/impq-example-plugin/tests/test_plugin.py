"""Tests of the plugin and its components by the suites of impq. Add tests of your own."""

from impq_core.testing import AllocatorSuite, BackendSuite, EstimatorSuite, PluginSuite

import impq_example
from impq_example import allocator, backend, estimator


class TestPlugin(PluginSuite):
    plugin = impq_example


class TestEstimator(EstimatorSuite):
    part = estimator.Example


class TestAllocator(AllocatorSuite):
    part = allocator.Example


class TestBackend(BackendSuite):
    part = backend.Example
