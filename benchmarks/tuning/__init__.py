"""Launch configurations beside the selected ones: examined without a GPU, measured on one. See docs/tuning.md."""
