"""Files in, edited files out: what every command that writes does around its edit."""
