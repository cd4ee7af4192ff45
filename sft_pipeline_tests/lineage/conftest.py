from sft_pipeline_tests.evaluation.world import one_thread  # noqa: F401 - a fixture
