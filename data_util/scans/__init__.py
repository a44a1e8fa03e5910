"""A raw scan: files in, an image with its place in the patient, and the volume that a network sees of it."""
