"""Many ranks, and memory traded for compute."""
