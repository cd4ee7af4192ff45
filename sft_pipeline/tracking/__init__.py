"""MLflow as an index of what the manifests say: one run per recipe and snapshot. Imported only where runs are tracked."""
