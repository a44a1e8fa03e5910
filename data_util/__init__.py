"""Data: configs, HDF5 stores, pairs, the pipeline, phantoms, images, reports and figures."""
