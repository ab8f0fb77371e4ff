"""Pluralistic alignment in JAX: ideal-point reward models."""

__version__ = '0.1.0'
