"""The distributed trainer: data, parallelism, engines, the step and everything around it."""
