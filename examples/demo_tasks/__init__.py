"""Small real tasks for the model of `make demo`: `make demo-tasks` runs them, docs/demo_tasks.md describes them."""
