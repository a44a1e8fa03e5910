"""Own data sets: which files make a scan, what is made of it, and the repair of what is wrong."""
