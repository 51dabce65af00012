"""Configuration: every key with its type and bound (`schema`), and how a YAML file becomes one (`load`)."""
