"""What containers of files are made of: the zip directory, inflating, the headers of tars."""
