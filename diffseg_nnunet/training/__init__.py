"""What the trainers share: loaders, checkpoints, EMA, schedules, precision."""
