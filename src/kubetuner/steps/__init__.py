"""The steps of a pipeline as plain functions: one file each, named like the component that wraps it."""
