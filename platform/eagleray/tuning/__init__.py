"""Architecture and hyperparameter search: Ray Tune schedules, Optuna proposes."""
