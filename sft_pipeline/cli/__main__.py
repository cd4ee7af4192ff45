"""`python -m sft_pipeline.cli` is `sft`."""

from sft_pipeline.cli.main import main

main()
