"""The quickstart: a task that a program can check, and a small model matrix trained from scratch."""
