"""What the model stages share: loading, feeding, loss, the trainer, generation. Imported only where torch runs."""
