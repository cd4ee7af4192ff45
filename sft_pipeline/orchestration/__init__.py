"""How Dagster sees the stages: assets, checks, jobs, sensors, schedules. Thin over `sft_pipeline.stages`."""
