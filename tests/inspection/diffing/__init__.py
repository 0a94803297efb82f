"""diff, part by part."""
