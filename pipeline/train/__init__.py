"""Fine-tuning: data order, the step, checkpoints, metrics, export."""
