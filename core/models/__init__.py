"""Models and the manifests that hold their files."""
