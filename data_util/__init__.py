"""Data: the data set (config, HDF5 files, pairs, batches), its commands, raw scans, own data sets, and output."""
