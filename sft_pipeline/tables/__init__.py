"""The Parquet tables that stages hand to each other: their schemas, and how they are written and read."""
