"""MLflow as an index of what the manifests say. Imported only where runs are tracked."""
