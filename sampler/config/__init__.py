"""Configuration: schema, layers, file formats."""
