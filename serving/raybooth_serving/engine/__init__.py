"""Mixed subjects, prompts, steps, solvers and guidance in one batch over one bank."""
