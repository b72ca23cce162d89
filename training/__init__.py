"""Fine-tuning without the service: reads a spec, leaves progress, checkpoints and an artifact in a run directory."""
