"""torch's own containers: zip, legacy, tar."""
