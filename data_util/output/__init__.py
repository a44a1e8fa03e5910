"""What is written: records, tables and images of an evaluation, figures, and the files of a registration."""
