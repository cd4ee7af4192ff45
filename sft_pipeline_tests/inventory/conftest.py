from sft_pipeline_tests.tracking.conftest import client, migrated_database  # noqa: F401 - fixtures
