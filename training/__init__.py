"""Fine-tuning without the service: reads a `TrainSpec`, leaves progress, checkpoints and an artifact in a run directory."""
