"""Transforms: methods that rewrite a model, and the tools that they are made with."""
