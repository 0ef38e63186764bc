"""Types and services that every other room may use; imports nothing of ours."""
