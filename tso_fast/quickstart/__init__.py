"""The quickstart: a task that a program can check, a small model matrix made from nothing, and the loop's settings."""
